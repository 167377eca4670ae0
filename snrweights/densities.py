"""Densities over log-SNR: where on the noise axis a training loop draws its timesteps.

Each is given by its quantile function, from a uniform u in (0, 1) to log-SNR, and its log-density. All in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from snrweights.predictions import LIMIT, softplus
from snrweights.schedules import exact_dtype

_HALF_LN_2PI = 0.5 * math.log(2 * math.pi)


@runtime_checkable
class Density(Protocol):
    """A density p over log-SNR."""

    def log_prob(self, log_snr: Tensor) -> Tensor:
        """Return ln p(log_snr), any shape, float64; -inf where there is no mass."""

    def icdf(self, u: Tensor) -> Tensor:
        """Return the log-SNR below which the mass u lies; at u = 0 and 1 the ends of the range that has mass."""


def exact(x: Tensor) -> Tensor:
    """Return ``x`` in float64, or float32 on a device that has no float64."""
    return x.to(exact_dtype(x.device))


def sample(density: Density, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
    """Draw log-SNR values of a density, float64.

    Example:
        >>> sample(FlowUniform(), (2,), torch.Generator().manual_seed(0)).shape
        torch.Size([2])
    """
    u = torch.rand(shape, generator=generator, dtype=torch.float64)
    return density.icdf(u.clamp(2.0**-54, 1 - 2.0**-53))


@dataclass(frozen=True)
class Cosine:
    """Uniform t on the cosine schedule: l = -2 ln tan(pi u / 2) + shift, p = sech((l - shift) / 2) / (2 pi).

    ``shift = 2 ln(64 / resolution)`` for a shifted schedule (arXiv 2301.11093). SD3's "cosmap" draws are this density
    with shift 0.

    Example:
        >>> Cosine().log_prob(torch.zeros(1)).exp() * 2 * math.pi
        tensor([1.], dtype=torch.float64)
    """

    shift: float = 0.0

    def log_prob(self, log_snr: Tensor) -> Tensor:
        """Return ln p, any shape."""
        half = (exact(log_snr) - self.shift).abs() / 2
        return -half - softplus(-2 * half) - math.log(math.pi)

    def icdf(self, u: Tensor) -> Tensor:
        """Return the quantile of u."""
        u = exact(u)
        return self.shift - 2 * torch.log(torch.sin(math.pi / 2 * (1 - u))) + 2 * torch.log(torch.sin(math.pi / 2 * u))


@dataclass(frozen=True)
class FlowUniform:
    """Uniform time on a straight flow with shift k: l = 2 ln((1 - u) / u) - 2 ln k, p = sech²((l + 2 ln k) / 4) / 8.

    Source: Esser 2024 (arXiv 2403.03206).

    Example:
        >>> FlowUniform(shift=3.0).icdf(torch.tensor([0.75]))
        tensor([0.], dtype=torch.float64)
    """

    shift: float = 1.0

    def __post_init__(self) -> None:
        _positive("shift", self.shift)

    def log_prob(self, log_snr: Tensor) -> Tensor:
        """Return ln p, any shape."""
        half = (exact(log_snr) / 2 + math.log(self.shift)).abs()
        return -half - 2 * softplus(-half) - math.log(2)

    def icdf(self, u: Tensor) -> Tensor:
        """Return the quantile of u."""
        return 2 * torch.logit(exact(u)) - 2 * math.log(self.shift)


@dataclass(frozen=True)
class Normal:
    """Log-SNR ~ N(mean, std²); see ``log_normal_sigma`` and ``logit_normal`` for its two uses.

    Example:
        >>> Normal(0.0, 2.0).icdf(torch.tensor([0.5]))
        tensor([0.], dtype=torch.float64)
    """

    mean: float
    std: float

    def __post_init__(self) -> None:
        _positive("std", self.std)

    def log_prob(self, log_snr: Tensor) -> Tensor:
        """Return ln p, any shape."""
        z = (exact(log_snr) - self.mean) / self.std
        return -z.square() / 2 - math.log(self.std) - _HALF_LN_2PI

    def icdf(self, u: Tensor) -> Tensor:
        """Return the quantile of u."""
        return self.mean + self.std * torch.special.ndtri(exact(u))


def log_normal_sigma(mean: float = -1.2, std: float = 1.2) -> Normal:
    """EDM's ln sigma ~ N(P_mean, P_std²), hence l ~ N(-2 P_mean, (2 P_std)²) (Karras 2022, arXiv 2206.00364).

    Example:
        >>> log_normal_sigma()
        Normal(mean=2.4, std=2.4)
    """
    return Normal(-2.0 * mean, 2.0 * std)


def logit_normal(mean: float = 0.0, std: float = 1.0, shift: float = 1.0, *, reversed: bool = False) -> Normal:
    """SD3's logit(t) ~ N(mean, std²) on a straight flow (Esser 2024, arXiv 2403.03206).

    With t = 1 at noise, l ~ N(-2 mean - 2 ln k, (2 std)²). diffusers' training scripts use the draw as an index into a
    *descending* table of timesteps: ``reversed=True``, l ~ N(+2 mean - 2 ln k, (2 std)²).

    Example:
        >>> logit_normal(0.5), logit_normal(0.5, reversed=True)
        (Normal(mean=-1.0, std=2.0), Normal(mean=1.0, std=2.0))
    """
    _positive("shift", shift)
    return Normal((2.0 if reversed else -2.0) * mean - 2 * math.log(shift), 2.0 * std)


@dataclass(frozen=True)
class LogUniform:
    """Sigma log-uniform on [sigma_min, sigma_max]: l uniform on [-2 ln sigma_max, -2 ln sigma_min].

    Example:
        >>> LogUniform(0.1, 10.0).icdf(torch.tensor([0.5]))
        tensor([0.], dtype=torch.float64)
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        _positive("sigma_min", self.sigma_min)
        _positive("sigma_max - sigma_min", self.sigma_max - self.sigma_min)

    def log_prob(self, log_snr: Tensor) -> Tensor:
        """Return ln p, any shape; -inf outside the range."""
        log_snr = exact(log_snr)
        low, high = -2 * math.log(self.sigma_max), -2 * math.log(self.sigma_min)
        slack = 1e-9  # the ends themselves belong to the range, also after a rounding
        inside = (log_snr >= low - slack) & (log_snr <= high + slack)
        return torch.where(inside, torch.full_like(log_snr, -math.log(high - low)), -math.inf)

    def icdf(self, u: Tensor) -> Tensor:
        """Return the quantile of u."""
        low, high = -2 * math.log(self.sigma_max), -2 * math.log(self.sigma_min)
        return low + (high - low) * exact(u)


