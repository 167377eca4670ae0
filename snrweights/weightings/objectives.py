"""Weightings defined by the objective w_KG over log-SNR: the weight is w_KG / p, with p the density of the draws.

``w_KG(log_snr)`` multiplies ``1/2 E ||eps - eps_hat||² d log_snr`` (Kingma & Gao 2023, arXiv 2303.00848): the same
objective whatever the density. Non-increasing in log-SNR, it is a non-negative mixture of ELBOs on noisy data.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from snrweights.densities import Density, Logistic, log_normal_sigma
from snrweights.densities import Laplace as LaplaceDensity
from snrweights.predictions import log_error_ratio, softplus
from snrweights.schedules import Schedule
from snrweights.weightings.base import Weighting, hyper, register_weighting

_KINGMA_GAO = "Kingma & Gao 2023, arXiv 2303.00848"


@register_weighting("elbo", target="objective", formula="w_KG = 1", source=_KINGMA_GAO)
class ELBO(Weighting):
    """The evidence lower bound: ``w_KG = 1``, hence ``w_eps = 1 / p``.

    Source: Kingma et al. 2021, arXiv 2107.00630; Kingma & Gao 2023, arXiv 2303.00848.

    Example:
        >>> ELBO().log_weight(torch.ones(1)).exp()
        tensor([1.])
    """

    def log_weight(self, log_snr: Tensor) -> Tensor:
        """Return 0."""
        return torch.zeros_like(log_snr)


@register_weighting("sigmoid", target="objective", formula="w_KG = sigmoid(bias - log_snr)", source=_KINGMA_GAO)
class Sigmoid(Weighting):
    """``w_KG = sigmoid(bias - log_snr)``, hence ``w_eps = sigmoid(bias - log_snr) / p``.

    Args:
        bias: log-SNR at which the objective is one half.

    Source: Kingma & Gao 2023, arXiv 2303.00848; Hoogeboom et al. 2024 (SiD2), arXiv 2410.19324.

    Example:
        >>> Sigmoid(bias=0.0).log_weight(torch.zeros(1)).exp()
        tensor([0.5000])
    """

    bias: float = hyper(0.0)

    def log_weight(self, log_snr: Tensor) -> Tensor:
        """Return ln sigmoid(bias - log_snr)."""
        return -softplus(log_snr - self.bias)


@register_weighting(
    "auto",
    target="objective",
    formula="w_KG = sigmoid(-log_snr - ln data_variance)",
    source=f"derived in examples/guides/samplers.md; its shape: {_KINGMA_GAO}",
)
class Auto(Weighting):
    """``w_KG = sigmoid(-log_snr - ln data_variance)``: the ``sigmoid`` objective, its bias measured instead of chosen.

    For Gaussian data of variance v in each direction, an error of x0 made at noise level s = sigma_hat reaches the
    samples of the reverse ODE shrunk to v / (v + s²) of its square. In errors of epsilon, s² smaller, that is
    w_KG ∝ v s² / (v + s²): the sigmoid, up to v. On EDM's network with sigma_data² = v the weight is constant where
    log-SNR is drawn from the logistic density about -ln v, and there it asks to be drawn.

    Args:
        data_variance: ``snrweights.data_variance`` of the data as the network sees it, > 0; default: the square of the
            schedule's sigma_data.

    Source: derived, see examples/guides/samplers.md; the objective's shape: Kingma & Gao 2023, arXiv 2303.00848.

    Example:
        >>> Auto(data_variance=0.25).log_weight(torch.tensor([0.25]).log().neg()).exp()
        tensor([0.5000])
    """

    data_variance: float | None = hyper(None, above=0)
    rule: ClassVar[str | None] = "gradient"
    _unknown: ClassVar[str] = (
        "`Auto(data_variance=...)` must be given on a schedule without sigma_data, got None: measure it with "
        "`snrweights.data_variance(data)`."
    )

    def for_draws(self, schedule: Schedule, density: Density) -> Weighting:
        """Fill in sigma_data² of the schedule.

        Raises:
            ValueError: neither is known.
        """
        del density
        if self.data_variance is not None:
            return self
        if schedule.sigma_data is None:
            raise ValueError(self._unknown)
        return dataclasses.replace(self, data_variance=schedule.sigma_data**2)

    def own_density(self, prediction_type: str) -> Density | None:
        """Return the logistic density for EDM's network: with sigma_data² = data_variance its weight is constant."""
        if prediction_type != "edm" or self.data_variance is None:
            return None
        return Logistic(-math.log(self.data_variance))

    def log_weight(self, log_snr: Tensor) -> Tensor:
        """Return ln sigmoid(-log_snr - ln data_variance)."""
        if self.data_variance is None:
            raise ValueError(self._unknown)
        return -softplus(log_snr + math.log(self.data_variance))


