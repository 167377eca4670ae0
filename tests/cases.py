"""What several test files share: schedules, golden numbers, and a detector of waits for the device."""

import dataclasses
import json
import math
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from snrweights import CosineSchedule, DiscreteSchedule, EDMSchedule, FlowSchedule, get_weighting
from snrweights.optimal import OptimalLossCurve
from snrweights.quantiles import quantiles


def _table(name, **options):
    return dataclasses.replace(DiscreteSchedule.from_name(name, **options), sigma_data=0.5)


# each with a sigma_data, so that all five prediction types have a meaning on it
SCHEDULES = {
    "linear": _table("linear"),
    "squaredcos_cap_v2": _table("squaredcos_cap_v2"),
    "zero_snr": _table("scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=True),
    "cosine": CosineSchedule(sigma_data=0.5),
    "flow": FlowSchedule(num_train_timesteps=1000, s_min=1e-3, sigma_data=0.5),
    "edm": EDMSchedule(),
}


def gaussian_curve(variance, dim=4, low=0.01, high=100.0):
    """The optimal loss of Gaussian data, the same variance in every direction: dim v s² / (v + s²)."""
    sigmas = torch.logspace(math.log10(low), math.log10(high), 401, dtype=torch.float64)
    value = dim * variance * sigmas**2 / (variance + sigmas**2)
    made = {"dim": dim, "variance": dim * variance, "second_moment": dim * variance}
    return OptimalLossCurve(sigmas, value, torch.zeros_like(value), ("pairs",) * len(value), value.round(), made)


# hyperparameters that a weighting cannot do without
NEEDED = {"optimal_loss": {"curve": gaussian_curve(0.25)}}


def example(name, **hp):
    """Return a weighting by name, with what it cannot do without."""
    return get_weighting(name, **{**NEEDED.get(name, {}), **hp})


def golden(name):
    """Read tests/goldens/<name>.json: numbers of other projects, with their provenance."""
    return json.loads((Path(__file__).parent / "goldens" / f"{name}.json").read_text())


def numbers(row):
    """Turn a golden row into a float64 tensor; JSON spells NaN and infinity as words."""
    return torch.tensor([float(value) for value in row], dtype=torch.float64)


def small_gradient(schedule, t):
    """The gradients (B, 6) and losses (B,) of a small model, two layers of tanh fitted to a curve over log-SNR."""
    log_snr = schedule.log_snr(t).clamp(-40, 40)
    x = torch.stack((torch.tanh(log_snr / 6), torch.sigmoid(log_snr)), 1)
    first = torch.tensor([[0.5, -1.0], [0.3, 0.8]], dtype=torch.float64)
    second = torch.tensor([1.0, -0.7], dtype=torch.float64)
    hidden = torch.tanh(x @ first)
    error = hidden @ second - torch.cos(log_snr / 3)
    to_first = error[:, None, None] * x[:, :, None] * (second * (1 - hidden**2))[:, None, :]
    return 2 * torch.cat((to_first.flatten(1), error[:, None] * hidden), 1), error**2


def expected_gradient(schedule, density):
    """The mean of ``small_gradient`` under a density, without sampling."""
    laid = quantiles(schedule, density)
    if isinstance(schedule, DiscreteSchedule):
        return laid.probability @ small_gradient(schedule, schedule.grid())[0]
    u = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    return small_gradient(schedule, laid.timesteps(u))[0].mean(0)


class NoHostSync(TorchDispatchMode):
    """Raises where a tensor's value is brought to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "it waits for the device"
        assert func is not torch.ops.aten.nonzero.default, "a shape depends on values"
        return func(*args, **(kwargs or {}))
