"""Weights of masked diffusion: factors on the integrand of the negative ELBO, one class each.

With alpha the probability that a token is kept and l = ln(alpha / (1 - alpha)), the negative ELBO is
``∫ w(t) (-alpha') / (1 - alpha) E[sum of the masked tokens' cross entropies] dt`` at w = 1. ``flow``, ``sigmoid``,
``iddpm`` and ``edm`` are the objectives w_KG of continuous diffusion, read at this l.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from snrweights.masked.schedules import Level, MaskedSchedule, Product, get_masked_schedule
from snrweights.schedules import check_range
from snrweights.weightings.base import Formula, build, hyper, register

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:
    from snrweights.weightings.base import dataclass_transform

_SHI_TITSIAS = "Shi & Titsias 2025, arXiv 2511.19664"
_STEP_TOLERANCE = 1e-12  # in ln w from one point of the grid to the next: rounding


class MaskedWeighting(Formula, ABC):
    """One weighting of masked diffusion. Subclass it under ``@register_masked_weighting``.

    Example:
        >>> get_masked_weighting("sigmoid").hyperparameters()
        {'bias': 0.0}
    """

    @abstractmethod
    def weight(self, level: Level, schedule: MaskedSchedule) -> Product:
        """Return w at a level, a function of it; of the schedule too where the formula has alpha'."""


_REGISTRY: dict[str, type[MaskedWeighting]] = {}
M = TypeVar("M", bound=type[MaskedWeighting])


@dataclass_transform(frozen_default=True, field_specifiers=(hyper,))
def register_masked_weighting(name: str, *, formula: str = "", source: str = "") -> Callable[[M], M]:
    """Register a weighting under ``name``: a frozen dataclass of its hyperparameters with one method, ``weight``.

    Args:
        name: how users call it.
        formula: shown by ``snrweights methods --masked``.
        source: likewise.

    Raises:
        ValueError: the name is taken.

    Example:
        >>> @register_masked_weighting("doctest_power", formula="(1 - alpha)^power")
        ... class Power(MaskedWeighting):
        ...     power: float = hyper(2.0, above=0)
        ...     def weight(self, level, schedule):
        ...         return Product(masked=self.power)
        >>> masked_weight(torch.tensor([0.5]), "linear", "doctest_power")
        tensor([0.2500])
        >>> del _REGISTRY["doctest_power"]
    """
    return register(_REGISTRY, name, formula=formula, source=source)


@register_masked_weighting("elbo", formula="w = 1", source="Shi et al. 2024 (MD4), arXiv 2406.04329")
class ELBO(MaskedWeighting):
    """The evidence lower bound itself, ``w = 1``: the same for every schedule.

    Source: Shi et al. 2024 (MD4), arXiv 2406.04329; Sahoo et al. 2024 (MDLM), arXiv 2406.07524.

    Example:
        >>> masked_weight(torch.tensor([0.0, 0.5, 1.0]), "linear", ELBO())
        tensor([1., 1., 1.])
    """

    def weight(self, level: Level, schedule: MaskedSchedule) -> Product:
        """Return 1."""
        del level, schedule
        return Product()


@register_masked_weighting("simple", formula="w = (1 - alpha) / -alpha'", source=_SHI_TITSIAS)
class Simple(MaskedWeighting):
    """``w = (1 - alpha) / -alpha'``: the plain sum of cross entropies at uniform t, as MaskGIT trains.

    The whole factor on the sum is 1 at every t, the ends included. Linear schedule: w = t, which is ``sigmoid`` with
    bias 0. Cosine: w = (2 / pi) tan(pi t / 2), infinite at t = 1.

    Source: Chang et al. 2022 (MaskGIT), arXiv 2202.04200; as a weight Shi & Titsias 2025, arXiv 2511.19664.

    Example:
        >>> masked_weight(torch.tensor([0.0, 0.5, 1.0]), "cosine", Simple())
        tensor([0.0000, 0.6366,    inf])
    """

    def weight(self, level: Level, schedule: MaskedSchedule) -> Product:
        """Return what cancels the rate."""
        return schedule.rate(level).inverse()


@register_masked_weighting("flow", formula="w = exp(-l / 2) = sqrt((1 - alpha) / alpha)", source=_SHI_TITSIAS)
class Flow(MaskedWeighting):
    """``w = sqrt((1 - alpha) / alpha)``: infinite at t = 1.

    There the factor on the cross entropies is infinite too for the linear and the polynomial schedule, and
    pi / sqrt(2) for the cosine.

    Source: Shi & Titsias 2025, arXiv 2511.19664; Kingma & Gao 2023, arXiv 2303.00848.

    Example:
        >>> masked_weight(torch.tensor([0.0, 0.5, 1.0]), "linear", Flow())
        tensor([0., 1., inf])
    """

    def weight(self, level: Level, schedule: MaskedSchedule) -> Product:
        """Return sqrt((1 - alpha) / alpha)."""
        del level, schedule
        return Product(masked=0.5, kept=-0.5)


