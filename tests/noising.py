"""diffusers' schedulers: how to make one of each class, and what its own noising says about log-SNR."""

import copy
import math

import pytest
import torch
from diffusers import schedulers

from snrweights import as_schedule

ARGUMENTS = {
    "AmusedScheduler": {"mask_token_id": 7},
    "RFD4ProteinaScheduler": {"schedule_mode": "log", "noise_mode": "1/t", "tsr_k": 1.0, "tsr_sigma": 1.0},
    "VQDiffusionScheduler": {"num_vec_classes": 8},
}

AFTER_SET_TIMESTEPS = {
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
}
OWN_TIMESTEPS = AFTER_SET_TIMESTEPS | {  # these noise at entries of their `timesteps` only
    "CosineDPMSolverMultistepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
}
CONTINUOUS_TIME = {"DDPMWuerstchenScheduler", "MiniMaxH3Scheduler", "RFD4ProteinaScheduler"}


def make(name, **options):
    """Make a scheduler by class name."""
    return getattr(schedulers, name)(**{**ARGUMENTS.get(name, {}), **options})


def timesteps(scheduler):
    """Timesteps at which the scheduler can noise, its ends among them."""
    names = {cls.__name__ for cls in type(scheduler).__mro__}
    if names & CONTINUOUS_TIME:
        return torch.tensor([0.001, 0.25, 0.5, 0.95])
    if names & OWN_TIMESTEPS or scheduler.config.get("timestep_type") == "continuous":
        t = scheduler.timesteps
        return t[[0, 1, len(t) // 4, len(t) // 2, -2, -1]]
    last = scheduler.config.num_train_timesteps - 1
    return torch.tensor([0, 1, 10, last // 2, last - 1, last])


def log_snr_by_noising(scheduler, t):
    """Log-SNR at one timestep, from what the scheduler does to a unit signal and to a unit noise."""

    def noised(x0, noise):
        fresh = copy.deepcopy(scheduler)  # some remember the first timestep they saw
        if hasattr(fresh, "add_noise"):
            return fresh.add_noise(x0, noise, t.reshape(1)).item()
        return fresh.scale_noise(x0, t.reshape(1), noise).item()

    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    signal, noise = noised(one, zero), noised(zero, one)
    if signal == 0 or noise == 0:
        return -math.inf if signal == 0 else math.inf
    return 2 * math.log(signal / noise)


def rounding(log_snr):
    """How far a float32 table of alphas_cumprod, or a float32 time, can put log-SNR off."""
    products = 2e-6  # a thousand float32 factors
    if math.isinf(log_snr):
        return 0.0
    return products + 2.0**-23 * (1 + math.exp(log_snr) + 4 * math.exp(-log_snr / 2))


def assert_reads_as_it_noises(scheduler):
    """Compare the schedule that is read off with the noising, at timesteps of the scheduler's own."""
    schedule = as_schedule(scheduler)
    for step in timesteps(scheduler):
        schedule.check(step)
        expected, actual = log_snr_by_noising(scheduler, step), schedule.log_snr(step).item()
        assert actual == pytest.approx(expected, rel=0, abs=rounding(expected)), f"at t = {step.item()}"
