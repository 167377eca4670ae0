"""What test_sampler_two_processes.py runs: samplers that learn from losses, on every process of torchrun or on one."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from leaving import leave
from safetensors.torch import save_file

from snrweights import DiscreteSchedule, ImportanceSampler

SCHEDULE = DiscreteSchedule.from_name("linear", 20)
RULES = ("gradient", "variance", "loss_second_moment", "gap")
GLOBAL_BATCH, STEPS, RESUMED = 40, 60, 30


def all_reduce(tensor):
    """Sum over all processes."""
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def losses(t):
    """A loss that falls with noise."""
    return torch.exp(-t.double() / 6) * (1 + 0.5 * torch.sin(t.double() ** 2))


def floor(log_snr):
    """An optimal loss below them."""
    return 0.3 * torch.sigmoid(log_snr.double() - 4)


def make(rule, rank, world_size, reduce):
    """Return the sampler of a process."""
    options = {"rank": rank, "world_size": world_size, "seed": 2, "refresh_every": 5, "warm_up": 2}
    bins = None if rule == "loss_second_moment" else 6  # several timesteps in each, or no loss would vary
    optimum = floor if rule == "gap" else None
    return ImportanceSampler(SCHEDULE, rule, bins=bins, reduce=reduce, optimum=optimum, **options)


def train(sampler, steps, world_size):
    """Draw and learn; return all timesteps drawn."""
    drawn = []
    for _ in range(steps):
        t, _ = sampler.draw(GLOBAL_BATCH // world_size)
        sampler.update(t, losses(t))
        drawn.append(t)
    return torch.stack(drawn)


def results(rank=0, world_size=1, reduce=None):
    """Return what all rules come to."""
    found = {}
    for rule in RULES:
        sampler = make(rule, rank, world_size, reduce)
        train(sampler, RESUMED, world_size)
        if reduce is not None:
            sampler.evidence.sync()
        state = sampler.state_dict()
        found[f"{rule}.drawn"] = train(sampler, STEPS - RESUMED, world_size)
        sampler.refresh()
        found[f"{rule}.q"] = sampler.probabilities()[1]
        resumed = make(rule, rank, world_size, reduce)
        resumed.load_state_dict(state)
        found[f"{rule}.resumed"] = train(resumed, STEPS - RESUMED, world_size)
    return found


if __name__ == "__main__":
    dist.init_process_group("gloo")
    own = dist.get_rank()
    save_file(results(own, dist.get_world_size(), all_reduce), Path(sys.argv[1]) / f"{own}.safetensors")
    leave()
