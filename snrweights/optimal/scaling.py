"""How the loss falls with compute or parameters, before and after the optimal loss is taken off: power laws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from snrweights.seeds import generator


@dataclass(frozen=True)
class PowerLaw:
    """``L(F) = offset + coefficient F^-exponent``, fitted by least squares of ln(L - offset) on ln F.

    Attributes:
        offset: as it was given, not fitted.
        coefficient: a, in the unit of the loss at F = 1.
        exponent: b.
        coefficient_interval: bounds of a.
        exponent_interval: bounds of b.
        r_squared: share of the variance of ln(L - offset) that the law explains.
        correlation: of ln F and ln(L - offset): near -1 where the loss falls as a power.

    Example:
        >>> PowerLaw(0.1, 2.0, 0.5, (2.0, 2.0), (0.5, 0.5), 1.0, -1.0).at(torch.tensor([4.0]))
        tensor([1.1000], dtype=torch.float64)
    """

    offset: float
    coefficient: float
    exponent: float
    coefficient_interval: tuple[float, float]
    exponent_interval: tuple[float, float]
    r_squared: float
    correlation: float

    def at(self, size: Tensor) -> Tensor:
        """Return the law's loss at ``size``, any shape, float64."""
        return self.offset + self.coefficient * size.double() ** -self.exponent


