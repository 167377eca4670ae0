"""The weightings: one class each, under one decorator."""

# imported to register them, in the order of the table
from snrweights.weightings import classic, clipped, objectives  # noqa: F401

# isort: split
from snrweights.weightings import adaptive, optimal  # noqa: F401
