"""Masking schedules: how many tokens are still there at time t."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from snrweights.schedules import check_range, exact_dtype


class Level(NamedTuple):
    """How much is masked, as two logarithms, so that neither end loses digits: float64, any shape."""

    log_masked: Tensor
    """ln(1 - alpha), -inf where nothing is masked."""
    log_kept: Tensor
    """ln alpha, -inf where all is masked."""

    @classmethod
    def of_log_snr(cls, log_snr: Tensor) -> Level:
        """Return the level of ``log_snr = ln(alpha / (1 - alpha))``, any shape."""
        return cls(-torch.nn.functional.softplus(log_snr), -torch.nn.functional.softplus(-log_snr))


@dataclass(frozen=True)
class Product:
    """``(1 - alpha)**masked * alpha**kept * exp(log_rest)``: a function of the level, its powers kept apart.

    Weights and rates are 0 or infinite at the ends, and their product need not be. With the powers apart, what cancels
    does so before any infinity is computed. ``log_rest`` is bounded, or -inf where the function vanishes faster than
    every power.

    Example:
        >>> weight, rate = Product(masked=0.5, kept=-0.5), Product(masked=-1.0, kept=0.5)
        >>> level = Level(torch.zeros(1), torch.tensor([-math.inf]))  # all masked
        >>> weight.at(level), rate.at(level), (weight * rate).at(level)
        (tensor([inf]), tensor([0.]), tensor([1.]))
    """

    masked: float = 0.0
    kept: float = 0.0
    log_rest: Tensor | float = 0.0

    def __mul__(self, other: Product) -> Product:
        return Product(self.masked + other.masked, self.kept + other.kept, self.log_rest + other.log_rest)

    def inverse(self) -> Product:
        """Return ``1 / self``."""
        return Product(-self.masked, -self.kept, -self.log_rest)

    def log(self, level: Level) -> Tensor:
        """Return its natural logarithm at a level, same shape."""
        rest = torch.zeros_like(level.log_masked) + self.log_rest
        powers = _times(self.masked, level.log_masked) + _times(self.kept, level.log_kept)
        return torch.where(rest == -math.inf, rest, rest + powers)

    def at(self, level: Level) -> Tensor:
        """Return its value at a level, same shape."""
        return self.log(level).exp()


def _times(power: float, log: Tensor) -> Tensor:
    return power * log if power else torch.zeros_like(log)  # x**0 is 1 at 0 and infinity too


class MaskedSchedule(ABC):
    """A masking schedule: ``alpha(t)``, the probability that a token is kept, falls from 1 at t = 0 to 0 at t = 1.

    Everything is computed and returned in float64 (float32 on a device without it), whatever the dtype of ``t``, in any
    shape; at 0 and 1 the limits are exact. A schedule of one's own gives ``masked``, ``alpha``, ``time`` and ``rate``.

    Example:
        >>> LinearSchedule().log_snr(torch.tensor([0.0, 0.5, 1.0]))
        tensor([inf, 0., -inf], dtype=torch.float64)
    """

    @abstractmethod
    def masked(self, t: Tensor) -> Tensor:
        """Return the mask ratio 1 - alpha(t), with all its digits near 0."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Return the probability that a token is kept, with all its digits near 0."""

    @abstractmethod
    def time(self, alpha: Tensor) -> Tensor:
        """Return the t at which a token is kept with probability ``alpha``."""

    @abstractmethod
    def rate(self, level: Level) -> Product:
        """Return ``-alpha' / (1 - alpha)``, the rate at which tokens are unmasked, as a function of the level."""

    def d_alpha(self, t: Tensor) -> Tensor:
        """Return the derivative of alpha by t, which is <= 0."""
        level = self.level(t)
        return -(self.rate(level) * Product(masked=1.0)).at(level)

    def level(self, t: Tensor) -> Level:
        """Return the logarithms of 1 - alpha and alpha."""
        return Level(self.masked(t).log(), self.alpha(t).log())

    def log_snr(self, t: Tensor) -> Tensor:
        """Return ``ln(alpha / (1 - alpha))``, the analogue of log-SNR: infinite at t = 0, -infinite at t = 1."""
        level = self.level(t)
        return level.log_kept - level.log_masked

    def check(self, t: Tensor) -> None:
        """Raise ValueError where ``t`` is outside [0, 1] or NaN. Reads the values: waits for a device."""
        check_range(t, 0, 1)


def _exact(t: Tensor) -> Tensor:
    return t.to(exact_dtype(t.device))