@register_weighting("iddpm", target="objective", formula="w_KG = sech(log_snr / 2)", source=_KINGMA_GAO)
class IDDPM(Weighting):
    """``w_KG = sech(log_snr / 2)``: the objective of iDDPM, ``ddpm`` drawn uniformly on the cosine schedule.

    Source: Nichol & Dhariwal 2021, arXiv 2102.09672; in this form Kingma & Gao 2023, arXiv 2303.00848.

    Example:
        >>> IDDPM().log_weight(torch.zeros(1)).exp()
        tensor([1.])
    """

    def log_weight(self, log_snr: Tensor) -> Tensor:
        """Return ln sech(log_snr / 2)."""
        half = log_snr.abs() / 2
        return math.log(2) - half - softplus(-2 * half)


@register_weighting("flow", target="objective", formula="w_KG = exp(-log_snr / 2)", source=_KINGMA_GAO)
class Flow(Weighting):
    """``w_KG = exp(-log_snr / 2)``: the objective of flow matching with uniform time on the straight path.

    Source: Kingma & Gao 2023, arXiv 2303.00848; Lipman et al. 2022, arXiv 2210.02747.

    Example:
        >>> Flow().log_weight(torch.zeros(1)).exp()
        tensor([1.])
    """

    def log_weight(self, log_snr: Tensor) -> Tensor:
        """Return -log_snr / 2."""
        return -log_snr / 2


@register_weighting("indi", target="objective", formula="w_KG = exp(-log_snr) sech²(log_snr / 4)", source=_KINGMA_GAO)
class InDI(Weighting):
    """``w_KG = exp(-log_snr) sech²(log_snr / 4)``: the objective of inversion by direct iteration.

    Source: Delbracio & Milanfar 2023, arXiv 2303.11435; in this form Kingma & Gao 2023, arXiv 2303.00848.

    Example:
        >>> InDI().log_weight(torch.zeros(1)).exp()
        tensor([1.])
    """

    def log_weight(self, log_snr: Tensor) -> Tensor:
        """Return -log_snr + 2 ln sech(log_snr / 4)."""
        quarter = log_snr.abs() / 4
        return -log_snr + 2 * (math.log(2) - quarter - softplus(-2 * quarter))


@register_weighting(
    "laplace",
    target="objective",
    formula="w_KG = exp(-|log_snr - loc| / scale) / (2 scale)",
    source="Hang & Gu 2024, arXiv 2407.03297",
)
class Laplace(Weighting):
    """``w_KG`` = the Laplace density over log-SNR.

    Args:
        loc: its centre.
        scale: its width, > 0.

    Source: Hang & Gu 2024, "Improved Noise Schedule for Diffusion Training", arXiv 2407.03297, as an objective.

    Example:
        >>> Laplace().log_weight(torch.zeros(1)).exp()
        tensor([1.], dtype=torch.float64)
    """

    loc: float = hyper(0.0)
    scale: float = hyper(0.5, above=0)

    def log_weight(self, log_snr: Tensor) -> Tensor:
        """Return the log-density."""
        return LaplaceDensity(self.loc, self.scale).log_prob(log_snr)


@register_weighting(
    "edm_monotonic",
    target="objective",
    formula="w_KG = EDM's, constant at its maximum below log_snr = -3.308",
    source=_KINGMA_GAO,
)
class EDMMonotonic(Weighting):
    """EDM's objective made monotone: w_KG of EDM, held at its maximum for log-SNR below the maximum's place.

    EDM's w_KG is its own density, ln sigma ~ N(-1.2, 1.2²), times its weight 1 + sigma_hat² / sigma_data², with
    sigma_data = 0.5: largest at sigma_hat = 5.23, log-SNR -3.308.

    Source: Kingma & Gao 2023, arXiv 2303.00848; Karras et al. 2022, arXiv 2206.00364.

    Example:
        >>> low = EDMMonotonic().log_weight(torch.tensor([-9.0, -4.0], dtype=torch.float64))
        >>> bool(low[0] == low[1])
        True
    """

    def log_weight(self, log_snr: Tensor) -> Tensor:
        """Return ln p_EDM + ln w_eps at max(log_snr, the maximum's place)."""
        return _log_edm_objective(log_snr.clamp(min=_EDM_PEAK))


def _log_edm_objective(log_snr: Tensor) -> Tensor:
    return log_normal_sigma().log_prob(log_snr) + log_error_ratio("edm", log_snr, 0.5) - log_snr


def _edm_peak() -> float:
    """Find where d/dl of EDM's log objective, -(l - 2.4) / 2.4² - 4 / (e^l + 4), vanishes."""
    low, high = -6.0, 0.0
    for _ in range(60):
        middle = (low + high) / 2
        rising = -(middle - 2.4) / 2.4**2 - 4 / (math.exp(middle) + 4) > 0
        low, high = (middle, high) if rising else (low, middle)
    return low


_EDM_PEAK = _edm_peak()
