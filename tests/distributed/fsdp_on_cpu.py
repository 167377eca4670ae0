"""FSDP2 on gloo processes.

accelerate turns FSDP on for accelerators only, although torch's fully_shard works on CPUs: this sets in its state what
it would set itself on a GPU.
"""

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


def shard():
    """Have every Accelerator of this process shard its models."""
    initialise = AcceleratorState.__init__
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")

    def with_fsdp(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

    AcceleratorState.__init__ = with_fsdp
