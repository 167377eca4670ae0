"""The end of a worker."""

import torch.distributed as dist


def leave():
    """Leave the group once nothing is under way in it.

    Gloo's own thread may otherwise still be releasing what was last reduced, for which it wants the interpreter's lock,
    while DistributedDataParallel, which holds that lock as it is destroyed, waits for the thread: for ever.
    """
    dist.barrier()
    dist.destroy_process_group()
