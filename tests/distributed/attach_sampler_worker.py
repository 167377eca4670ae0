"""What test_sampler_two_processes.py trains: a loop that draws by itself, seeded differently on each process."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from attach_worker import make
from diffusers import DDPMScheduler
from leaving import leave
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

import snrweights

STEPS, ROWS = 102, 4


def main(output):
    """Train on each process of torchrun, and write what was drawn and learned."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = DistributedDataParallel(make("unet"))
    torch.manual_seed(100 + rank)  # as set_seed(..., device_specific=True) does
    scheduler, drawn = DDPMScheduler(), []
    with snrweights.attach(model, scheduler, "min_snr", sampler="gradient", dtype=torch.float64) as handle:
        for _ in range(STEPS):
            sample, noise = torch.randn(2, ROWS, 1, 8, 8, dtype=torch.float64)
            t = torch.randint(0, 1000, (ROWS,))
            F.mse_loss(model(scheduler.add_noise(sample, noise, t), t).sample, noise).backward()
            drawn.append(t)
    handle.sampler.refresh()
    state = handle.sampler.state_dict()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    save_file({"timesteps": torch.stack(drawn), **state, **gradients}, Path(output) / f"{rank}.safetensors")
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
