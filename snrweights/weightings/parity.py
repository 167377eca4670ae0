"""What other projects multiply their losses by, NaN and inf included, to reproduce a run made elsewhere.

Not registered with the package's own weightings: most depend on the target by branching instead of by algebra. Each
multiplies the MSE of the target in its name, or of any target::

    from snrweights.weightings import parity
    loss_weight(t, scheduler, parity.get("diffusers_min_snr_v_plus_one", gamma=5.0), prediction_type="v_prediction")
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from snrweights.weightings.base import W, Weighting, build, hyper, register_weighting

_PARITY: dict[str, type[Weighting]] = {}


class ParityWeighting(Weighting):
    """A formula in SNR as another project writes it; SNR = 0 gives whatever it gives there."""

    refuses_infinities = False

    @abstractmethod
    def weight(self, snr: Tensor) -> Tensor:
        """Return the project's weight at ``snr``, any shape."""

    def log_weight(self, log_snr: Tensor) -> Tensor:
        """Return the logarithm of the project's weight."""
        return self.weight(log_snr.exp()).log()


def _parity(name: str, formula: str, source: str) -> Callable[[W], W]:
    return register_weighting(name, target="native", formula=formula, source=source, registry=_PARITY)


def get(name: str, **hp: Any) -> Weighting:
    """Return a parity variant by name.

    Raises:
        ValueError: unknown name or hyperparameter; the message lists the choices.

    Example:
        >>> get("pixart_min_snr_v", gamma=5.0).weight(torch.tensor([0.0]))
        tensor([1.])
    """
    return build(_PARITY, name, hp)


def names() -> list[str]:
    """Return the names of the parity variants.

    Example:
        >>> "kohya_debiased_v" in names()
        True
    """
    return list(_PARITY)


@_parity("diffusers_min_snr_epsilon", "min(SNR, gamma) / SNR", "diffusers train_text_to_image; kohya-ss; lucidrains")
class DiffusersMinSNREpsilon(ParityWeighting):
    """``min(SNR, gamma) / SNR``: NaN at zero terminal SNR."""

    gamma: float = hyper(5.0, above=0)

    def weight(self, snr: Tensor) -> Tensor:
        """Return the weight at ``snr``."""
        return snr.clamp(max=self.gamma) / snr


@_parity("diffusers_min_snr_v", "min(SNR, gamma) / (SNR + 1)", "diffusers train_text_to_image; kohya-ss; OneTrainer")
class DiffusersMinSNRV(ParityWeighting):
    """Form A: ``min(SNR, gamma) / (SNR + 1)``, the same as ``min_snr`` for v."""

    gamma: float = hyper(5.0, above=0)

    def weight(self, snr: Tensor) -> Tensor:
        """Return the weight at ``snr``."""
        return snr.clamp(max=self.gamma) / (snr + 1)


@_parity(
    "diffusers_min_snr_v_plus_one",
    "min(SNR, gamma) / SNR + 1",
    "diffusers train_dreambooth_lora_sdxl and advanced scripts; invoke-training",
)
class DiffusersMinSNRVPlusOne(ParityWeighting):
    """Form B: ``min(SNR, gamma) / SNR + 1``: NaN at zero terminal SNR, and never below 1."""

    gamma: float = hyper(5.0, above=0)

    def weight(self, snr: Tensor) -> Tensor:
        """Return the weight at ``snr``."""
        return snr.clamp(max=self.gamma) / snr + 1


@_parity("pixart_min_snr_v", "min(SNR + 1, gamma) / (SNR + 1)", "diffusers PixArt controlnet script")
class PixArtMinSNRV(ParityWeighting):
    """Form C: ``min(SNR + 1, gamma) / (SNR + 1)``."""

    gamma: float = hyper(5.0, above=0)

    def weight(self, snr: Tensor) -> Tensor:
        """Return the weight at ``snr``."""
        return (snr + 1).clamp(max=self.gamma) / (snr + 1)


@_parity("official_vmin_snr", "min(SNR, gamma) / (SNR + 1), 1 where SNR = 0", "TiankaiHang/Min-SNR-Diffusion-Training")
class OfficialVMinSNR(ParityWeighting):
    """Form D: form A with weight 1 at zero terminal SNR."""

    gamma: float = hyper(5.0, above=0)

    def weight(self, snr: Tensor) -> Tensor:
        """Return the weight at ``snr``."""
        return torch.where(snr == 0, 1.0, snr.clamp(max=self.gamma) / (snr + 1))


@_parity("any_target_min_snr", "min(gamma / SNR, 1) on any target", "ai-toolkit; EveryDream2")
class AnyTargetMinSNR(ParityWeighting):
    """Form E: ``min(gamma / SNR, 1)`` whatever the target."""

    gamma: float = hyper(5.0, above=0)

    def weight(self, snr: Tensor) -> Tensor:
        """Return the weight at ``snr``."""
        return (self.gamma / snr).clamp(max=1)


@_parity("kohya_debiased_epsilon", "1 / sqrt(min(SNR, 1000))", "kohya-ss; OneTrainer")
class KohyaDebiasedEpsilon(ParityWeighting):
    """``1 / √min(SNR, 1000)``: inf at zero terminal SNR."""

    def weight(self, snr: Tensor) -> Tensor:
        """Return the weight at ``snr``."""
        return 1 / snr.clamp(max=1000).sqrt()


@_parity("kohya_debiased_v", "1 / (min(SNR, 1000) + 1)", "kohya-ss")
class KohyaDebiasedV(ParityWeighting):
    """``1 / (min(SNR, 1000) + 1)``, which is ``p2`` and not ``debiased`` converted."""

    def weight(self, snr: Tensor) -> Tensor:
        """Return the weight at ``snr``."""
        return 1 / (snr.clamp(max=1000) + 1)


