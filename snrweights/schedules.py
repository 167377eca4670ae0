"""Noise schedules: from the timestep a model is given to log-SNR.

``log_snr = ln(alpha_t**2 / sigma_t**2)`` for ``x_t = alpha_t x0 + sigma_t eps``: high means clean. A schedule knows
three things: the log-SNR of a timestep, the coordinates of its forward process, and, where its source implies one,
the prediction type of the models trained on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

Coordinates = Literal["vp", "ve", "flow"]


def exact_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on a device that has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def alphas_cumprod_from_betas(betas: Tensor) -> Tensor:
    """Return ``prod_s (1 - beta_s)`` in float64, shape (T,)."""
    return torch.cumprod(1.0 - betas.detach().to("cpu", torch.float64), dim=0)


class Schedule(Protocol):
    """What a schedule must offer; a user's own class needs no base class.

    Attributes:
        prediction_type: target implied by the source of the schedule, or None.
        sigma_data: standard deviation of the data that the ``edm`` target needs, or None.
        coords: ``"vp"`` (alpha² + sigma² = 1), ``"ve"`` (alpha = 1) or ``"flow"`` (alpha + sigma = 1).
    """

    @property
    def prediction_type(self) -> str | None: ...  # noqa: D102
    @property
    def sigma_data(self) -> float | None: ...  # noqa: D102
    @property
    def coords(self) -> Coordinates: ...  # noqa: D102

    def log_snr(self, t: Tensor) -> Tensor:
        """Return log-SNR of timesteps ``t``, same shape, float64."""

    def check(self, t: Tensor) -> None:
        """Raise ValueError or IndexError, naming the values allowed, where ``t`` is not a timestep."""

    def grid(self) -> Tensor:
        """Return timesteps that stand for the schedule, both ends included, shape (T,)."""


def check_range(t: Tensor, low: float, high: float, *, without_low: bool = False, without_high: bool = False) -> None:
    """Raise ValueError where ``t`` is NaN or outside [low, high], or an end that is left out."""
    inside = (t > low if without_low else t >= low) & (t < high if without_high else t <= high)
    if not bool(inside.all()):  # NaN is never inside
        brackets = "(" if without_low else "[", ")" if without_high else "]"
        bad = t[~inside].flatten()[0].item() if t.ndim else t.item()
        raise ValueError(f"`t` must lie in {brackets[0]}{low:g}, {high:g}{brackets[1]}, got {bad}.")


@dataclass(frozen=True, eq=False)
class DiscreteSchedule:
    """A table of ``alphas_cumprod``; ``t`` is the index into it, 0 the cleanest.

    ``log_snr = ln(a) - ln(1 - a)``, exactly -inf at a = 0 (zero terminal SNR) and +inf at a = 1. A float ``t`` between
    two timesteps interpolates linearly.

    Args:
        alphas_cumprod: (T,) tensor in [0, 1], non-increasing, float32 or float64.
        prediction_type: target of the models trained on it, if known.
        sigma_data: needed by the ``edm`` target only.
        coords: coordinates of the forward process that uses the table.

    Raises:
        TypeError: the table is not a float32 or float64 tensor. Half precision is off by up to 35 % in SNR.
        ValueError: wrong shape, a value outside [0, 1] or NaN, or a table that increases.

    Example:
        >>> import torch
        >>> schedule = DiscreteSchedule(torch.tensor([0.9, 0.5, 0.0]))
        >>> schedule.log_snr(torch.tensor([1, 2]))
        tensor([0., -inf], dtype=torch.float64)
    """

    alphas_cumprod: Tensor = field(repr=False)
    prediction_type: str | None = None
    sigma_data: float | None = None
    coords: Coordinates = "vp"
    log_snr_table: Tensor = field(init=False, repr=False)
    _tables: dict[torch.device, Tensor] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        table = self.alphas_cumprod
        if not isinstance(table, Tensor) or table.dtype not in (torch.float32, torch.float64):
            kind = table.dtype if isinstance(table, Tensor) else type(table).__name__
            raise TypeError(f"`alphas_cumprod` must be a float32 or float64 tensor, got {kind}.")
        if table.ndim != 1 or len(table) < 2:
            raise ValueError(f"`alphas_cumprod` must have shape (T,) with T >= 2, got {tuple(table.shape)}.")
        table = table.detach().to("cpu", torch.float64)
        if not bool(((table >= 0) & (table <= 1)).all()):
            raise ValueError(f"`alphas_cumprod` must lie in [0, 1], got {table.min():g} to {table.max():g}.")
        rises = table.diff() > 2.0**-23  # diffusers ends some zero-SNR tables with 2**-24, above the entry before it
        if bool(rises.any()):
            t = int(rises.nonzero()[0])
            raise ValueError(f"`alphas_cumprod` must not increase, but t={t + 1} is above t={t}; is it reversed?")
        object.__setattr__(self, "alphas_cumprod", table)
        object.__setattr__(self, "log_snr_table", table.log() - torch.log1p(-table))

    @classmethod
    def from_betas(cls, betas: Tensor, prediction_type: str | None = None) -> DiscreteSchedule:
        """Build the table from any betas, shape (T,), in float64."""
        return cls(alphas_cumprod_from_betas(betas), prediction_type)

    @classmethod
    def from_name(
        cls,
        name: str,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        *,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str | None = None,
    ) -> DiscreteSchedule:
        """Build one of the field's standard schedules, computed in float64.

        Args:
            name: ``linear``, ``scaled_linear``, ``squaredcos_cap_v2`` or ``sigmoid``, as diffusers names them.
            num_train_timesteps: T.
            beta_start: first beta (not used by ``squaredcos_cap_v2``).
            beta_end: last beta (likewise).
            rescale_betas_zero_snr: shift and scale sqrt(alphas_cumprod) to zero terminal SNR (arXiv 2305.08891).
            prediction_type: target of the models trained on it.

        Example:
            >>> DiscreteSchedule.from_name("linear").log_snr_table[0]
            tensor(9.2102, dtype=torch.float64)
        """
        if name not in BETA_SCHEDULES:
            raise ValueError(f"Unknown schedule {name!r}; choose one of {list(BETA_SCHEDULES)}.")
        table = alphas_cumprod_from_betas(BETA_SCHEDULES[name](num_train_timesteps, beta_start, beta_end))
        if rescale_betas_zero_snr:
            root = table.sqrt()
            table = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        return cls(table, prediction_type)

    def log_snr(self, t: Tensor) -> Tensor:
        """Return log-SNR of timesteps ``t`` (any shape), float64."""
        if t.device not in self._tables:  # copied once: a copy from the host waits for the device
            self._tables[t.device] = self.log_snr_table.to(t.device, exact_dtype(t.device))
        return lookup(self._tables[t.device], t)

    def check(self, t: Tensor) -> None:
        """Raise IndexError where ``t`` is outside 0..T-1 or NaN."""
        try:
            check_range(t, 0, len(self.log_snr_table) - 1)
        except ValueError as error:
            raise IndexError(str(error)) from None

    def grid(self) -> Tensor:
        """Return all timesteps 0..T-1."""
        return torch.arange(len(self.log_snr_table))


def lookup(table: Tensor, t: Tensor) -> Tensor:
    """Read ``table`` (T,) at ``t``: a gather for integers; for floats linear interpolation, exact at infinite ends.

    A float outside of the table, or NaN, gives NaN.
    """
    if not t.is_floating_point():
        return table.index_select(0, t) if t.ndim == 1 else table.index_select(0, t.flatten()).reshape(t.shape)
    low = t.floor().nan_to_num().clamp(0, len(table) - 1)
    fraction = (t - low).to(table.dtype).clamp(0, 1)
    i = low.long().flatten()
    left = table.index_select(0, i).reshape(t.shape)
    right = table.index_select(0, (i + 1).clamp(max=len(table) - 1)).reshape(t.shape)
    value = torch.where((fraction == 0) | left.isinf(), left, left + fraction * (right - left))
    return torch.where((t >= 0) & (t <= len(table) - 1), value, torch.nan)


def _linear(steps: int, start: float, end: float) -> Tensor:
    return torch.linspace(start, end, steps, dtype=torch.float64)


def _scaled_linear(steps: int, start: float, end: float) -> Tensor:
    return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2


def _squaredcos_cap_v2(steps: int, start: float, end: float) -> Tensor:
    del start, end
    bar = torch.cos((torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - bar[1:] / bar[:-1]).clamp(max=0.999)


def _sigmoid(steps: int, start: float, end: float) -> Tensor:
    return torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid() * (end - start) + start


BETA_SCHEDULES: dict[str, Callable[[int, float, float], Tensor]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _squaredcos_cap_v2,
    "sigmoid": _sigmoid,
}


@dataclass(frozen=True)
class CosineSchedule:
    """The continuous cosine schedule, ``log_snr = -2 ln tan(pi t / 2) + 2 ln(64 / resolution)``, t in [t_min, t_max].

    Source: Nichol & Dhariwal 2021 (arXiv 2102.09672); the resolution shift: Hoogeboom 2023 (arXiv 2301.11093).

    Example:
        >>> import torch
        >>> CosineSchedule().log_snr(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
        tensor([inf, 0., -inf], dtype=torch.float64)
    """

    resolution: float = 64.0
    t_min: float = 0.0
    t_max: float = 1.0
    prediction_type: str | None = None
    sigma_data: float | None = None
    coords: Coordinates = "vp"

    def __post_init__(self) -> None:
        _require(self, self.resolution > 0, "resolution", "> 0")
        _require(self, self.t_max <= 1, "t_max", "<= 1")
        _require(self, 0 <= self.t_min < self.t_max, "t_min", "in [0, t_max)")

    def log_snr(self, t: Tensor) -> Tensor:
        """Return log-SNR of ``t`` in [0, 1], float64."""
        t = t.to(exact_dtype(t.device))
        # cosine as the sine of the complement: exactly 0 at t = 1; and 1 at both of t = 0.5
        ratio = torch.log(torch.sin(math.pi / 2 * (1 - t))) - torch.log(torch.sin(math.pi / 2 * t))
        return 2 * ratio + 2 * math.log(64 / self.resolution)

    def timestep_of(self, log_snr: Tensor) -> Tensor:
        """Return the t of ``log_snr``, same shape, float64."""
        log_snr = log_snr.to(exact_dtype(log_snr.device))
        return 2 / math.pi * torch.atan(torch.exp((2 * math.log(64 / self.resolution) - log_snr) / 2))

    def check(self, t: Tensor) -> None:
        """Raise ValueError where ``t`` is outside [t_min, t_max] or NaN."""
        check_range(t, self.t_min, self.t_max)

    def grid(self) -> Tensor:
        """Return 1001 times from t_min to t_max."""
        return torch.linspace(self.t_min, self.t_max, 1001, dtype=torch.float64)


@dataclass(frozen=True)
class FlowSchedule:
    """Straight flow ``x_t = (1 - s) x0 + s eps`` with ``s = t / num_train_timesteps``: log_snr = 2 ln((1 - s) / s).

    ``t`` is what the model is given, after any shift: as for diffusers' FlowMatch schedulers it is *s* times
    ``num_train_timesteps`` and never an index, integer or not. The shift, ``s' = k s / (1 + (k - 1) s)``, moves the
    density of the draws and not the meaning of ``t``. ``reversed=True`` is for time with the data at 1.

    Source: Esser 2024 (arXiv 2403.03206).

    Example:
        >>> import torch
        >>> FlowSchedule(num_train_timesteps=1000).log_snr(torch.tensor([500, 1000]))
        tensor([0., -inf], dtype=torch.float64)
    """

    shift: float = 1.0
    num_train_timesteps: int = 1
    reversed: bool = False
    s_min: float = 0.0
    prediction_type: str | None = "flow_prediction"
    sigma_data: float | None = None
    coords: Coordinates = "flow"

    def __post_init__(self) -> None:
        _require(self, self.shift > 0, "shift", "> 0")
        _require(self, self.num_train_timesteps > 0, "num_train_timesteps", "> 0")
        _require(self, 0 <= self.s_min < 1, "s_min", "in [0, 1)")

    def log_snr(self, t: Tensor) -> Tensor:
        """Return log-SNR of ``t`` in [0, num_train_timesteps], float64."""
        s = t.to(exact_dtype(t.device)) / self.num_train_timesteps
        noise, signal = (1 - s, s) if self.reversed else (s, 1 - s)
        return 2 * (torch.log(signal) - torch.log(noise))

    def timestep_of(self, log_snr: Tensor) -> Tensor:
        """Return the t of ``log_snr``, same shape, float64."""
        half = log_snr.to(exact_dtype(log_snr.device)) / 2
        return torch.sigmoid(half if self.reversed else -half) * self.num_train_timesteps

    def check(self, t: Tensor) -> None:
        """Raise ValueError where ``t`` is outside [0, num_train_timesteps] or NaN.

        With ``s_min`` > 0 the clean end itself is outside too, since weights were not checked there.
        """
        ends = {"without_high" if self.reversed else "without_low": self.s_min > 0}
        check_range(t, 0, self.num_train_timesteps, **ends)

    def grid(self) -> Tensor:
        """Return 1001 times, from the cleanest (``s_min``) to pure noise."""
        s = torch.linspace(self.s_min, 1, 1001, dtype=torch.float64)
        return (1 - s if self.reversed else s) * self.num_train_timesteps


@dataclass(frozen=True)
class EDMSchedule:
    """Variance-exploding noise ``x = x0 + sigma eps``: log_snr = -2 ln sigma.

    ``t`` is sigma itself (``timestep="sigma"``) or the network's ``c_noise = 0.25 ln sigma`` (``"c_noise"``, what
    diffusers' EDM schedulers hand to the model). ``sigma_min`` and ``sigma_max`` bound the range on which weights are
    checked and drawn; a sigma outside them is legal, since a log-normal draw reaches there.

    Source: Karras 2022 (arXiv 2206.00364).

    Example:
        >>> import torch
        >>> EDMSchedule().log_snr(torch.tensor([1.0, 80.0]))
        tensor([-0.0000, -8.7641], dtype=torch.float64)
    """

    sigma_data: float | None = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    timestep: Literal["sigma", "c_noise"] = "sigma"
    prediction_type: str | None = None
    coords: Coordinates = "ve"

    def __post_init__(self) -> None:
        _require(self, self.sigma_data is None or self.sigma_data > 0, "sigma_data", "> 0")
        _require(self, 0 < self.sigma_min < self.sigma_max < math.inf, "sigma_min", "> 0 and below sigma_max")
        _require(self, self.timestep in ("sigma", "c_noise"), "timestep", "'sigma' or 'c_noise'")

    def log_snr(self, t: Tensor) -> Tensor:
        """Return log-SNR of ``t`` (sigma or c_noise), float64."""
        t = t.to(exact_dtype(t.device))
        return -2 * torch.log(t) if self.timestep == "sigma" else -8 * t

    def timestep_of(self, log_snr: Tensor) -> Tensor:
        """Return the t of ``log_snr``, same shape, float64."""
        log_snr = log_snr.to(exact_dtype(log_snr.device))
        return torch.exp(-log_snr / 2) if self.timestep == "sigma" else -log_snr / 8

    def check(self, t: Tensor) -> None:
        """Raise ValueError where ``t`` is not finite, or not a positive sigma."""
        lowest = 0.0 if self.timestep == "sigma" else -math.inf
        check_range(t, lowest, math.inf, without_low=True, without_high=True)

    def grid(self) -> Tensor:
        """Return 1001 timesteps, log-uniform in sigma from sigma_min to sigma_max."""
        ends = (math.log(self.sigma_min), math.log(self.sigma_max))
        log_sigma = torch.linspace(*ends, 1001, dtype=torch.float64)
        return log_sigma.exp() if self.timestep == "sigma" else 0.25 * log_sigma


def _require(owner: object, holds: bool, name: str, rule: str) -> None:
    if not holds:
        raise ValueError(f"`{type(owner).__name__}({name}=...)` must be {rule}, got {getattr(owner, name)!r}.")