@register_masked_weighting(
    "sigmoid", formula="w = sigmoid(bias - l) = (1 - alpha) / (1 - (1 - exp(-bias)) alpha)", source=_SHI_TITSIAS
)
class Sigmoid(MaskedWeighting):
    """``w = sigmoid(bias - l) = (1 - alpha) / (1 - (1 - exp(-bias)) alpha)``.

    Args:
        bias: l = ln(alpha / (1 - alpha)) at which w is one half; 0 gives 1 - alpha.

    Source: Shi & Titsias 2025, arXiv 2511.19664; Kingma & Gao 2023, arXiv 2303.00848.

    Example:
        >>> masked_weight(torch.tensor([0.0, 0.25, 1.0]), "linear", Sigmoid(bias=0.0))
        tensor([0.0000, 0.2500, 1.0000])
    """

    bias: float = hyper(0.0)

    def weight(self, level: Level, schedule: MaskedSchedule) -> Product:
        """Return (1 - alpha) / (1 - alpha + exp(-bias) alpha)."""
        del schedule
        return Product(masked=1.0, log_rest=-torch.logaddexp(level.log_masked, level.log_kept - self.bias))


@register_masked_weighting("iddpm", formula="w = sech(l / 2) = 2 sqrt(alpha (1 - alpha))", source=_SHI_TITSIAS)
class IDDPM(MaskedWeighting):
    """``w = sech(l / 2) = 2 sqrt(alpha (1 - alpha))``: 1 at alpha = 1/2, 0 at both ends, so not monotone.

    Source: Shi & Titsias 2025, arXiv 2511.19664; Kingma & Gao 2023, arXiv 2303.00848.

    Example:
        >>> masked_weight(torch.tensor([0.0, 0.5, 1.0]), "linear", IDDPM())
        tensor([0., 1., 0.])
    """

    def weight(self, level: Level, schedule: MaskedSchedule) -> Product:
        """Return 2 sqrt(alpha (1 - alpha))."""
        del level, schedule
        return Product(0.5, 0.5, math.log(2))


@register_masked_weighting("edm", formula="w = N(l; 2.4, 2.4²) (exp(-l) + 0.5²)", source=_SHI_TITSIAS)
class EDM(MaskedWeighting):
    """``w = N(l; 2.4, 2.4²) (exp(-l) + 0.5²)``: largest at l = -3.308, alpha = 0.035, so not monotone.

    This is EDM's whole objective w_KG, the density of its draws times its weight; the continuous weighting ``edm`` is
    the weight alone, and ``edm_monotonic`` this shape times 4, held at its maximum for lower l.

    Source: Shi & Titsias 2025, arXiv 2511.19664; Karras et al. 2022, arXiv 2206.00364.

    Example:
        >>> masked_weight(torch.tensor([0.0, 0.965, 1.0]), "linear", EDM())
        tensor([0.0000, 0.2710, 0.0000])
    """

    def weight(self, level: Level, schedule: MaskedSchedule) -> Product:
        """Return the density of l times exp(-l) + 0.25."""
        del schedule
        log_snr = level.log_kept - level.log_masked
        # at the ends the square is lost in infinity - infinity
        density = -((log_snr - 2.4) ** 2) / (2 * 2.4**2) - math.log(2.4 * math.sqrt(2 * math.pi))
        rest = density + torch.logaddexp(-log_snr, torch.full_like(log_snr, math.log(0.25)))
        return Product(log_rest=torch.where(log_snr.isinf(), -math.inf, rest))


def list_masked_weightings() -> list[str]:
    """Return the names of all weightings of masked diffusion, in the order of registration.

    Example:
        >>> list_masked_weightings()
        ['elbo', 'simple', 'flow', 'sigmoid', 'iddpm', 'edm']
    """
    return list(_REGISTRY)


def get_masked_weighting(method: str | MaskedWeighting, **hp: Any) -> MaskedWeighting:
    """Return a weighting from its name and hyperparameters, or from itself.

    Raises:
        ValueError: unknown name or hyperparameter, or a value outside its bounds; the message lists the choices.
        TypeError: ``method`` is neither, or hyperparameters were given with something other than a name.

    Example:
        >>> get_masked_weighting("sigmoid", bias=2)
        Sigmoid(bias=2)
    """
    if isinstance(method, str):
        return build(_REGISTRY, method, hp)
    if not isinstance(method, MaskedWeighting):
        raise TypeError(f"`method` must be a name in {list_masked_weightings()} or a MaskedWeighting, got {method!r}.")
    if hp:
        raise TypeError(f"Hyperparameters {list(hp)} go with a method's name only, got `method` {method!r}.")
    return method


