"""Settings of the whole test run."""

import os
import sys

import pytest
import torch
from hypothesis import settings

# the tensors here are small: more threads only wait for each other
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of children

# the same examples in every run, and no complaint about a slow machine
settings.register_profile("snrweights", derandomize=True, deadline=None, max_examples=200, database=None)
settings.load_profile("snrweights")


@pytest.fixture(autouse=True)
def _no_audit_is_left():
    """An attachment that a test leaves on a model must not listen to the backward passes of the next test."""
    yield
    audit = sys.modules.get("snrweights.integrations.audit")
    for left in list(audit._LISTENING) if audit else ():
        left.stop()


@pytest.fixture(autouse=True)
def _the_process_is_as_before():
    """A script that is run in this process stays its ``__main__``, which children of later tests would run again."""
    main, argv, path = sys.modules["__main__"], sys.argv, sys.path[:]
    yield
    sys.modules["__main__"], sys.argv, sys.path[:] = main, argv, path
