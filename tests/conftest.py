"""Settings of the whole test run."""

import torch
from hypothesis import settings

# the tensors here are small: more threads only wait for each other
torch.set_num_threads(1)

# the same examples in every run, and no complaint about a slow machine
settings.register_profile("snrweights", derandomize=True, deadline=None, max_examples=200, database=None)
settings.load_profile("snrweights")
