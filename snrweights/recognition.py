"""Which known weighting a measured weight is: names and hyperparameters, up to a constant factor."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from snrweights.predictions import PREDICTION_TYPES
from snrweights.schedules import Schedule
from snrweights.weightings import parity
from snrweights.weightings.base import Weighting, get_weighting, list_weightings, needed_by

_GRID = torch.logspace(-3, 3, 61, dtype=torch.float64).tolist()  # where a positive hyperparameter is looked for
_LINE = torch.linspace(-10, 10, 41, dtype=torch.float64).tolist()  # and any other
_FEW = 12  # samples, below which no dependence on the noise level is inferred
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Recognition:
    """A known weighting that a measured weight equals.

    Attributes:
        name: in ``list_weightings()`` or ``parity.names()``, or ``"the plain MSE of ..."`` another target.
        hyperparameters: those of the fit.
        factor: measured over known: the scale of the loss.
        deviation: largest relative deviation after that factor.
    """

    name: str
    hyperparameters: dict[str, float]
    factor: float
    deviation: float

    def __str__(self) -> str:
        values = ", ".join(f"{name}={value:.4g}" for name, value in self.hyperparameters.items())
        scale = "" if abs(self.factor - 1) < 5e-4 else f" times {self.factor:.4g}"
        return self.name + (f"({values})" if values else "") + scale


@dataclass(frozen=True)
class PlainMSE(Weighting):
    """The unweighted MSE of a target, seen from another one."""

    target: str = "epsilon"  # type: ignore[misc]

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", f"the plain MSE of {self.target}")

    def log_weight(self, log_snr: Tensor) -> Tensor:
        """Return 0."""
        return torch.zeros_like(log_snr)


def depends_on_noise(log_snr: Tensor, weight: Tensor, groups: Tensor, tolerance: float) -> bool:
    """Whether a weight varies with the noise level, beyond a factor for each group of samples.

    Weights that differ otherwise (between data sets, by masks, by a scaler's back-off) do not: neighbours in log-SNR
    are no more alike than others. That is Bartels' rank version of von Neumann's ratio, at p < 0.001.

    Args:
        log_snr: (N,) of the samples.
        weight: (N,); not negative. Zeros count as the lowest.
        groups: (N,) int: which samples share a factor.
        tolerance: relative deviation that counts as none.

    Example:
        >>> log_snr, groups = torch.linspace(-3, 3, 20), torch.zeros(20, dtype=torch.int64)
        >>> depends_on_noise(log_snr, log_snr.sigmoid(), groups, 1e-3)
        True
        >>> depends_on_noise(log_snr, torch.full((20,), 3.0), groups, 1e-3)
        False
    """
    log_weight = weight.double().log()
    if bool(log_weight.isfinite().all()) and _deviation(_without_factors(log_weight, groups)) <= tolerance:
        return False
    ranks = log_weight[log_snr.argsort()].argsort().argsort().double()
    n = len(ranks)
    if n < _FEW:
        return False
    ratio = ranks.diff().square().sum() / (ranks - ranks.mean()).square().sum()
    return bool(ratio < 2 - 3.1 * 2 / math.sqrt(n))


def _without_factors(log_values: Tensor, groups: Tensor) -> Tensor:
    """Subtract from each group the middle of its range."""
    _, place = groups.unique(return_inverse=True)
    finite = log_values.isfinite()
    count = int(place.max()) + 1
    high = torch.full((count,), -math.inf, dtype=log_values.dtype)
    high = high.scatter_reduce(0, place[finite], log_values[finite], "amax")
    low = torch.full((count,), math.inf, dtype=log_values.dtype)
    low = low.scatter_reduce(0, place[finite], log_values[finite], "amin")
    return log_values - ((high + low) / 2)[place]


def recognise(
    log_snr: Tensor,
    weight: Tensor,
    schedule: Schedule,
    prediction_type: str,
    tolerance: float = 1e-3,
    groups: Tensor | None = None,
) -> list[Recognition]:
    """Return the known weightings that a measured weight equals, up to a factor.

    Args:
        log_snr: (N,) of the samples.
        weight: (N,) measured, on the MSE of ``prediction_type``; positive and finite.
        schedule: of the timesteps.
        prediction_type: of the model.
        tolerance: largest relative deviation that counts as equal.
        groups: (N,) int: which samples share a factor; by default all.

    Returns:
        The best fit of each weighting within the tolerance, in one of its hyperparameters at most, those without any
        first. A constant weight is ``native`` and nothing else; from too few different samples nothing is recognised.

    Example:
        >>> from snrweights import DiscreteSchedule
        >>> schedule = DiscreteSchedule.from_name("linear")
        >>> log_snr = schedule.log_snr(torch.arange(0, 1000, 50))
        >>> measured = torch.minimum(log_snr.exp(), torch.tensor(5.0)) / (log_snr.exp() + 1)
        >>> str(recognise(log_snr, measured, schedule, "v_prediction")[0])
        'min_snr(gamma=5)'
    """
    groups = torch.zeros(len(weight), dtype=torch.int64) if groups is None else groups
    log_snr, log_weight = log_snr.double(), weight.double().log()
    if not bool(log_weight.isfinite().all()):
        raise ValueError("`weight` must be positive and finite.")
    residual = _without_factors(log_weight, groups)
    if _deviation(residual) <= tolerance:
        return [Recognition("native", {}, float((log_weight - residual).median().exp()), _deviation(residual))]
    free = _comparisons(log_snr, groups)
    found = []
    for weighting in _candidates():
        fit = _fit(weighting, log_snr, log_weight, groups, schedule, prediction_type)
        if fit is not None and fit.deviation <= tolerance and free >= 2 + len(fit.hyperparameters):
            found.append(fit)
    found.sort(key=lambda fit: len(fit.hyperparameters))  # what needs no fit explains more
    return found


def _comparisons(log_snr: Tensor, groups: Tensor) -> int:
    """How many independent ratios of weights at different noise levels there are."""
    within = len(torch.stack((log_snr, groups.double())).unique(dim=1)[0]) - len(groups.unique())
    return min(len(log_snr.unique()) - 1, within)


def _candidates() -> Iterator[Weighting]:
    yield from (PlainMSE(target) for target in PREDICTION_TYPES)
    yield from (get_weighting(name) for name in list_weightings() if not needed_by(name))
    yield from (parity.get(name) for name in parity.names())


def _fit(
    weighting: Weighting,
    log_snr: Tensor,
    log_weight: Tensor,
    groups: Tensor,
    schedule: Schedule,
    prediction_type: str,
) -> Recognition | None:
    """Fit the factors, and the hyperparameter that helps most."""

    def compare(candidate: Weighting) -> tuple[float, float]:
        curve = candidate.over_log_snr(schedule, prediction_type=prediction_type)
        difference = log_weight - curve.log_weight(log_snr)
        residual = _without_factors(difference, groups)
        worst = _deviation(residual)
        return (worst if worst == worst else math.inf), float((difference - residual).median())

    numbers = [
        field.name
        for field in dataclasses.fields(weighting)  # type: ignore[arg-type]
        if isinstance(field.default, float) and field.metadata.get("in_curve", True)
    ]
    try:
        fits = [_search(weighting, name, compare) for name in numbers] or [weighting]
        best = min(fits, key=lambda fit: compare(fit)[0])
        deviation, middle = compare(best)
    except ValueError:  # a weight that this prediction type or schedule does not have
        return None
    values: dict[str, Any] = {name: getattr(best, name) for name in numbers}
    return Recognition(best.name, values, math.exp(middle), deviation)


def _search(weighting: Weighting, name: str, compare: Any) -> Weighting:
    """Minimise the deviation over one hyperparameter: a grid, then a golden section; in its logarithm if it is > 0."""
    field = next(field for field in dataclasses.fields(weighting) if field.name == name)  # type: ignore[arg-type]
    positive = field.metadata.get("above") is not None
    to, back = (math.exp, math.log) if positive else (float, float)

    def with_value(value: float) -> Weighting:
        return dataclasses.replace(weighting, **{name: value})  # type: ignore[type-var]

    def at(value: float) -> float:
        return float(compare(with_value(value))[0])

    default = getattr(weighting, name)
    if at(default) <= 1e-6:
        return weighting
    grid = sorted({*(_GRID if positive else _LINE), default})
    best = min(range(len(grid)), key=lambda i: at(grid[i]))
    low, high = back(grid[max(best - 1, 0)]), back(grid[min(best + 1, len(grid) - 1)])
    for _ in range(40):
        a, b = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        low, high = (low, b) if at(to(a)) <= at(to(b)) else (a, high)
    value = to((low + high) / 2)
    if best in (0, len(grid) - 1):  # a limit of the family, which another one has as itself
        return weighting
    rounded = float(f"{value:.3g}")
    return with_value(min((value, rounded, grid[best]), key=lambda v: (round(at(v), 6), v != rounded)))


def _deviation(log_ratio: Tensor) -> float:
    return float(torch.expm1(log_ratio.abs().max()))