@dataclass(frozen=True)
class Laplace:
    """Laplace density, p = exp(-|l - loc| / scale) / (2 scale) (Hang 2024, arXiv 2407.03297).

    Example:
        >>> Laplace().icdf(torch.tensor([0.5]))
        tensor([0.], dtype=torch.float64)
    """

    loc: float = 0.0
    scale: float = 0.5

    def __post_init__(self) -> None:
        _positive("scale", self.scale)

    def log_prob(self, log_snr: Tensor) -> Tensor:
        """Return ln p, any shape."""
        return -(exact(log_snr) - self.loc).abs() / self.scale - math.log(2 * self.scale)

    def icdf(self, u: Tensor) -> Tensor:
        """Return the quantile of u."""
        u = exact(u)
        return self.loc + self.scale * torch.where(u < 0.5, torch.log(2 * u), -torch.log(2 * (1 - u)))


@dataclass(frozen=True)
class Logistic:
    """Logistic density, p = sigmoid(z) sigmoid(-z) / scale with z = (l - loc) / scale.

    With ``loc = -ln(data variance)`` and scale 1 it is where ``auto`` draws for EDM's network.

    Example:
        >>> Logistic().log_prob(torch.zeros(1)).exp()
        tensor([0.2500], dtype=torch.float64)
    """

    loc: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        _positive("scale", self.scale)

    def log_prob(self, log_snr: Tensor) -> Tensor:
        """Return ln p, any shape."""
        z = ((exact(log_snr) - self.loc) / self.scale).abs()
        return -z - 2 * softplus(-z) - math.log(self.scale)

    def icdf(self, u: Tensor) -> Tensor:
        """Return the quantile of u."""
        return self.loc + self.scale * torch.logit(exact(u))


