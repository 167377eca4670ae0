"""A density over log-SNR laid over the timesteps of a schedule, from noise (quantile 0) to clean (quantile 1)."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from snrweights.densities import Density, exact
from snrweights.drawn import Between, TableDensity
from snrweights.predictions import LIMIT
from snrweights.schedules import DiscreteSchedule, Schedule, exact_dtype


class Quantiles(Protocol):
    """What a sampler needs to know of a density on a schedule."""

    def timesteps(self, u: Tensor) -> Tensor:
        """Return the timesteps (B,) at the quantiles ``u`` (B,) in [0, 1]."""

    def log_mass(self, t: Tensor) -> Tensor:
        """Return ln of the density, or of the probability, of timesteps (B,)."""

    def mass_up_to(self, log_snr: Tensor) -> Tensor:
        """Return the mass at or below ``log_snr`` (n,), on the CPU."""

    def support(self) -> Tensor:
        """Return timesteps that stand for all that have mass."""

    def edges(self, bins: int) -> Tensor:
        """Return rising log-SNRs that cut the mass into at most ``bins`` parts, as equal as can be."""


class ContinuousQuantiles:
    """Of a schedule on which every log-SNR has its timestep; timesteps are float32."""

    def __init__(self, schedule: Schedule, density: Density) -> None:
        if not hasattr(schedule, "timestep_of"):
            raise TypeError(f"`schedule` {type(schedule).__name__} has no `timestep_of(log_snr)` to draw from it with.")
        self.schedule, self.density = schedule, density
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        t = self.timesteps(ends)
        try:
            schedule.check(t)
        except ValueError as error:
            raise ValueError(
                f"{density} reaches beyond the schedule: {error} "
                "Cut it off with `snrweights.quantiles.within(density, low, high)`."
            ) from None
        self._range = density.icdf(ends).tolist()
        self._drawn = t.sort().values.tolist()
        # rounding to float32 can put the outermost timesteps out of the range, or at infinite log-SNR
        self._neighbours = torch.nextafter(t, t.flip(0)).sort().values.tolist()

    def timesteps(self, u: Tensor) -> Tensor:
        """Return the timesteps (B,) at the quantiles ``u`` (B,)."""
        t: Tensor = self.schedule.timestep_of(self.density.icdf(inside(u)))
        return t.float()

    def log_mass(self, t: Tensor) -> Tensor:
        """Return ln p over log-SNR, -inf where nothing is drawn; the outermost timesteps count as their neighbours."""
        drawn = (t >= self._drawn[0]) & (t <= self._drawn[1])
        log_snr = self.schedule.log_snr(torch.where(drawn, t.clamp(*self._neighbours), t))
        has_mass = (log_snr >= self._range[0]) & (log_snr <= self._range[1])
        return torch.where(has_mass, self.density.log_prob(log_snr), -math.inf)

    def mass_up_to(self, log_snr: Tensor) -> Tensor:
        """Return the mass at or below ``log_snr`` (n,)."""
        return mass_up_to(self.density, log_snr)

    def support(self) -> Tensor:
        """Return the timesteps at 1001 quantiles, the outermost included."""
        return self.timesteps(torch.linspace(0, 1, 1001, dtype=torch.float64)).clamp(*self._neighbours)

    def edges(self, bins: int) -> Tensor:
        """Return the quantiles at multiples of 1 / bins."""
        return self.density.icdf(torch.arange(1, bins, dtype=torch.float64) / bins).unique()


class DiscreteQuantiles:
    """Of a table of timesteps: a continuous density gives each the mass that is nearest to it in log-SNR."""

    def __init__(self, schedule: DiscreteSchedule, density: Density) -> None:
        self._log_snr = schedule.log_snr_table
        steps = len(self._log_snr)
        if isinstance(density, TableDensity) and torch.equal(density.log_snr, self._log_snr):
            up_to = torch.arange(1, steps + 1, dtype=torch.float64) / steps
        else:
            values, place, sharers = self._log_snr.unique(return_inverse=True, return_counts=True)
            upper = mass_up_to(density, (values[1:] + values[:-1]) / 2)
            mass = torch.cat((upper, upper.new_ones(1))).diff(prepend=upper.new_zeros(1))
            up_to = (mass / sharers)[place].flip(0).cumsum(0)
            up_to = up_to / up_to[-1]
        self.probability = up_to.diff(prepend=up_to.new_zeros(1)).flip(0)  # (T,)
        self._tables = {up_to.device: (up_to[:-1], self.probability.log())}

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._tables:  # copied once: a copy from the host waits for the device
            upper, log_probability = next(iter(self._tables.values()))
            self._tables[device] = tuple(x.to(device, exact_dtype(device)) for x in (upper, log_probability))  # type: ignore[assignment]
        return self._tables[device]

    def timesteps(self, u: Tensor) -> Tensor:
        """Return the timesteps (B,) at the quantiles ``u`` (B,)."""
        return len(self._log_snr) - 1 - torch.bucketize(inside(u), self._on(u.device)[0], right=True)

    def log_mass(self, t: Tensor) -> Tensor:
        """Return ln of the probability of timesteps (B,)."""
        return self._on(t.device)[1].index_select(0, t)

    def mass_up_to(self, log_snr: Tensor) -> Tensor:
        """Return the probability of the timesteps at or below ``log_snr`` (n,)."""
        return torch.where(self._log_snr <= log_snr[:, None], self.probability, 0.0).sum(1)

    def support(self) -> Tensor:
        """Return the timesteps with a probability above 0."""
        return self.probability.nonzero()[:, 0]

    def edges(self, bins: int) -> Tensor:
        """Return the log-SNRs half-way between timesteps that are nearest to the quantiles at multiples of 1 / bins."""
        values = self._log_snr.unique().clamp(-LIMIT / 2, LIMIT / 2)
        between = (values[1:] + values[:-1]) / 2
        wanted = torch.arange(1, bins, dtype=torch.float64) / bins
        off = (self.mass_up_to(between) - wanted[:, None]).abs()
        return between[off.argmin(1).unique()]


def quantiles(schedule: Schedule, density: Density) -> Quantiles:
    """Lay a density over a schedule.

    Example:
        >>> from snrweights.densities import FlowUniform
        >>> from snrweights.schedules import FlowSchedule
        >>> quantiles(FlowSchedule(), FlowUniform()).timesteps(torch.tensor([0.25]))
        tensor([0.7500])
    """
    if isinstance(schedule, DiscreteSchedule):
        return DiscreteQuantiles(schedule, density)
    return ContinuousQuantiles(schedule, density)


def inside(u: Tensor) -> Tensor:
    """Keep uniform numbers off 0 and 1, where quantiles are infinite.

    Example:
        >>> inside(torch.zeros(1)) > 0
        tensor([True])
    """
    u = exact(u)
    tiny = torch.finfo(u.dtype).eps / 2
    return u.clamp(tiny, 1 - tiny)


def within(density: Density, low: float, high: float) -> Between:
    """Return a density given that log-SNR lies in (low, high).

    Raises:
        ValueError: an empty range, or one without mass.

    Example:
        >>> from snrweights.densities import Cauchy
        >>> within(Cauchy(), -9.0, 12.0).icdf(torch.tensor([0.0, 1.0])).round()
        tensor([-9., 12.], dtype=torch.float64)
    """
    below, up_to = mass_up_to(density, torch.tensor([low, high], dtype=torch.float64)).tolist()
    if not (low < high and below < up_to):
        raise ValueError(f"{density} has no mass between `low` {low} and `high` {high}.")
    return Between(density, below, up_to)


def mass_up_to(density: Density, log_snr: Tensor) -> Tensor:
    """Return the mass of a density at or below ``log_snr``, any shape, by bisection for the quantile.

    Example:
        >>> from snrweights.densities import Normal
        >>> mass_up_to(Normal(0.0, 1.0), torch.tensor([-1.0, 0.0]))
        tensor([0.1587, 0.5000], dtype=torch.float64)
    """
    log_snr = exact(log_snr)
    low, high = torch.zeros_like(log_snr), torch.ones_like(log_snr)
    for _ in range(64):
        middle = (low + high) / 2
        below = density.icdf(middle) <= log_snr
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low
