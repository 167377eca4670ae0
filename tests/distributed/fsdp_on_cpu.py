"""Run a script's main under FSDP2 on gloo processes.

accelerate turns FSDP on for accelerators only, although torch's fully_shard works on CPUs: this sets in its state what
it would set itself on a GPU.
"""

import runpy
import sys
from pathlib import Path

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

initialise = AcceleratorState.__init__
plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")


def with_fsdp(self, *args, **kwargs):
    initialise(self, *args, **kwargs)
    self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin


AcceleratorState.__init__ = with_fsdp
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))  # as python does for a script
runpy.run_path(sys.argv[0], run_name="__main__")