@dataclass(frozen=True)
class LinearSchedule(MaskedSchedule):
    """``alpha = 1 - t``: the mask ratio is t itself. The rate is 1 / t.

    Source: Sahoo et al. 2024 (MDLM), arXiv 2406.07524; Shi et al. 2024 (MD4), arXiv 2406.04329.

    Example:
        >>> LinearSchedule().alpha(torch.tensor([0.0, 0.25, 1.0]))
        tensor([1.0000, 0.7500, 0.0000], dtype=torch.float64)
    """

    def masked(self, t: Tensor) -> Tensor:
        """Return t."""
        return _exact(t)

    def alpha(self, t: Tensor) -> Tensor:
        """Return 1 - t."""
        return 1 - _exact(t)

    def time(self, alpha: Tensor) -> Tensor:
        """Return 1 - alpha."""
        return 1 - _exact(alpha)

    def rate(self, level: Level) -> Product:
        """Return 1 / (1 - alpha)."""
        del level
        return Product(masked=-1.0)


@dataclass(frozen=True)
class CosineSchedule(MaskedSchedule):
    """``alpha = 1 - cos(pi (1 - t) / 2)``: the mask ratio is sin(pi t / 2). The rate is (pi / 2) cot(pi t / 2).

    Source: Shi et al. 2024 (MD4), arXiv 2406.04329; the mask ratio: Chang et al. 2022 (MaskGIT), arXiv 2202.04200.

    Example:
        >>> CosineSchedule().alpha(torch.tensor([0.0, 0.5, 1.0]))
        tensor([1.0000, 0.2929, 0.0000], dtype=torch.float64)
    """

    def masked(self, t: Tensor) -> Tensor:
        """Return sin(pi t / 2)."""
        return torch.sin(math.pi / 2 * _exact(t))

    def alpha(self, t: Tensor) -> Tensor:
        """Return 1 - cos(pi (1 - t) / 2)."""
        t = _exact(t)
        # the difference cancels near t = 1; near 0 it is the one that is exactly 1 there
        return torch.where(t > 0.5, 2 * torch.sin(math.pi / 4 * (1 - t)) ** 2, 1 - self.masked(t))

    def time(self, alpha: Tensor) -> Tensor:
        """Return 1 - (2 / pi) arccos(1 - alpha)."""
        alpha = _exact(alpha)
        sine = 1 - alpha
        return torch.atan2(sine, torch.sqrt(alpha * (1 + sine))) / (math.pi / 2)

    def rate(self, level: Level) -> Product:
        """Return (pi / 2) sqrt(alpha (2 - alpha)) / (1 - alpha)."""
        return Product(-1.0, 0.5, math.log(math.pi / 2) + torch.log1p(level.log_masked.exp()) / 2)


@dataclass(frozen=True)
class PolynomialSchedule(MaskedSchedule):
    """``alpha = 1 - t**power``: the mask ratio is t**power. The rate is power / t.

    Args:
        power: > 0 and finite; 1 is the linear schedule.

    Raises:
        ValueError: a power that is not.

    Source: Shi et al. 2024 (MD4), arXiv 2406.04329.

    Example:
        >>> PolynomialSchedule(power=2.0).alpha(torch.tensor([0.0, 0.5, 1.0]))
        tensor([1.0000, 0.7500, 0.0000], dtype=torch.float64)
    """

    power: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.power < math.inf:
            raise ValueError(f"`PolynomialSchedule(power=...)` must be > 0 and finite, got {self.power!r}.")

    def masked(self, t: Tensor) -> Tensor:
        """Return t**power."""
        return _exact(t) ** self.power

    def alpha(self, t: Tensor) -> Tensor:
        """Return 1 - t**power."""
        return torch.expm1(self.power * _exact(t).log()).abs()  # not its negative, which is -0 at t = 1

    def time(self, alpha: Tensor) -> Tensor:
        """Return (1 - alpha)**(1 / power)."""
        return torch.exp(torch.log1p(-_exact(alpha)) / self.power)

    def rate(self, level: Level) -> Product:
        """Return power (1 - alpha)**(-1 / power)."""
        del level
        return Product(masked=-1 / self.power, log_rest=math.log(self.power))


SCHEDULES: dict[str, type[MaskedSchedule]] = {
    "linear": LinearSchedule,
    "cosine": CosineSchedule,
    "polynomial": PolynomialSchedule,
}


def get_masked_schedule(schedule: str | MaskedSchedule) -> MaskedSchedule:
    """Return a masking schedule from its name, or from itself.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor a ``MaskedSchedule``.

    Example:
        >>> get_masked_schedule("polynomial")
        PolynomialSchedule(power=2.0)
    """
    if isinstance(schedule, MaskedSchedule):
        return schedule
    if not isinstance(schedule, str):
        raise TypeError(f"`schedule` must be a name in {list(SCHEDULES)} or a MaskedSchedule, got {schedule!r}.")
    if schedule not in SCHEDULES:
        raise ValueError(f"Unknown masking schedule {schedule!r}; choose one of {list(SCHEDULES)}.")
    return SCHEDULES[schedule]()
