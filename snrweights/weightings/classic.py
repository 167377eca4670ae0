"""Weightings with a formula in SNR alone."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from snrweights.densities import Density
from snrweights.predictions import log_error_ratio, softplus
from snrweights.schedules import Schedule
from snrweights.weightings.base import Weighting, hyper, register_weighting


@register_weighting("ddpm", target="epsilon", formula="w_eps = 1", source="Ho et al. 2020, arXiv 2006.11239")
class DDPM(Weighting):
    """The simple loss of DDPM, ``w_eps = 1``, ``w_x0 = SNR``, whatever the model predicts.

    Source: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", L_simple, arXiv 2006.11239.

    Example:
        >>> DDPM().log_weight(torch.zeros(1)).exp()
        tensor([1.])
    """

    def log_weight(self, log_snr: Tensor) -> Tensor:
        """Return 0."""
        return torch.zeros_like(log_snr)


@register_weighting("native", target="native", formula="w = 1 on the model's own target", source="every plain script")
class Native(Weighting):
    """Weight 1 on the MSE of the model's own target, whatever it is: what a script without weighting does.

    It is ``ddpm`` for epsilon, ``snr_plus_one`` for v, and ``edm`` for the network F.

    Source: common practice.

    Example:
        >>> Native().over_log_snr("flow")(torch.ones(1))
        tensor([1.])
    """

    def log_weight(self, log_snr: Tensor) -> Tensor:
        """Return 0."""
        return torch.zeros_like(log_snr)


@register_weighting(
    "snr_plus_one", target="v_prediction", formula="w_x0 = 1 + SNR", source="Salimans & Ho 2022, arXiv 2202.00512"
)
class SNRPlusOne(Weighting):
    """``w_x0 = 1 + SNR``, ``w_eps = 1 + 1 / SNR``: the plain MSE of v.

    k-diffusion's ``karras`` with sigma_data = 1 is the same.

    Source: Salimans & Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models", arXiv 2202.00512.

    Example:
        >>> SNRPlusOne().log_weight(torch.zeros(1)).exp()
        tensor([1.])
    """

    def log_weight(self, log_snr: Tensor) -> Tensor:
        """Return 0, the log-weight on v."""
        return torch.zeros_like(log_snr)


@register_weighting(
    "truncated_snr", target="sample", formula="w_x0 = max(SNR, 1)", source="Salimans & Ho 2022, arXiv 2202.00512"
)
class TruncatedSNR(Weighting):
    """``w_x0 = max(SNR, 1)``, ``w_eps = max(1, 1 / SNR)``.

    Source: Salimans & Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models", arXiv 2202.00512.

    Example:
        >>> TruncatedSNR().log_weight(torch.tensor([0.5]).log()).exp()
        tensor([1.])
    """

    def log_weight(self, log_snr: Tensor) -> Tensor:
        """Return ln max(SNR, 1)."""
        return log_snr.clamp(min=0)


@register_weighting(
    "p2", target="epsilon", formula="w_eps = (k + SNR)^-gamma", source="Choi et al. 2022, arXiv 2204.00227"
)
class P2(Weighting):
    """P2: ``w_eps = (k + SNR)^-gamma``.

    The official code multiplies any target by this; OneTrainer uses 2 + SNR for v: see
    ``snrweights.weightings.parity``.

    Args:
        k: SNR at which the weight starts to fall, > 0.
        gamma: its power, >= 0 in the paper; any finite number here.

    Source: Choi et al. 2022, "Perception Prioritized Training of Diffusion Models", arXiv 2204.00227.

    Example:
        >>> P2().log_weight(torch.zeros(1)).exp()
        tensor([0.5000])
    """

    k: float = hyper(1.0, above=0)
    gamma: float = hyper(1.0)

    def log_weight(self, log_snr: Tensor) -> Tensor:
        """Return -gamma ln(k + SNR)."""
        return -self.gamma * torch.logaddexp(log_snr, torch.full_like(log_snr, math.log(self.k)))


@register_weighting("debiased", target="epsilon", formula="w_eps = SNR^-1/2", source="Yu et al. 2023, arXiv 2310.08442")
class Debiased(Weighting):
    """Debiased estimation: ``w_eps = 1 / √SNR``, ``w_x0 = √SNR``.

    kohya-ss clamps SNR at 1000 and uses 1 / (SNR + 1) for v, which is not this weight converted
    (√SNR / (1 + SNR)); see ``snrweights.weightings.parity``.

    Source: Yu et al. 2023, "Debias the Training of Diffusion Models", arXiv 2310.08442.

    Example:
        >>> Debiased().log_weight(torch.tensor([4.0]).log()).exp()
        tensor([0.5000])
    """

    def log_weight(self, log_snr: Tensor) -> Tensor:
        """Return -ln(SNR) / 2."""
        return -log_snr / 2


@register_weighting(
    "edm", target="sample", formula="w_x0 = SNR + 1 / sigma_data²", source="Karras et al. 2022, arXiv 2206.00364"
)
class EDM(Weighting):
    """EDM: ``w_x0 = (sigma_hat² + sigma_data²) / (sigma_hat sigma_data)²``, weight 1 on the network F.

    Args:
        sigma_data: standard deviation of the data, > 0; default: the schedule's, or 0.5 where it states none.

    Source: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv 2206.00364.

    Example:
        >>> EDM(sigma_data=0.5).log_weight(torch.zeros(1)).exp()
        tensor([5.])
    """

    sigma_data: float | None = hyper(None, above=0)

    def for_draws(self, schedule: Schedule, density: Density) -> Weighting:
        """Fill in the schedule's sigma_data."""
        del density
        return self if self.sigma_data is not None else dataclasses.replace(self, sigma_data=schedule.sigma_data or 0.5)

    def log_weight(self, log_snr: Tensor) -> Tensor:
        """Return ln(SNR + 1 / sigma_data²)."""
        return log_error_ratio("edm", log_snr, self.sigma_data or 0.5)


