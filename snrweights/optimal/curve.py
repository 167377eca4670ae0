"""The result: the optimal loss by noise level, between the levels, in the units of every target, on disk."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from snrweights.files import save_tensors
from snrweights.predictions import LIMIT, log_error_ratio
from snrweights.schedules import exact_dtype

HOW = ("pairs", "importance", "bound")
_TENSORS = ("confused", "sigmas", "stderr", "value")
_POINTS_PER_BIN = 64
_SMALLEST = 1e-300


@dataclass(frozen=True, eq=False, repr=False)
class OptimalLossCurve:
    """J at noise levels, in x0 units, summed over dimensions.

    Attributes:
        sigmas: (L,) sigma / alpha, increasing, float64.
        value: (L,) J.
        stderr: (L,) its standard error; 0 for a bound.
        how: per level, ``pairs`` (the one pass), ``importance`` (mid-point importance sampling) or ``bound`` (no less
            than J).
        confused: (L,) draws whose posterior leaves the source less than 0.9.
        made: what it was made from: ``data`` (SHA-256), ``points``, ``dim``, ``variance`` (the limit of J at large
            sigma), ``second_moment`` (mean ||x||²), ``groups``, ``flips``, ``scale``, ``draws``, ``seed``, ``version``.

    Example:
        >>> x = torch.tensor([[-0.5], [0.5]])
        >>> from snrweights.optimal import optimal_loss
        >>> curve = optimal_loss(x, [0.5, 1.0], draws=2000)
        >>> curve.how
        ('pairs', 'pairs')
    """

    sigmas: Tensor
    value: Tensor
    stderr: Tensor
    how: tuple[str, ...]
    confused: Tensor
    made: dict[str, Any] = field(default_factory=dict)
    _cubics: dict[torch.device, MonotoneCubic] = field(default_factory=dict, init=False)

    def __repr__(self) -> str:
        of = ", ".join(f"{name} {self.made[name]}" for name in ("points", "dim") if name in self.made)
        low, high = float(self.sigmas[0]), float(self.sigmas[-1])
        return f"{type(self).__name__}({len(self.sigmas)} levels, sigma {low:g} to {high:g}{of and ', ' + of})"

    def log_value(self, log_snr: Tensor) -> Tensor:
        """Return ln J at finite ``log_snr``, any shape, on its device: x0 units, summed over dimensions.

        Between levels interpolated in ln sigma by monotone cubics, through the values made non-decreasing, as J is.
        Below the smallest level continued by its last slope, which is no less than ln J; above the largest by
        A - J ∝ 1 / sigma², which it becomes, A the variance of the data.

        Example:
            >>> levels = torch.tensor([1.0, 2.0], dtype=torch.float64)
            >>> curve = OptimalLossCurve(levels, levels**2, 0 * levels, ("pairs",) * 2, levels, {"variance": 5.0})
            >>> curve.log_value(torch.tensor([4.0, 0.0, -100.0]))
            tensor([-4.0000,  0.0000,  1.6094], dtype=torch.float64)
        """
        cubic = self._cubic(log_snr.device)
        log_sigma = log_snr.to(cubic.x) / -2
        beyond = (log_sigma - cubic.x[-1]).clamp_min(0)
        missing = 1 - (cubic.y[-1].exp() / self.made["variance"]).clamp_max(1)
        above = math.log(self.made["variance"]) + torch.log1p(-missing * torch.exp(-2 * beyond))
        return torch.where(beyond > 0, above, cubic(log_sigma))

    def mean_loss(self, log_snr: Tensor, prediction_type: str = "sample", sigma_data: float | None = None) -> Tensor:
        """Return the optimal loss of a target at any ``log_snr``, on its device: the mean over dimensions.

        Beyond the levels as in ``log_value``.

        Args:
            log_snr: any shape, infinities included.
            prediction_type: the target.
            sigma_data: for ``edm``.

        Example:
            >>> levels = torch.tensor([1.0, 2.0], dtype=torch.float64)
            >>> made = {"dim": 4, "variance": 8.0}
            >>> curve = OptimalLossCurve(levels, levels**2, 0 * levels, ("pairs",) * 2, levels, made)
            >>> curve.mean_loss(torch.tensor([-torch.inf, 0.0, torch.inf]))
            tensor([2.0000, 0.2500, 0.0000], dtype=torch.float64)
        """
        finite = log_snr.clamp(-LIMIT, LIMIT)
        log_ratio = log_error_ratio(prediction_type, finite.to(exact_dtype(finite.device)), sigma_data)
        return (self.log_value(finite) + log_ratio).exp() / self.made["dim"]

    def _cubic(self, device: torch.device) -> MonotoneCubic:
        if device not in self._cubics:  # copied once: a copy from the host waits for the device
            log_value = self.value.clamp_min(_SMALLEST).cummax(0).values.log()
            x, y = (table.to(device, exact_dtype(device)) for table in (self.sigmas.log(), log_value))
            self._cubics[device] = MonotoneCubic(x, y)
        return self._cubics[device]

    def at(
        self, sigmas: Tensor, prediction_type: str = "sample", reduction: str = "sum", sigma_data: float | None = None
    ) -> Tensor:
        """Return J at ``sigmas`` (any shape), float64, as the loss of a target: J ||e_y||² / ||e_x0||².

        Between levels as in ``log_value``.

        Args:
            sigmas: inside the range of levels.
            prediction_type: the target.
            reduction: ``sum`` or ``mean`` over dimensions.
            sigma_data: for ``edm``.

        Raises:
            ValueError: a level outside the range, unknown target or reduction.

        Example:
            >>> made = {"dim": 4}
            >>> levels = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
            >>> curve = OptimalLossCurve(levels, levels**2, 0 * levels, ("pairs",) * 3, levels, made)
            >>> curve.at(torch.tensor([2.0, 4.0]), "epsilon", "mean")
            tensor([0.2500, 0.2500], dtype=torch.float64)
        """
        if reduction not in ("sum", "mean"):
            raise ValueError(f"Unknown `reduction` {reduction!r}; choose one of ['sum', 'mean'].")
        wanted = torch.as_tensor(sigmas, dtype=torch.float64).cpu()
        low, high = float(self.sigmas[0]), float(self.sigmas[-1])
        slack = 1e-6  # of float32
        if not bool(((wanted >= low * (1 - slack)) & (wanted <= high * (1 + slack))).all()):
            raise ValueError(f"`sigmas` must lie in [{low:g}, {high:g}], where the curve is, got {sigmas}.")
        log_value = self._cubic(wanted.device)(wanted.clamp(low, high).log())
        log_ratio = log_error_ratio(prediction_type, -2 * wanted.log(), sigma_data)
        value = (log_value + log_ratio).exp()
        return value / self.made["dim"] if reduction == "mean" else value

    def stderr_at(self, sigmas: Tensor) -> Tensor:
        """Return the standard error of J at ``sigmas``, any shape, float64: relative to J, linear in ln sigma.

        Of a bound it is the bound itself, since J may be anything below.

        Example:
            >>> levels = torch.tensor([1.0, 4.0], dtype=torch.float64)
            >>> curve = OptimalLossCurve(levels, levels**2, levels**2 / 10, ("pairs",) * 2, levels)
            >>> curve.stderr_at(torch.tensor([2.0]))
            tensor([0.4000], dtype=torch.float64)
        """
        at = torch.as_tensor(sigmas, dtype=torch.float64).cpu()
        bound = torch.tensor([how == "bound" for how in self.how])
        relative = torch.where(bound, 1.0, self.stderr / self.value.clamp_min(_SMALLEST))
        between = np.interp(at.log().numpy(), self.sigmas.log().numpy(), relative.numpy())
        return self.at(at) * torch.from_numpy(np.asarray(between))

    def interpolation_error_at(self, sigmas: Tensor) -> Tensor:
        """Return about how far interpolation is off at ``sigmas``, any shape, float64; 0 of fewer than four levels.

        It is how far interpolation between every second level is from it: too much where J bends little, and too
        little between the first levels, where ln J bends most.

        Example:
            >>> levels = torch.logspace(-1, 1, 9, dtype=torch.float64)
            >>> curve = OptimalLossCurve(levels, levels**2, 0 * levels, ("pairs",) * 9, levels)
            >>> bool(curve.interpolation_error_at(torch.tensor([0.5])) < 1e-15)  # a power is met exactly
            True
        """
        at = torch.as_tensor(sigmas, dtype=torch.float64).cpu()
        whole = self._cubic(at.device)
        if len(whole.x) < 4:
            return torch.zeros_like(at)
        some = torch.arange(len(whole.x) - 1, -1, -2).flip(0)
        some = some if some[0] == 0 else torch.cat([torch.tensor([0]), some])
        half = MonotoneCubic(whole.x[some], whole.y[some])
        log_sigma = at.log().clamp(whole.x[0], whole.x[-1])
        return self.at(at) * torch.expm1((half(log_sigma) - whole(log_sigma)).abs())

    def bin_means(
        self,
        edges: Tensor,
        prediction_type: str = "sample",
        reduction: str = "mean",
        sigma_data: float | None = None,
    ) -> Tensor:
        """Return the mean of the optimal loss over each log-SNR bin (bins,), uniform in log-SNR inside a bin.

        Args:
            edges: (bins + 1,) log-SNR = -2 ln sigma, increasing, inside the range of levels.
            prediction_type: the target.
            reduction: ``mean`` or ``sum`` over dimensions.
            sigma_data: for ``edm``.

        Example:
            >>> levels = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
            >>> curve = OptimalLossCurve(levels, levels**2, 0 * levels, ("pairs",) * 3, levels, {"dim": 1})
            >>> curve.bin_means(torch.tensor([-2.0, -1.0, 0.0]), "epsilon")
            tensor([1.0000, 1.0000], dtype=torch.float64)
        """
        edges = torch.as_tensor(edges, dtype=torch.float64).cpu()
        share, weight = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(_POINTS_PER_BIN))
        points = edges[:-1, None] + edges.diff()[:, None] * (share + 1) / 2
        values = self.at((-points / 2).exp(), prediction_type, reduction, sigma_data)
        return values @ weight / 2

    def area(self) -> float:
        """Return ∫ J / s² d ln s: ln N for N different points, if the levels reach from no confusion to J = variance.

        Beyond the largest level J is taken for its limit, the variance of the data.

        Example:
            >>> levels = torch.logspace(-2, 1, 9, dtype=torch.float64)
            >>> curve = OptimalLossCurve(levels, levels**2, 0 * levels, ("pairs",) * 9, levels, {"variance": 0.0})
            >>> round(curve.area() / torch.log(levels[-1] / levels[0]).item(), 6)
            1.0
        """
        inside = self.bin_means(-2 * self.sigmas.log().flip(0), "epsilon", "sum") @ self.sigmas.log().diff().flip(0)
        return float(inside) + self.made["variance"] / (2 * float(self.sigmas[-1]) ** 2)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the curve as safetensors, aside and then renamed; what it was made from goes into the metadata."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        save_tensors(path, tensors, {"how": json.dumps(self.how), "made": json.dumps(self.made)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> OptimalLossCurve:
        """Return the curve of a file that ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a curve's file, or damaged.
        """
        try:
            tensors = load_file(path)
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
            if set(tensors) != set(_TENSORS) or set(metadata) != {"how", "made"}:
                raise ValueError(f"it has {sorted(tensors)} and the metadata {sorted(metadata)}")
            curve = cls(**tensors, how=tuple(json.loads(metadata["how"])), made=json.loads(metadata["made"]))
            curve._check()
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"`path` {os.fspath(path)!r} is not the file of an OptimalLossCurve: {error}") from None
        return curve

    def _check(self) -> None:
        for name in _TENSORS:
            tensor = getattr(self, name)
            if tensor.shape != (len(self.how),) or not bool((tensor.isfinite() & (tensor >= 0)).all()):
                raise ValueError(f"`{name}` is not of {len(self.how)} finite, non-negative numbers")
        for name in ("dim", "variance"):
            value = self.made.get(name)
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"`made` has {name} {value!r}, not a positive number")
        if not bool((self.sigmas.diff() > 0).all()) or not bool((self.sigmas > 0).all()):
            raise ValueError("`sigmas` do not increase")
        if unknown := set(self.how) - set(HOW):
            raise ValueError(f"`how` has {sorted(unknown)}; known are {list(HOW)}")


class MonotoneCubic:
    """Cubics through y (L,), never falling, over increasing x (L,), that never fall; below x by the first tangent.

    Tangents are those of the parabola through three neighbours, held in [0, 3 times the smaller slope beside them],
    which suffices (Fritsch & Carlson 1980; Hyman 1983).
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y
        self.tangent = torch.zeros_like(y) if len(x) == 1 else _tangents(x, y)

    def __call__(self, at: Tensor) -> Tensor:
        """Return the cubics at ``at``, any shape, up to the last x."""
        if len(self.x) == 1:
            return self.y.expand(at.shape)
        x, y, tangent = self.x, self.y, self.tangent
        i = (torch.bucketize(at.contiguous(), x, right=True) - 1).clamp(0, len(x) - 2)
        h = x[i + 1] - x[i]
        t = ((at - x[i]) / h).clamp(0, 1)
        ends = (1 + 2 * t) * (1 - t) ** 2 * y[i] + t**2 * (3 - 2 * t) * y[i + 1]
        inside = ends + h * (t * (1 - t) ** 2 * tangent[i] - t**2 * (1 - t) * tangent[i + 1])
        return inside + (at - x[0]).clamp_max(0) * tangent[0]


def _tangents(x: Tensor, y: Tensor) -> Tensor:
    step = x.diff()
    slope = y.diff() / step
    tangent = torch.cat([slope[:1], slope[-1:]])
    if len(x) > 2:
        bend = slope.diff() / (step[1:] + step[:-1])
        inner = slope[:-1] + step[:-1] * bend
        tangent = torch.cat([slope[:1] - step[:1] * bend[:1], inner, slope[-1:] + step[-1:] * bend[-1:]])
    smaller = torch.minimum(torch.cat([slope[:1], slope]), torch.cat([slope, slope[-1:]]))
    return torch.minimum(tangent.clamp_min(0), 3 * smaller)
