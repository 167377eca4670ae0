"""Draw noise levels where the model is furthest above the optimal loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from snrweights.importance import Rule
from snrweights.optimal.curve import OptimalLossCurve
from snrweights.predictions import LIMIT, log_error_ratio
from snrweights.quantiles import quantiles
from snrweights.statistics import LossStatistics
from snrweights.weightings.bound import BoundWeighting

_POINTS = 4000  # quantiles of the density


def gap_rule(curve: OptimalLossCurve, weight: BoundWeighting) -> Rule:
    """Return the rule q ∝ p w (L - J) of ``ImportanceSampler``: p times the weighted gap to the optimal loss.

    With p uniform in ln sigma_hat that is the published density. There it is not corrected for: losses keep the weight
    w, so that the objective is that of w² (L - J), which is ``mode="uncorrected"``. ``mode="resample"`` keeps the
    objective of p and w. The gap is smoothed as all evidence of a sampler: old losses fade.

    Args:
        curve: of the training data; beyond its levels it is continued as ``OptimalLossCurve.log_value`` says.
        weight: the weighting as it is bound for training; losses are of its target, means over dimensions.

    Source: Xu et al. 2025, arXiv 2506.13763 (second-hand).

    Example:
        >>> from snrweights import EDMSchedule, ImportanceSampler, get_weighting
        >>> levels = torch.logspace(-2, 2, 41, dtype=torch.float64)
        >>> floor = levels**2 / (levels**2 + 0.25) / 4
        >>> curve = OptimalLossCurve(levels, floor, 0 * levels, ("pairs",) * 41, levels, {"dim": 1, "variance": 0.25})
        >>> weight = get_weighting("edm").bind(EDMSchedule(), prediction_type="sample", density="log_uniform")
        >>> sampler = ImportanceSampler(
        ...     EDMSchedule(), gap_rule(curve, weight), density="log_uniform", bins=2, warm_up=1, refresh_every=1
        ... )
        >>> sampler.update(torch.tensor([0.05, 3.0]), torch.tensor([2.0, 5.0]))  # w J = 1: gaps of 1 and 4
        >>> _ = sampler.draw(1)
        >>> sampler.probabilities()[1]  # from noise to clean, a tenth of it uniform
        tensor([0.7700, 0.2300], dtype=torch.float64)
    """
    u = (torch.arange(_POINTS, dtype=torch.float64) + 0.5) / _POINTS
    drawn, schedule = weight.curve, weight.schedule
    log_snr = schedule.log_snr(quantiles(schedule, drawn.density).timesteps(u)).clamp(-LIMIT, LIMIT)
    ratio = log_error_ratio(drawn.prediction_type, log_snr, drawn.sigma_data)
    floor = drawn.log_weight(log_snr) + curve.log_value(log_snr) + ratio - math.log(curve.made["dim"])
    return Rule(WeightedGap(log_snr, floor.exp()), "the mean gap to the optimal loss")


class WeightedGap:
    """E[w L] - E[w J] per bin, 0 where it is negative.

    Args:
        log_snr: (n,) noise levels of equal probability.
        floor: (n,) w J there.
    """

    def __init__(self, log_snr: Tensor, floor: Tensor) -> None:
        self._log_snr, self._floor = log_snr, floor

    def __call__(self, statistics: LossStatistics) -> Tensor:
        """Return the gap (bins,); NaN in a bin without losses or noise levels."""
        if self._floor.device != statistics.mean.device:
            self._log_snr, self._floor = (x.to(statistics.mean) for x in (self._log_snr, self._floor))
        place = torch.bucketize(self._log_snr, statistics.edges[1:-1].to(self._log_snr))
        floor, count = (
            torch.zeros_like(statistics.mean).index_add_(0, place, x.to(statistics.mean))
            for x in (self._floor, torch.ones_like(self._floor))
        )
        return (statistics.mean - floor / count).clamp_min(0)
