"""The density over log-SNR that a schedule's timesteps have, and means under a density."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, singledispatch

import torch
from torch import Tensor

from snrweights.densities import DENSITIES, SHIFTED, Cosine, Density, FlowUniform, exact, log_normal_sigma
from snrweights.schedules import CosineSchedule, DiscreteSchedule, EDMSchedule, FlowSchedule, Schedule


@dataclass(frozen=True, eq=False)
class TableDensity:
    """Uniform timesteps of a discrete schedule: p = 1 / (T |dl/dt|), by central differences, one-sided at the ends.

    A timestep at infinite log-SNR (zero terminal SNR) is an atom of mass 1/T, kept apart: ``log_prob`` is -inf there.
    Between the timesteps ln p is interpolated; beyond the last finite ones it is -inf.

    Args:
        log_snr: (T,) float64, non-increasing.
    """

    log_snr: Tensor = field(repr=False)

    @cached_property
    def _table(self) -> tuple[Tensor, Tensor]:
        finite = self.log_snr[self.log_snr.isfinite()].unique()  # ascending, as searchsorted wants it
        if len(finite) < 2:
            raise ValueError(f"A density needs timesteps at two finite log-SNRs at least, got {self.log_snr.tolist()}.")
        (slope,) = torch.gradient(finite)
        return finite, -torch.log(slope * len(self.log_snr))

    def log_prob(self, log_snr: Tensor) -> Tensor:
        """Return ln p, any shape."""
        log_snr = exact(log_snr)
        x, y = (part.to(log_snr) for part in self._table)
        right = torch.searchsorted(x, log_snr.contiguous()).clamp(1, len(x) - 1)
        x0, x1, y0, y1 = x[right - 1], x[right], y[right - 1], y[right]
        inside = (log_snr >= x[0]) & (log_snr <= x[-1])
        fraction = torch.where(inside, (log_snr - x0) / (x1 - x0), 0.0)
        value = torch.where(fraction == 1, y1, y0 + fraction * (y1 - y0))
        return torch.where(inside, value, -math.inf)

    def icdf(self, u: Tensor) -> Tensor:
        """Return the log-SNR of the timestep at quantile u (a step function: the draws are discrete)."""
        steps = len(self.log_snr)
        index = (steps * (1 - exact(u))).ceil().long().clamp(1, steps) - 1
        return self.log_snr.to(index.device)[index]


@dataclass(frozen=True)
class Between:
    """A density given that its quantile lies in (low, high): a schedule that stops short of its ends.

    ``log_prob`` is not cut off outside, so that a stray timestep there gets a weight that goes on smoothly.

    Example:
        >>> Between(FlowUniform(), 0.0, 0.5).icdf(torch.tensor([1.0]))
        tensor([0.], dtype=torch.float64)
    """

    density: Density
    low: float
    high: float

    def log_prob(self, log_snr: Tensor) -> Tensor:
        """Return ln p, any shape."""
        return self.density.log_prob(log_snr) - math.log(self.high - self.low)

    def icdf(self, u: Tensor) -> Tensor:
        """Return the quantile of u."""
        return self.density.icdf(self.low + (self.high - self.low) * exact(u))


def _between(density: Density, low: float, high: float) -> Density:
    return density if (low, high) == (0, 1) else Between(density, low, high)


@singledispatch
def default_density(schedule: Schedule) -> Density:
    """Return the density of a loop that draws uniformly over the schedule's timesteps.

    For EDMSchedule over sigma, which nobody draws uniformly, it is the paper's log-normal (-1.2, 1.2).

    Example:
        >>> default_density(FlowSchedule(shift=3.0))
        FlowUniform(shift=3.0)
    """
    return TableDensity(schedule.log_snr(schedule.grid()))


@default_density.register
def _(schedule: DiscreteSchedule) -> Density:
    return TableDensity(schedule.log_snr_table)


@default_density.register
def _(schedule: CosineSchedule) -> Density:
    return _between(Cosine(2 * math.log(64 / schedule.resolution)), 1 - schedule.t_max, 1 - schedule.t_min)


@default_density.register
def _(schedule: FlowSchedule) -> Density:
    k, s_min = schedule.shift, schedule.s_min
    return _between(FlowUniform(k), 0, 1 - s_min / (k - (k - 1) * s_min))  # s_min before the shift


@default_density.register
def _(schedule: EDMSchedule) -> Density:
    return log_normal_sigma()


def as_density(density: Density | str | None, schedule: Schedule) -> Density:
    """Return a density from itself, its name (with default parameters) or None (the schedule's own).

    By name, a density of a flow's time is that of the time before the schedule's shift, as diffusers' scripts draw it:
    what they index is the shifted table.

    Raises:
        ValueError: unknown name.
        TypeError: neither of the three.

    Example:
        >>> as_density("logit_normal", FlowSchedule(shift=3.0))
        Normal(mean=-2.1972245773362196, std=2.0)
    """
    if density is None:
        return default_density(schedule)
    if isinstance(density, str):
        if density not in DENSITIES:
            raise ValueError(f"Unknown density {density!r}; choose one of {list(DENSITIES)}.")
        if isinstance(schedule, FlowSchedule) and density in SHIFTED:
            return SHIFTED[density](schedule.shift)
        return DENSITIES[density]()  # type: ignore[operator]
    if isinstance(density, Density):
        return density
    raise TypeError(f"`density` must be a Density, a name in {list(DENSITIES)} or None, got {type(density).__name__}.")


def log_snr_moments(density: Density) -> tuple[float, float]:
    """Return mean and standard deviation of log-SNR over the draws at finite log-SNR; not finite if there is none.

    Example:
        >>> tuple(round(value, 9) for value in log_snr_moments(log_normal_sigma()))
        (2.4, 2.4)
    """

    def finite(function: Callable[[Tensor], Tensor]) -> float:
        return mean_under(density, lambda log_snr: torch.where(log_snr.isfinite(), function(log_snr), 0.0))

    share = finite(torch.ones_like)
    mean, square = finite(torch.clone) / share, finite(torch.square) / share
    return mean, math.sqrt(square - mean**2) if math.isfinite(square) else square


def mean_under(density: Density, function: Callable[[Tensor], Tensor]) -> float:
    """Return the mean of a function of log-SNR under the density; inf where the integral does not converge.

    A sum over the timesteps of a table, else tanh-sinh quadrature in the quantile u. An integral counts as convergent
    if the outermost 1e-8 of the mass at both ends does not carry 1 % of it.

    Example:
        >>> round(mean_under(FlowUniform(), lambda log_snr: log_snr.sigmoid()), 12)
        0.5
    """
    if isinstance(density, TableDensity):
        return float(function(density.log_snr).mean())
    x = torch.linspace(-3.2, 3.2, 8193, dtype=torch.float64)
    u = torch.sigmoid(math.pi * torch.sinh(x))
    mass = torch.cosh(x) * u * torch.sigmoid(-math.pi * torch.sinh(x))
    inside = (u > 0) & (u < 1)
    u, mass = u[inside], mass[inside] / mass[inside].sum()
    terms = function(density.icdf(u)) * mass
    tails = terms[(u <= 1e-8) | (u >= 1 - 1e-8)]
    return float(terms.sum()) if tails.abs().sum() <= 0.01 * terms.abs().sum() else math.inf