@dataclass(frozen=True)
class Cauchy:
    """Cauchy density, p = 1 / (pi scale (1 + ((l - loc) / scale)²)) (Hang 2024, arXiv 2407.03297).

    Example:
        >>> Cauchy().log_prob(torch.zeros(1)).exp() * math.pi
        tensor([1.], dtype=torch.float64)
    """

    loc: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        _positive("scale", self.scale)

    def log_prob(self, log_snr: Tensor) -> Tensor:
        """Return ln p, any shape."""
        z = (exact(log_snr) - self.loc) / self.scale
        density = -torch.log1p(z * z) - math.log(math.pi * self.scale)
        # its tail is no power of SNR: at LIMIT, which stands for infinity, let it be a small one
        return torch.where(log_snr.abs() == LIMIT, -3 / 16 * LIMIT, density)

    def icdf(self, u: Tensor) -> Tensor:
        """Return the quantile of u."""
        u = exact(u)
        lower, upper = -1 / torch.tan(math.pi * u), 1 / torch.tan(math.pi * (1 - u))
        return self.loc + self.scale * torch.where(u < 0.5, lower, upper)


@dataclass(frozen=True)
class Mode:
    """SD3's mode density on a straight flow: t = 1 - u - s (cos²(pi u / 2) - 1 + u) (arXiv 2403.03206).

    Symmetric in log-SNR before the shift, so that a draw used as an index into a descending table, as in diffusers'
    scripts, has the same density.

    Example:
        >>> round(Mode().icdf(torch.tensor([0.5])).item(), 12)
        0.0
    """

    scale: float = 1.29
    shift: float = 1.0

    def __post_init__(self) -> None:
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise ValueError(
                f"`Mode(scale=...)` must be in [-1, {2 / (math.pi - 2):.3f}] (monotone), got {self.scale}."
            )
        _positive("shift", self.shift)

    def _signal(self, u: Tensor) -> Tensor:
        return (1 + self.scale) * u - self.scale * torch.sin(math.pi / 2 * u) ** 2  # 1 - t, exact near u = 0

    def icdf(self, u: Tensor) -> Tensor:
        """Return the quantile of u."""
        u = exact(u)  # time falls with u, so log-SNR rises; the map is symmetric under u -> 1 - u, t -> 1 - t
        return 2 * (torch.log(self._signal(u)) - torch.log(self._signal(1 - u))) - 2 * math.log(self.shift)

    def log_prob(self, log_snr: Tensor) -> Tensor:
        """Return ln p, any shape, by bisection for u."""
        target = exact(log_snr).clamp(-LIMIT, LIMIT)
        low, high = torch.zeros_like(target), torch.ones_like(target)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.icdf(middle) < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        u = (low + high) / 2
        slope = (1 + self.scale - self.scale * math.pi / 2 * torch.sin(math.pi * u)).abs()  # |dt / du|
        half = (target / 2 + math.log(self.shift)).abs()  # |dl / dt| = 2 / (t (1 - t))
        return -half - 2 * softplus(-half) - math.log(2) - torch.log(slope)


DENSITIES = {
    "cosine": Cosine,
    "cosmap": Cosine,
    "flow_uniform": FlowUniform,
    "log_normal_sigma": log_normal_sigma,
    "logit_normal": logit_normal,
    "log_uniform": LogUniform,
    "laplace": Laplace,
    "logistic": Logistic,
    "cauchy": Cauchy,
    "mode": Mode,
}

# those of a flow's time, which a shift k moves after the draw: log-SNR falls by 2 ln k
SHIFTED: dict[str, Callable[[float], Density]] = {
    "cosmap": lambda k: Cosine(2 * math.log(1 / k)),
    "flow_uniform": FlowUniform,
    "logit_normal": lambda k: logit_normal(shift=k),
    "mode": lambda k: Mode(shift=k),
}


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"`{name}` must be > 0, got {value!r}.")