def power_law(
    size: Tensor | Sequence[float],
    loss: Tensor | Sequence[float] | Sequence[Sequence[float]],
    offset: float = 0.0,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> PowerLaw:
    """Fit ``L(F) = offset + a F^-b`` with the offset known: 0, or the optimal loss.

    Errors of ln(L - offset) are taken as independent, with one distribution at every size; several losses of a size
    are so many points. Intervals are of the studentised bootstrap: residuals are drawn anew for every point, and the
    quantiles of (estimate - truth) / standard error among the resamples stand for the unknown ones. See
    tests/test_scaling.py for how often they hold the truth. They say nothing of a wrong offset.

    Args:
        size: (n,) compute or parameters, positive, in any unit.
        loss: (n,) losses, or (n, seeds).
        offset: what the loss would tend to, in its own unit.
        confidence: of the intervals.
        resamples: of the bootstrap.
        seed: of the resamples.

    Raises:
        ValueError: fewer than three points or two sizes, shapes that do not fit, sizes or losses that are not positive
            and finite, or losses at or below the offset, which are named.

    Source: Xu et al. 2025, arXiv 2506.13763, for the offset (published, read second-hand: the correlation rises from
    .82 to .94, and a total loss follows J(F) = .3675 F^-0.014 + .015); the intervals are this project's.

    Example:
        >>> law = power_law([1.0, 4.0, 16.0, 64.0], [2.5, 1.5, 1.0, 0.75], offset=0.5)
        >>> round(law.coefficient, 6), round(law.exponent, 6), round(law.r_squared, 6)
        (2.0, 0.5, 1.0)
    """
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be in (0, 1), got {confidence}.")
    if resamples < 100:
        raise ValueError(f"`resamples` must be at least 100, got {resamples}.")
    sizes, losses = _points(size, loss)
    if low := [f"{f:g} (loss {y:g})" for f, y in zip(sizes.tolist(), losses.tolist(), strict=True) if not y > offset]:
        raise ValueError(
            f"`loss` must be above `offset` {offset:g}, the optimal loss; it is not at size {', '.join(low)}."
        )
    x, y = sizes.log(), (losses - offset).log()
    mean = x.mean()
    x = x - mean  # so that the errors of slope and intercept are independent; a is that at x = -mean
    at = torch.tensor([[0.0, 1.0], [1.0, -float(mean)]], dtype=torch.float64)  # b' and ln a of (intercept, slope)
    fitted, errors, residual = _regression(x, y[None], at)
    index = torch.randint(len(x), (resamples, len(x)), generator=generator(seed, 0))
    again, again_errors, _ = _regression(x, residual[0][index], at)
    # the truth of a resample is 0; without a spread, of residuals that are all equal, it has no error either
    ratios = torch.where(again_errors > 0, again / again_errors, 0.0)
    tail = (1 - confidence) / 2
    upper, lower = ratios.quantile(torch.tensor([1 - tail, tail], dtype=torch.float64), 0)
    (slope, log_a), error = fitted[0].tolist(), errors[0]
    bounds = torch.stack((fitted[0] - upper * error, fitted[0] - lower * error)).tolist()
    spread = y - y.mean()
    total = float(spread.square().sum())
    explained = 1 - float(residual.square().sum()) / total if total > 0 else math.nan
    return PowerLaw(
        offset=float(offset),
        coefficient=_exp(log_a),
        exponent=-slope,
        coefficient_interval=(_exp(bounds[0][1]), _exp(bounds[1][1])),
        exponent_interval=(-bounds[1][0], -bounds[0][0]),
        r_squared=explained,
        correlation=float(x @ spread) / math.sqrt(float(x @ x) * total) if total > 0 else math.nan,
    )


def _exp(x: float) -> float:
    """Return e^x, infinity where float64 has no room for it: bounds from three points can be that wide."""
    return math.exp(x) if x < 709 else math.inf


def raw_and_subtracted(
    size: Tensor | Sequence[float],
    loss: Tensor | Sequence[float] | Sequence[Sequence[float]],
    optimum: float,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, PowerLaw]:
    """Return two fits to the same losses: ``raw``, offset 0, and ``subtracted``, with the optimal loss for an offset.

    Their R² are of different quantities, ln L and ln(L - optimum); arguments and errors are those of ``power_law``.

    Example:
        >>> laws = raw_and_subtracted([1.0, 4.0, 16.0, 64.0], [2.5, 1.5, 1.0, 0.75], 0.5)
        >>> laws["raw"].r_squared < laws["subtracted"].r_squared
        True
    """
    options = {"confidence": confidence, "seed": seed}
    offsets = {"raw": 0.0, "subtracted": optimum}
    return {name: power_law(size, loss, at, resamples=resamples, **options) for name, at in offsets.items()}  # type: ignore[arg-type]


def _points(size: object, loss: object) -> tuple[Tensor, Tensor]:
    """Return sizes and losses of all points (n,), checked."""
    sizes, losses = (torch.as_tensor(x, dtype=torch.float64).cpu() for x in (size, loss))
    if sizes.ndim != 1 or losses.ndim not in (1, 2) or len(losses) != len(sizes):
        raise ValueError(
            f"`size` must be (n,) and `loss` (n,) or (n, seeds), got {tuple(sizes.shape)} and {tuple(losses.shape)}."
        )
    if losses.ndim == 2:
        sizes, losses = sizes.repeat_interleave(losses.shape[1]), losses.flatten()
    for name, values in (("size", sizes), ("loss", losses)):
        if not bool((values.isfinite() & (values > 0)).all()):
            raise ValueError(f"`{name}` must be positive and finite, got {values.tolist()}.")
    if len(sizes) < 3 or len(sizes.unique()) < 2:
        raise ValueError(f"A power law needs three points of two sizes at least, got sizes {sizes.tolist()}.")
    return sizes, losses


def _regression(x: Tensor, y: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Regress y (R, n) on centred x (n,): combinations ``at`` (2, 2) of intercept and slope, errors, residuals."""
    square = x @ x
    parameters = torch.stack((y.mean(1), y @ x / square), 1)
    residual = y - parameters[:, :1] - parameters[:, 1:] * x
    noise = residual.square().sum(1, keepdim=True) / (len(x) - 2)
    variance = noise * torch.stack((torch.full_like(square, 1 / len(x)), 1 / square))
    return parameters @ at.T, (variance @ at.T.square()).sqrt(), residual
