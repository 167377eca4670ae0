"""A density over log-SNR laid over the timesteps of a schedule, from noise (quantile 0) to clean (quantile 1)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from snrweights.densities import Density, exact
from snrweights.drawn import Between, TableDensity
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


class ContinuousQuantiles:
    """Of a schedule on which every log-SNR has its timestep; timesteps are float32."""

    def __init__(self, schedule: Schedule, density: Density) -> None:
        if not hasattr(schedule, "timestep_of"):
            raise TypeError(f"`schedule` {type(schedule).__name__} has no `timestep_of(log_snr)` to draw from it with.")
        self.schedule, self.density = schedule, density
        self._low, self._high = density.icdf(inside(torch.tensor([0.0, 1.0], dtype=torch.float64))).tolist()
        try:
            schedule.check(self.timesteps(torch.tensor([0.0, 1.0], dtype=torch.float64)))
        except ValueError as error:
            raise ValueError(
                f"`density` {density} reaches beyond the schedule: {error} "
                "Cut it off with `snrweights.quantiles.within(density, low, high)`."
            ) from None

    def timesteps(self, u: Tensor) -> Tensor:
        """Return the timesteps (B,) at the quantiles ``u`` (B,)."""
        t: Tensor = self.schedule.timestep_of(self.density.icdf(inside(u)))
        return t.float()

    def log_mass(self, t: Tensor) -> Tensor:
        """Return ln p over log-SNR; a draw that rounding put beyond the last quantile counts as there."""
        log_snr = self.schedule.log_snr(t)
        near = (log_snr - log_snr.clamp(self._low, self._high)).abs() <= 1e-5 * log_snr.abs()
        return self.density.log_prob(torch.where(near, log_snr.clamp(self._low, self._high), log_snr))

    def mass_up_to(self, log_snr: Tensor) -> Tensor:
        """Return the mass at or below ``log_snr`` (n,)."""
        return mass_up_to(self.density, log_snr)

    def support(self) -> Tensor:
        """Return the timesteps at 1000 quantiles."""
        return self.timesteps((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)


class DiscreteQuantiles:
    """Of a table of timesteps: a continuous density gives each the mass that is nearest to it in log-SNR."""

    def __init__(self, schedule: DiscreteSchedule, density: Density) -> None:
        self._log_snr = schedule.log_snr_table
        steps = len(self._log_snr)
        if isinstance(density, TableDensity):
            upper = torch.arange(1, steps, dtype=torch.float64) / steps
        else:
            rising = self._log_snr.flip(0)
            upper = mass_up_to(density, (rising[1:] + rising[:-1]) / 2)
        ends = torch.cat((upper.new_zeros(1), upper, upper.new_ones(1)))
        self.probability = ends.diff().flip(0)  # (T,)
        self._tables = {upper.device: (upper, self.probability.log())}

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._tables:  # copied once: a copy from the host waits for the device
            upper, log_probability = next(iter(self._tables.values()))
            self._tables[device] = tuple(x.to(device, exact_dtype(device)) for x in (upper, log_probability))  # type: ignore[assignment]
        return self._tables[device]

    def timesteps(self, u: Tensor) -> Tensor:
        """Return the timesteps (B,) at the quantiles ``u`` (B,)."""
        return len(self._log_snr) - 1 - torch.bucketize(u, self._on(u.device)[0], right=True)

    def log_mass(self, t: Tensor) -> Tensor:
        """Return ln of the probability of timesteps (B,)."""
        return self._on(t.device)[1].index_select(0, t)

    def mass_up_to(self, log_snr: Tensor) -> Tensor:
        """Return the probability of the timesteps at or below ``log_snr`` (n,)."""
        return torch.where(self._log_snr <= log_snr[:, None], self.probability, 0.0).sum(1)

    def support(self) -> Tensor:
        """Return the timesteps with a probability above 0."""
        return self.probability.nonzero()[:, 0]


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
    if not below < up_to:
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
