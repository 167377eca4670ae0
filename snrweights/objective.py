"""What a weight, a prediction type and a density together optimise: w_KG over log-SNR."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from snrweights.densities import Density
from snrweights.drawn import mean_under
from snrweights.losses import Method
from snrweights.predictions import LIMIT
from snrweights.schedulers import as_schedule
from snrweights.weightings.base import get_weighting
from snrweights.weightings.bound import WeightCurve

MONOTONE_TOLERANCE = 1e-4  # of the maximum: above the rounding of a float32 table, far below any real rise


@dataclass(frozen=True)
class Objective:
    """The Kingma-Gao objective of a training configuration.

    Attributes:
        log_snr: (N,) float64, ascending, finite.
        w_kg: (N,) ``p(log_snr) w_eps(log_snr)``, scaled to a maximum of 1.
        negative_mass: ``∫ max(dw_KG/dl, 0) dl`` with the maximum at 1: how far the objective is from being a
            non-negative mixture of ELBOs; 0 when it is one.
        mean_weight: average of the multiplier on the model's own target under the density: the loss scale.
        headroom: share of draws with SNR above ``headroom_snr``, where damping has room to act.
        headroom_snr: that threshold.
        cubed_weight: ``E[w_eps³]``, 1 for ``ddpm``. One SGD step's noise, (eta²/2) Tr(H Sigma_g), scales as w * w² if
            curvature and gradient covariance scale as they do at weight 1: an interpretation, not a theorem.
        cubed_weight_at_equal_mean: ``E[w_eps³] / E[w_eps]³``, the same without the change of loss scale; >= 1.

    Example:
        >>> round(objective("linear", "ddpm", prediction_type="epsilon").cubed_weight, 9)
        1.0
    """

    log_snr: Tensor
    w_kg: Tensor
    negative_mass: float
    mean_weight: float
    headroom: float
    headroom_snr: float
    cubed_weight: float
    cubed_weight_at_equal_mean: float

    @property
    def monotone(self) -> bool:
        """Whether w_KG does not increase with log-SNR (Kingma & Gao 2023, arXiv 2303.00848)."""
        return self.negative_mass <= MONOTONE_TOLERANCE


def log_objective(curve: WeightCurve, log_snr: Tensor) -> Tensor:
    """Return ln w_KG = ln p + ln w_eps at ``log_snr``, any shape, float64; -inf where nothing is drawn.

    Example:
        >>> curve = get_weighting("sigmoid").over_log_snr("flow")
        >>> log_objective(curve, torch.zeros(1)).exp()
        tensor([0.5000], dtype=torch.float64)
    """
    log_p = curve.density.log_prob(log_snr.clamp(-LIMIT, LIMIT))
    # where nothing is drawn the objective is 0, also for a weight that would be infinite there
    return torch.where(log_p == -math.inf, -math.inf, log_p + curve.log_weight(log_snr, "epsilon"))


def objective(
    schedule: Any,
    method: Method = "native",
    *,
    prediction_type: str | None = None,
    density: Density | str | None = None,
    clamp_max: float | None = None,
    headroom_snr: float = 5.0,
    **hp: Any,
) -> Objective:
    """Compute the objective ``1/2 ∫ w_KG(l) E||eps - eps_hat||² dl`` that a configuration optimises.

    Args:
        schedule: whatever ``as_schedule`` reads.
        method: as for ``loss_weight``; ``"native"`` is what an unweighted script does.
        prediction_type: as for ``loss_weight``.
        density: as for ``loss_weight``.
        clamp_max: as for ``loss_weight``.
        headroom_snr: SNR above which draws count as headroom for damping (5 is Min-SNR's gamma, 1 / 0.2).
        **hp: hyperparameters of the method.

    Returns:
        An ``Objective``. A timestep at infinite log-SNR has no place on its axis and is left out of ``w_kg``.

    Raises:
        ValueError: as ``loss_weight``, or an objective without any mass on the schedule.

    Source: Kingma & Gao 2023, arXiv 2303.00848; headroom and cubed weight: Li 2026, arXiv 2606.13433.

    Example:
        >>> objective("squaredcos_cap_v2", "min_snr", prediction_type="epsilon").monotone
        False
    """
    if not headroom_snr > 0:
        raise ValueError(f"`headroom_snr` must be > 0, got {headroom_snr!r}.")
    schedule = as_schedule(schedule)
    weighting = get_weighting(method, **hp)
    curve = weighting.over_log_snr(schedule, prediction_type=prediction_type, density=density, clamp_max=clamp_max)
    log_snr = schedule.log_snr(schedule.grid())
    log_snr = log_snr[log_snr.isfinite()].sort().values
    w_kg = log_objective(curve, log_snr).exp()
    if not 0 < float(w_kg.max()) < math.inf:
        raise ValueError(f"{curve.weighting} under {curve.density} has no finite objective on {schedule}.")
    w_kg = w_kg / w_kg.max()

    def epsilon_weight(log_snr: Tensor) -> Tensor:
        return curve.log_weight(log_snr, "epsilon").exp()

    cubed = mean_under(curve.density, lambda log_snr: epsilon_weight(log_snr) ** 3)
    return Objective(
        log_snr=log_snr,
        w_kg=w_kg,
        negative_mass=float(w_kg.diff().clamp(min=0).sum()),
        mean_weight=curve.mean(),
        headroom=mean_under(curve.density, lambda log_snr: (log_snr > math.log(headroom_snr)).double()),
        headroom_snr=headroom_snr,
        cubed_weight=cubed,
        cubed_weight_at_equal_mean=cubed / mean_under(curve.density, epsilon_weight) ** 3,
    )
