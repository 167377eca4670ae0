"""The weighting of the optimal loss: what a data set itself says about each noise level."""

from __future__ import annotations

import math
import os
from typing import ClassVar, cast

import torch
from torch import Tensor

from snrweights.optimal.curve import OptimalLossCurve
from snrweights.weightings.base import Weighting, hyper, register_weighting

_STAR = 0.01  # of the variance: J at sigma_star


@register_weighting(
    "optimal_loss",
    target="sample",
    formula="w_x0 = scale min(1 / J, w_max) + N(ln sigma_hat; mu, var) [sigma_hat < sigma_star]",
    source="Xu et al. 2025, arXiv 2506.13763",
)
class OptimalLoss(Weighting):
    """``w_x0 = scale min(1 / J, w_max) + N(ln sigma_hat; mu, var) 1[sigma_hat < sigma_star]``, J the floor of the data.

    J is the optimal loss per dimension, the unit of a mean squared error. A model at the floor has the same loss,
    ``scale``, wherever the first term is not cut off; the second adds to the cleaner levels, where J vanishes.

    The paper's constants are not in what this was written from. The defaults are ours: mu and var are those of EDM's
    density, and sigma_star is the smallest level of the curve at which J exceeds 1 % of its limit, the data's variance.

    Args:
        curve: ``snrweights.optimal.OptimalLossCurve`` of the training data, or the path of its file.
        w_max: largest 1 / J, > 0.
        mu: centre of the second term, in ln sigma_hat.
        var: its variance, > 0.
        sigma_star: where it ends; None: see above.
        scale: of the first term, > 0; None: 1 / (w_max √(2 pi var)), so that both terms are at most as high.

    Raises:
        TypeError: no curve.
        ValueError: the file is not that of a curve; no level of it exceeds 1 %, and no ``sigma_star`` is given.

    Source: Xu et al. 2025, arXiv 2506.13763, for the form (second-hand).

    Example:
        >>> from snrweights.optimal import optimal_loss
        >>> curve = optimal_loss(torch.tensor([[-0.5], [0.5]]), [0.05, 0.1, 0.5, 1.0, 4.0], draws=2000)
        >>> weighting = OptimalLoss(curve, w_max=100.0, scale=1.0, sigma_star=0.1)
        >>> weighting.log_weight(torch.tensor([-4096.0, 4096.0])).exp()  # 1 / variance, and w_max
        tensor([  4.0000, 100.0000], dtype=torch.float64)
    """

    needs: ClassVar[tuple[str, ...]] = ("curve",)

    curve: OptimalLossCurve | str | os.PathLike[str] | None = hyper(None, number=False)
    w_max: float = hyper(100.0, above=0)
    mu: float = hyper(-1.2)
    var: float = hyper(1.44, above=0)
    sigma_star: float | None = hyper(None, above=0)
    scale: float | None = hyper(None, above=0)

    def __post_init__(self) -> None:
        curve = self.curve
        if isinstance(curve, (str, os.PathLike)):
            curve = OptimalLossCurve.load(curve)
        if not isinstance(curve, OptimalLossCurve):
            raise TypeError(
                f"`OptimalLoss(curve=...)` must be an OptimalLossCurve or the path of its file, got {curve!r}: make "
                "one of the training data with `snrweights optimal-loss`."
            )
        object.__setattr__(self, "curve", curve)
        super().__post_init__()
        if self.sigma_star is None:
            object.__setattr__(self, "sigma_star", _sigma_star(curve))
        if self.scale is None:
            object.__setattr__(self, "scale", 1 / (self.w_max * math.sqrt(2 * math.pi * self.var)))

    def log_weight(self, log_snr: Tensor) -> Tensor:
        """Return the logarithm of the sum."""
        curve, scale, star = (
            cast("OptimalLossCurve", self.curve),
            cast("float", self.scale),
            cast("float", self.sigma_star),
        )
        per_dimension = curve.log_value(log_snr) - math.log(curve.made["dim"])
        first = math.log(scale) - per_dimension.clamp_min(-math.log(self.w_max))
        log_sigma = log_snr / -2
        second = -((log_sigma - self.mu) ** 2) / (2 * self.var) - math.log(2 * math.pi * self.var) / 2
        return torch.logaddexp(first, torch.where(log_sigma < math.log(star), second, -math.inf))


def _sigma_star(curve: OptimalLossCurve) -> float:
    """Return the smallest level with J over 1 % of the variance."""
    over = curve.sigmas[curve.value > _STAR * curve.made["variance"]]
    if not len(over):
        raise ValueError(
            f"`OptimalLoss(sigma_star=...)` must be given: on no level of {curve} is J over {_STAR:.0%} of its limit."
        )
    return float(over[0])
