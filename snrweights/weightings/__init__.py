"""The weightings: one class each, under one decorator."""

from snrweights.weightings import classic, clipped, objectives  # noqa: F401  (registers them)