@_parity("onetrainer_debiased_v", "1 / sqrt(min(SNR, 1000) + 1)", "OneTrainer")
class OneTrainerDebiasedV(ParityWeighting):
    """``1 / √(min(SNR, 1000) + 1)``."""

    def weight(self, snr: Tensor) -> Tensor:
        """Return the weight at ``snr``."""
        return 1 / (snr.clamp(max=1000) + 1).sqrt()


@_parity("kohya_scale_v_like_epsilon", "min(SNR, 1000) / (min(SNR, 1000) + 1)", "kohya-ss")
class KohyaScaleVLikeEpsilon(ParityWeighting):
    """``SNR / (SNR + 1)`` with SNR clamped at 1000: ``ddpm`` for v."""

    def weight(self, snr: Tensor) -> Tensor:
        """Return the weight at ``snr``."""
        snr = snr.clamp(max=1000)
        return snr / (snr + 1)


@_parity("kohya_add_v_like_loss", "1 + factor (SNR + 1) / SNR, SNR clamped at 1000", "kohya-ss, v_pred_like_loss")
class KohyaAddVLikeLoss(ParityWeighting):
    """``1 + factor / (SNR / (SNR + 1))``: an epsilon loss with a part of v loss added; inf at zero terminal SNR."""

    factor: float = hyper(0.1, above=0)

    def weight(self, snr: Tensor) -> Tensor:
        """Return the weight at ``snr``."""
        snr = snr.clamp(max=1000)
        return 1 + self.factor * (snr + 1) / snr


@_parity("official_p2", "(k + SNR)^-gamma on any target", "jychoi118/P2-weighting; OneTrainer for epsilon")
class OfficialP2(ParityWeighting):
    """``(k + SNR)^-gamma``, whatever the target."""

    k: float = hyper(1.0, above=0)
    gamma: float = hyper(1.0)

    def weight(self, snr: Tensor) -> Tensor:
        """Return the weight at ``snr``."""
        return (self.k + snr) ** -self.gamma


@_parity("onetrainer_p2_v", "(2 + SNR)^-gamma", "OneTrainer")
class OneTrainerP2V(ParityWeighting):
    """``(2 + SNR)^-gamma``."""

    gamma: float = hyper(1.0)

    def weight(self, snr: Tensor) -> Tensor:
        """Return the weight at ``snr``."""
        return (2 + snr) ** -self.gamma


@_parity(
    "simpletuner_soft_min_snr", "(SNR + 1) / (SNR + 2)²", "SimpleTuner compute_snr(use_soft_min=True), never called"
)
class SimpleTunerSoftMinSNR(ParityWeighting):
    """``s² / (s² + 1)²`` with s² = 1 / (SNR + 1), the VP noise variance where EDM's belongs."""

    def weight(self, snr: Tensor) -> Tensor:
        """Return the weight at ``snr``."""
        return (snr + 1) / (snr + 2) ** 2


@_parity("kdiffusion_soft_min_snr", "(s sd)² / (s² + sd²)², s² = 1 / SNR, on F", "k-diffusion")
class KDiffusionSoftMinSNR(ParityWeighting):
    """``(s sd)² / (s² + sd²)²`` on the network F: ``soft_min_snr`` with gamma = 1 / sd²."""

    sigma_data: float = hyper(1.0, above=0)

    def weight(self, snr: Tensor) -> Tensor:
        """Return the weight at ``snr``."""
        variance, data = 1 / snr, self.sigma_data**2
        return variance * data / (variance + data) ** 2


@_parity("kdiffusion_snr", "sd² / (s² + sd²), s² = 1 / SNR, on F", "k-diffusion")
class KDiffusionSNR(ParityWeighting):
    """``sd² / (s² + sd²)`` on the network F: ``ddpm``."""

    sigma_data: float = hyper(1.0, above=0)

    def weight(self, snr: Tensor) -> Tensor:
        """Return the weight at ``snr``."""
        data = self.sigma_data**2
        return data / (1 / snr + data)


@_parity("stable_cascade_min_snr_plus_one", "min(SNR + 1, gamma) on x0", "StableCascade gdf")
class StableCascadeMinSNRPlusOne(ParityWeighting):
    """``min(SNR + 1, gamma)`` on the x0 error."""

    gamma: float = hyper(5.0, above=0)

    def weight(self, snr: Tensor) -> Tensor:
        """Return the weight at ``snr``."""
        return (snr + 1).clamp(max=self.gamma)


@_parity("diffusers_sd3_sigma_sqrt_on_velocity", "s^-2 on the velocity, s = 1 / (1 + √SNR)", "diffusers' SD3 scripts")
class SD3SigmaSqrtOnVelocity(ParityWeighting):
    """``s^-2`` on a raw velocity (``--precondition_outputs 0``): the plain velocity MSE weighted a second time."""

    def weight(self, snr: Tensor) -> Tensor:
        """Return the weight at ``snr``."""
        return (1 + snr.sqrt()) ** 2


@_parity("diffusers_sd3_cosmap_on_velocity", "2 / (pi (1 - 2 s + 2 s²)) on the velocity", "diffusers' SD3 scripts")
class SD3CosMapOnVelocity(ParityWeighting):
    """``2 / (pi (1 - 2 s + 2 s²))`` of the flow time s on a raw velocity."""

    def weight(self, snr: Tensor) -> Tensor:
        """Return the weight at ``snr``."""
        s = 1 / (1 + snr.sqrt())
        return 2 / (math.pi * (1 - 2 * s + 2 * s * s))
