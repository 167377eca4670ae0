"""What a model loses beyond the optimal loss, by bin of log-SNR: a tracker's statistics less a curve."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from snrweights.densities import Density
from snrweights.drawn import TableDensity
from snrweights.optimal.curve import OptimalLossCurve
from snrweights.predictions import log_error_ratio
from snrweights.statistics import LossStatistics

_PER_BIN = 64


@dataclass(frozen=True)
class GapByBin:
    """Loss, mean over dimensions, less the optimal loss, per log-SNR bin; NaN in an empty bin or outside the curve.

    Attributes:
        value: (bins,) the gap. Never negative in expectation; an estimate is, by its error.
        stderr: (bins,) its standard error: of the measured loss and of the curve; NaN where fewer than two losses were.
        floor: (bins,) the optimal loss.
        floor_stderr: (bins,) its standard error.
        mass: (bins,) the share of the noise levels.
    """

    value: Tensor
    stderr: Tensor
    floor: Tensor
    floor_stderr: Tensor
    mass: Tensor

    def mean(self) -> tuple[float, float]:
        """Return the mean over the bins that have a standard error, by their mass, and its standard error.

        The errors of the measured loss are independent between bins. Those of the curve are taken as one, since its
        levels share their draws. NaN if there is no such bin.
        """
        known = self.stderr.isfinite() & self.value.isfinite() & (self.mass > 0)
        if not bool(known.any()):
            return math.nan, math.nan
        mass = self.mass[known] / self.mass[known].sum()
        shared = self.floor_stderr[known]
        own = (mass**2 * (self.stderr[known] ** 2 - shared**2)).sum().clamp_min(0)
        return float((mass * self.value[known]).sum()), float((own + (mass * shared).sum() ** 2).sqrt())


def gap_by_bin(
    statistics: LossStatistics,
    curve: OptimalLossCurve,
    density: Density | None = None,
    prediction_type: str | None = None,
    sigma_data: float | None = None,
) -> GapByBin:
    """Return the gap of what a tracker saw, in the mean squared error of any target, mean over dimensions.

    The optimal loss of a bin is its mean over the noise levels drawn in it. A gap is converted from the tracker's unit
    to another target by the bin's means of R_y, with ||y - y_hat||² = R_y ||x0 - x0_hat||².

    Args:
        statistics: of a tracker with a unit, on the CPU.
        curve: of the data that the model was trained on, as it saw them.
        density: that noise levels were drawn from; None: uniform in log-SNR over each bin.
        prediction_type: the target; None: the tracker's unit.
        sigma_data: for ``edm``.

    Raises:
        ValueError: statistics without a unit.

    Example:
        >>> from snrweights.tracking import LossVarianceTracker
        >>> levels = torch.logspace(-4, 4, 33, base=torch.e, dtype=torch.float64)
        >>> curve = OptimalLossCurve(levels, levels**2, 0 * levels, ("pairs",) * 33, levels, {"dim": 4})
        >>> tracker = LossVarianceTracker(bins=2, low=-2, high=2, unit="epsilon")
        >>> tracker.update(torch.tensor([0.5, 0.75]), torch.tensor([-1.0, -1.0]))
        >>> gap_by_bin(tracker.compute(), curve).value  # 0.625 less J_eps / D = 1 / 4
        tensor([0.3750,    nan], dtype=torch.float64)
    """
    if statistics.unit is None:
        raise ValueError("`statistics` are of a tracker without a unit, got unit None; make it with `unit=`.")
    levels = _Levels(statistics.edges, density, curve)
    floor, relative = levels.floor(statistics.unit, sigma_data)
    ratio = levels.ratio(prediction_type or statistics.unit, sigma_data) / levels.ratio(statistics.unit, sigma_data)
    count = statistics.count.double()
    square = torch.where(count > 1, statistics.variance.double() / (count - 1), torch.nan)
    floor_stderr = ratio * floor * relative
    return GapByBin(
        value=ratio * (statistics.mean.double() - floor),
        stderr=((ratio**2 * square) + floor_stderr**2).sqrt(),
        floor=ratio * floor,
        floor_stderr=floor_stderr,
        mass=levels.mass,
    )


def floor_by_bin(
    edges: Tensor,
    curve: OptimalLossCurve,
    density: Density | None = None,
    prediction_type: str = "epsilon",
    sigma_data: float | None = None,
) -> Tensor:
    """Return the optimal loss (bins,), mean over dimensions, at the noise levels drawn in each bin; NaN outside.

    Args:
        edges: (bins + 1,) log-SNR, increasing; of a continuous density, what lies beyond the outermost is left out.
        curve: of the data.
        density: that noise levels are drawn from; None: uniform in log-SNR over each bin.
        prediction_type: the target.
        sigma_data: for ``edm``.

    Example:
        >>> levels = torch.logspace(-4, 4, 33, base=torch.e, dtype=torch.float64)
        >>> curve = OptimalLossCurve(levels, levels**2, 0 * levels, ("pairs",) * 33, levels, {"dim": 4})
        >>> floor_by_bin(torch.tensor([-20.0, -2.0, 0.0, 2.0]), curve)
        tensor([   nan, 0.2500, 0.2500], dtype=torch.float64)
    """
    return _Levels(edges, density, curve).floor(prediction_type, sigma_data)[0]


class _Levels:
    """Noise levels as they are drawn, by bin: the timesteps of a table, else 64 points a bin with the density there."""

    def __init__(self, edges: Tensor, density: Density | None, curve: OptimalLossCurve) -> None:
        edges = edges.double().cpu()
        self._bins, self._curve = len(edges) - 1, curve
        if isinstance(density, TableDensity):
            log_snr = density.log_snr.double().cpu()
            weights = torch.full_like(log_snr, 1 / len(log_snr))
        else:
            inside = (torch.arange(_PER_BIN, dtype=torch.float64) + 0.5) / _PER_BIN
            log_snr = (edges[:-1, None] + edges.diff()[:, None] * inside).flatten()
            weights = edges.diff().repeat_interleave(_PER_BIN) / _PER_BIN
            if density is None:
                weights = weights / weights.sum()
            else:
                low, high = density.icdf(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
                drawn = (log_snr >= low) & (log_snr <= high)
                weights = weights * torch.where(drawn, density.log_prob(log_snr).exp(), 0.0)
        self._place, self._weights = torch.bucketize(log_snr, edges[1:-1]), weights
        low, high = (-2 * curve.sigmas[[-1, 0]].log()).tolist()
        self._known = (log_snr >= low) & (log_snr <= high)
        self._log_snr = log_snr.clamp(low, high)
        self.mass = torch.zeros(self._bins, dtype=torch.float64).index_add_(0, self._place, weights)

    def floor(self, prediction_type: str, sigma_data: float | None) -> tuple[Tensor, Tensor]:
        """Return the optimal loss of each bin (bins,), and its relative standard error."""
        sigmas = (-self._log_snr / 2).exp().clamp(self._curve.sigmas[0], self._curve.sigmas[-1])
        values = self._curve.at(sigmas, prediction_type, "mean", sigma_data)
        relative = self._curve.stderr / self._curve.value.clamp_min(1e-300)
        stderr = np.interp(-self._log_snr.numpy() / 2, self._curve.sigmas.log().numpy(), relative.numpy())
        return (
            self._mean(torch.where(self._known, values, torch.nan)),
            self._mean(torch.from_numpy(stderr)),
        )

    def ratio(self, prediction_type: str, sigma_data: float | None) -> Tensor:
        """Return R_y of each bin (bins,)."""
        return self._mean(log_error_ratio(prediction_type, self._log_snr, sigma_data).exp())

    def _mean(self, values: Tensor) -> Tensor:
        return (
            torch.zeros(self._bins, dtype=torch.float64).index_add_(0, self._place, self._weights * values) / self.mass
        )
