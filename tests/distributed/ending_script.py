"""A script of two models for `snrweights launch` that fails on these ranks: `ending_script.py OUTPUT RANKS`."""

import sys
import time

import torch
import torch.distributed as dist
from diffusers import DDPMScheduler, UNet2DModel
from torch.nn.parallel import DistributedDataParallel

torch.set_num_threads(1)
dist.init_process_group("gloo")
scheduler, rank = DDPMScheduler(), dist.get_rank()
small = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 4}
blocks = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
models = [DistributedDataParallel(UNet2DModel(**small, **blocks)) for _ in range(2)]
for _ in range(3):
    for model in models:
        images, noise = torch.randn(2, 4, 1, 8, 8)
        t = torch.randint(0, 1000, (4,))
        torch.nn.functional.mse_loss(model(scheduler.add_noise(images, noise, t), t).sample, noise).backward()
dist.barrier()
if str(rank) in sys.argv[2:]:
    raise RuntimeError("the script's own")
time.sleep(60)  # as at a collective that the other process does not come to: torchrun ends this one