def masked_weight(t: Tensor, schedule: str | MaskedSchedule, method: str | MaskedWeighting, **hp: Any) -> Tensor:
    """Return w(t), the factor on the integrand of the negative ELBO.

    Computed in float64; exact limits at t = 0 and 1, where it may be infinite (``simple`` on the cosine schedule and
    ``flow`` at t = 1).

    Args:
        t: times in [0, 1], any shape, floating point; 1 = all masked.
        schedule: ``"linear"``, ``"cosine"``, ``"polynomial"`` or a ``MaskedSchedule``.
        method: a name of ``list_masked_weightings()`` or a ``MaskedWeighting``.
        **hp: hyperparameters of the method.

    Returns:
        Weights of the shape of t, in its dtype, float32 at least.

    Raises:
        ValueError: an unknown name or hyperparameter, or a t outside [0, 1] or NaN. Values on a device other than the
            CPU are not read, since that would wait for it.
        TypeError: t is not a floating point tensor, or schedule or method of another type.

    Source: Shi & Titsias 2025, arXiv 2511.19664.

    Example:
        >>> masked_weight(torch.tensor([0.0, 0.5, 1.0]), "linear", "sigmoid", bias=2.0)
        tensor([0.0000, 0.8808, 1.0000])
    """
    schedule, weighting = get_masked_schedule(schedule), get_masked_weighting(method, **hp)
    level = schedule.level(check_times(t))
    return weighting.weight(level, schedule).at(level).to(torch.promote_types(t.dtype, torch.float32))


def masked_factor(t: Tensor, schedule: str | MaskedSchedule, method: str | MaskedWeighting, **hp: Any) -> Tensor:
    """Return ``w(t) * -alpha'(t) / (1 - alpha(t))``, the whole factor on the sum of the masked cross entropies.

    Not the product of two numbers, which would be 0 times infinity at the ends: 1 everywhere for ``simple``. At t = 0,
    where nothing is masked, it is infinite for most. Arguments, result and errors as for ``masked_weight``.

    Example:
        >>> t = torch.tensor([0.0, 0.5, 1.0])
        >>> masked_factor(t, "cosine", "simple"), masked_factor(t, "linear", "elbo")
        (tensor([1., 1., 1.]), tensor([inf, 2., 1.]))
    """
    schedule, weighting = get_masked_schedule(schedule), get_masked_weighting(method, **hp)
    level = schedule.level(check_times(t))
    factor = weighting.weight(level, schedule) * schedule.rate(level)
    return factor.at(level).to(torch.promote_types(t.dtype, torch.float32))


def check_times(t: Tensor) -> Tensor:
    """Return ``t``, or raise; values are looked at on the CPU alone."""
    if not isinstance(t, Tensor) or not t.is_floating_point():
        raise TypeError(f"`t` must be a floating point tensor of times in [0, 1], got {_kind(t)}.")
    if t.device.type == "cpu":
        check_range(t, 0, 1)
    return t


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def negative_mass(method: str | MaskedWeighting, schedule: str | MaskedSchedule = "linear", **hp: Any) -> float:
    """Return ``∫ max(-dw/dt, 0) dt`` with the largest w at 1: how far w falls as t goes from 0 to 1, 0 where nowhere.

    A w that never falls makes the weighted loss a non-negative mixture of bounds at least as tight as the ELBO, one for
    each t; where it falls, that bound has a negative share. Measured on l = -60 to 60 in steps of 0.001. Arguments and
    errors as for ``masked_weight``; of the weights here only ``simple`` depends on the schedule.

    Source: Shi & Titsias 2025, arXiv 2511.19664.

    Example:
        >>> negative_mass("sigmoid"), round(negative_mass("iddpm"), 6), round(negative_mass("edm"), 6)
        (0.0, 1.0, 1.0)
    """
    schedule, weighting = get_masked_schedule(schedule), get_masked_weighting(method, **hp)
    level = Level.of_log_snr(torch.linspace(60, -60, 120_001, dtype=torch.float64))
    log_weight = weighting.weight(level, schedule).log(level)
    weight = (log_weight - log_weight.max()).exp()
    falls = log_weight.diff() < -_STEP_TOLERANCE
    return float(torch.where(falls, -weight.diff(), 0.0).sum())


def is_monotone(method: str | MaskedWeighting, schedule: str | MaskedSchedule = "linear", **hp: Any) -> bool:
    """Return whether w(t) never falls: ``negative_mass`` is 0. Arguments and errors are its.

    Example:
        >>> [name for name in list_masked_weightings() if not is_monotone(name, "cosine")]
        ['iddpm', 'edm']
    """
    return negative_mass(method, schedule, **hp) == 0
