"""Weightings that level off where the data is almost clean, and the cross-walks between them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from snrweights.densities import Density
from snrweights.drawn import as_density, mean_under
from snrweights.predictions import log_error_ratio, softplus
from snrweights.schedulers import as_schedule
from snrweights.schedules import Schedule
from snrweights.weightings.base import Weighting, build, get_weighting, hyper, register_weighting


@register_weighting(
    "min_snr", target="sample", formula="w_x0 = min(SNR, gamma)", source="Hang et al. 2023, arXiv 2303.09556"
)
class MinSNR(Weighting):
    """Min-SNR: ``w_eps = min(1, gamma / SNR)``, ``w_v = min(SNR, gamma) / (SNR + 1)``, ``w_x0 = min(SNR, gamma)``.

    Sources differ for v: some scripts add 1 instead of dividing by SNR + 1; see ``snrweights.weightings.parity``. At
    zero terminal SNR the epsilon weight is its limit, 1, where those scripts give NaN.

    Args:
        gamma: SNR above which the x0 weight is constant; > 0.

    Source: Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy", arXiv 2303.09556.

    Example:
        >>> import torch
        >>> MinSNR(gamma=5).log_weight(torch.tensor([10.0]).log()).exp()
        tensor([5.])
    """

    gamma: float = hyper(5.0, above=0)

    def log_weight(self, log_snr: Tensor) -> Tensor:
        """Return ln min(SNR, gamma)."""
        return log_snr.clamp(max=math.log(self.gamma))


@register_weighting(
    "soft_min_snr",
    target="epsilon",
    formula="w_x0 = SNR gamma / (SNR + gamma)",
    source="Crowson et al. 2024, arXiv 2401.11605",
)
class SoftMinSNR(Weighting):
    """Soft-Min-SNR: ``w_eps = gamma / (gamma + SNR)``, ``w_x0 = 1 / (sigma_hat² + 1 / gamma)``.

    The form of k-diffusion has no gamma and multiplies the network F: it is this with gamma = 1 / sigma_data².

    Args:
        gamma: SNR at which the epsilon weight is one half; > 0.

    Source: Crowson et al. 2024, "Scalable High-Resolution Pixel-Space Image Synthesis with Hourglass Diffusion
    Transformers", Eq. 5 (on the x0 error), arXiv 2401.11605.

    Example:
        >>> import torch
        >>> SoftMinSNR(gamma=4).log_weight(torch.tensor([4.0]).log()).exp()
        tensor([0.5000])
    """

    gamma: float = hyper(4.0, above=0)

    def log_weight(self, log_snr: Tensor) -> Tensor:
        """Return ln(gamma / (gamma + SNR))."""
        log_gamma = math.log(self.gamma)
        return log_gamma - torch.logaddexp(log_snr, torch.full_like(log_snr, log_gamma))


# -ln sigma² of a coordinate system is ln R_y of the target whose error is scaled by 1 / sigma² there
_NOISE_POWER = {"vp": "v_prediction", "ve": "epsilon", "flow": "flow_prediction"}


@register_weighting(
    "smoothed_kl",
    target="epsilon",
    formula="w_eps = sigma² / (sigma² + tau)",
    source="Li 2026, arXiv 2606.13433",
)
class SmoothedKL(Weighting):
    """Smoothed-KL: ``w_eps = sigma_t² / (sigma_t² + tau)``.

    The KL divergence between the local Gaussians N(alpha x0, sigma² I) and N(alpha x0_hat, sigma² I), both smoothed
    with a kernel N(0, tau I), is ``1/2 sigma² / (sigma² + tau) ||eps - eps_hat||²``. tau -> 0 is the DDPM loss. The
    paper writes lambda for tau, a letter that means log-SNR in this field.

    In VP coordinates it is a constant times ``soft_min_snr(gamma=(1 + tau) / tau)``, exactly, and matches
    ``min_snr(gamma=1 / tau)`` in the tails; see ``match``. tau = 0.2 is this package's default, not the paper's.

    Args:
        tau: variance of the kernel, > 0.
        coords: coordinates in which the kernel acts: ``"vp"`` (sigma² = 1 / (1 + SNR), the paper's), ``"ve"``
            (sigma² = 1 / SNR), ``"flow"`` (sigma = 1 / (1 + √SNR)) or ``"native"``, those of the schedule.

    Source: Li 2026, arXiv 2606.13433.

    Example:
        >>> import torch
        >>> SmoothedKL(tau=0.25).log_weight(torch.tensor([1.0]).log()).exp()
        tensor([0.6667])
    """

    tau: float = hyper(0.2, above=0)
    coords: str = hyper("vp", choices=("vp", "ve", "flow", "native"))

    def for_draws(self, schedule: Schedule, density: Density) -> Weighting:
        """Fill in the schedule's coordinates for ``"native"``."""
        del density
        return dataclasses.replace(self, coords=schedule.coords) if self.coords == "native" else self

    def log_weight(self, log_snr: Tensor) -> Tensor:
        """Return ln(sigma² / (sigma² + tau)) = -softplus(ln tau - ln sigma²)."""
        if self.coords == "native":
            raise ValueError("`SmoothedKL(coords='native')` needs a schedule: call `bind` or `over_log_snr` first.")
        return -softplus(math.log(self.tau) + log_error_ratio(_NOISE_POWER[self.coords], log_snr))


@dataclass(frozen=True)
class Match:
    """Two weightings that correspond, and how far apart they are on a schedule once both average 1.

    Attributes:
        weighting: what was matched.
        counterpart: its counterpart.
        exact: whether the two are the same up to a constant; else they agree to leading order in the tails.
        max_deviation: largest ``|w_1 - w_2|`` of the normalised epsilon weights over the schedule.
        mean_deviation: its mean under the density.

    Example:
        >>> match("min_snr", to="smoothed_kl", schedule="linear", gamma=5).exact
        False
    """

    weighting: Weighting
    counterpart: Weighting
    exact: bool
    max_deviation: float
    mean_deviation: float

    def __str__(self) -> str:
        kind = "exact" if self.exact else "leading order"
        return (
            f"{self.weighting} ~ {self.counterpart} ({kind}; weights of mean 1 differ by at most "
            f"{self.max_deviation:.3g}, on average {self.mean_deviation:.3g})"
        )


def match(method: str, *, to: str, schedule: Any, density: Any = None, **hp: Any) -> Match:
    """Find the counterpart of a weighting in another family, and measure how well it fits on a schedule.

    The cross-walks, with gamma' for soft_min_snr: ``gamma' = (1 + tau) / tau`` (exact; ``1 / tau`` in VE coordinates)
    and ``gamma = 1 / tau`` for min_snr (leading order: equal tails up to a constant; at SNR = gamma in VP coordinates
    the ratio smoothed_kl / min_snr is 1 / (2 + tau)).

    Args:
        method: ``"smoothed_kl"``, ``"soft_min_snr"`` or ``"min_snr"``.
        to: another of them.
        schedule: whatever ``as_schedule`` reads.
        density: as for ``Weighting.bind``.
        **hp: hyperparameters of ``method``.

    Raises:
        ValueError: no cross-walk between the two, or no counterpart for these hyperparameters.

    Source: Li 2026, arXiv 2606.13433; the deviations are measured.

    Example:
        >>> match("smoothed_kl", to="soft_min_snr", schedule="linear", tau=0.2).counterpart
        SoftMinSNR(gamma=6.0)
    """
    if (method, to) not in _CROSSWALKS:
        raise ValueError(f"No cross-walk from {method!r} to {to!r}; choose one of {list(_CROSSWALKS)}.")
    schedule = as_schedule(schedule)
    walk, exact = _CROSSWALKS[method, to]
    weighting = get_weighting(method, **hp).for_draws(schedule, as_density(density, schedule))
    counterpart = build({to: type(get_weighting(to))}, to, walk(weighting))
    options = {"prediction_type": "epsilon", "density": density, "normalize": "mean"}
    first, second = weighting.over_log_snr(schedule, **options), counterpart.over_log_snr(schedule, **options)
    log_snr = schedule.log_snr(schedule.grid())
    return Match(
        weighting,
        counterpart,
        exact,
        float((first(log_snr) - second(log_snr)).abs().max()),
        mean_under(first.density, lambda at: (first(at) - second(at)).abs()),
    )


def _soft_from_smoothed(weighting: Any) -> dict[str, float]:
    if weighting.coords == "flow":
        raise ValueError("`SmoothedKL(coords='flow')` has no Soft-Min-SNR counterpart; choose one of ['vp', 've'].")
    return {"gamma": 1 / weighting.tau + (1 if weighting.coords == "vp" else 0)}


def _smoothed_from_soft(weighting: Any) -> dict[str, float]:
    if weighting.gamma <= 1:
        raise ValueError(
            f"`SoftMinSNR(gamma=...)` must be > 1 to have a Smoothed-KL counterpart, got {weighting.gamma}."
        )
    return {"tau": 1 / (weighting.gamma - 1)}


_CROSSWALKS: dict[tuple[str, str], tuple[Callable[[Any], dict[str, float]], bool]] = {
    ("smoothed_kl", "soft_min_snr"): (_soft_from_smoothed, True),
    ("soft_min_snr", "smoothed_kl"): (_smoothed_from_soft, True),
    ("smoothed_kl", "min_snr"): (lambda weighting: {"gamma": 1 / weighting.tau}, False),
    ("min_snr", "smoothed_kl"): (lambda weighting: {"tau": 1 / weighting.gamma}, False),
}