@register_weighting(
    "sd3_sigma_sqrt", target="sample", formula="w_x0 = s^-2, s = 1 / (1 + √SNR)", source="diffusers' SD3 scripts"
)
class SD3SigmaSqrt(Weighting):
    """diffusers' ``sigma_sqrt``: s^-2 of the flow time s, despite its name, on the **x0** MSE.

    train_dreambooth_sd3 preconditions its output by default, so that the scheme multiplies an x0 loss: s^-2 is then the
    plain MSE of the velocity. On a raw velocity the scripts apply the same number, which counts it twice: see
    ``snrweights.weightings.parity``, ``diffusers_sd3_sigma_sqrt_on_velocity``.

    Source: diffusers, ``compute_loss_weighting_for_sd3``; the SD3 paper is Esser et al. 2024, arXiv 2403.03206.

    Example:
        >>> SD3SigmaSqrt().log_weight(torch.zeros(1)).exp()
        tensor([4.])
    """

    def log_weight(self, log_snr: Tensor) -> Tensor:
        """Return 2 ln(1 + √SNR)."""
        return log_error_ratio("flow_prediction", log_snr)


@register_weighting(
    "sd3_cosmap",
    target="sample",
    formula="w_x0 = 2 / (pi (1 - 2 s + 2 s²)), s = 1 / (1 + √SNR)",
    source="diffusers' SD3 scripts; Esser et al. 2024, arXiv 2403.03206",
)
class SD3CosMap(Weighting):
    """diffusers' ``cosmap``: 2 / (pi (1 - 2 s + 2 s²)) of the flow time s, on the **x0** MSE, as ``sd3_sigma_sqrt``.

    Source: diffusers, ``compute_loss_weighting_for_sd3``; Esser et al. 2024, arXiv 2403.03206.

    Example:
        >>> round(SD3CosMap().log_weight(torch.zeros(1, dtype=torch.float64)).exp().item(), 6)  # 4 / pi
        1.27324
    """

    def log_weight(self, log_snr: Tensor) -> Tensor:
        """Return ln(2/pi) - ln((1 - s)² + s²)."""
        return math.log(2 / math.pi) + 2 * softplus(log_snr / 2) - softplus(log_snr)
