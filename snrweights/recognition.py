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
from snrweights.weightings.base import Weighting, get_weighting, list_weightings

_GRID = torch.logspace(-3, 3, 61, dtype=torch.float64).tolist()  # where a hyperparameter is looked for at first
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


def is_constant(weight: Tensor, tolerance: float) -> bool:
    """Whether a measured weight is the same for all samples.

    Example:
        >>> is_constant(torch.tensor([2.0, 2.0001]), 1e-3)
        True
    """
    return bool(weight.max() - weight.min() <= tolerance * weight.abs().max())


def recognise(
    log_snr: Tensor, weight: Tensor, schedule: Schedule, prediction_type: str, tolerance: float = 1e-3
) -> list[Recognition]:
    """Return the known weightings that a measured weight equals, up to a factor.

    Args:
        log_snr: (N,) of the samples.
        weight: (N,) measured, on the MSE of ``prediction_type``; positive and finite.
        schedule: of the timesteps.
        prediction_type: of the model.
        tolerance: largest relative deviation that counts as equal.

    Returns:
        The best fit of each weighting within the tolerance, those without a hyperparameter first. A constant weight is
        ``native`` and nothing else.

    Example:
        >>> from snrweights import DiscreteSchedule
        >>> schedule = DiscreteSchedule.from_name("linear")
        >>> log_snr = schedule.log_snr(torch.arange(0, 1000, 50))
        >>> measured = torch.minimum(log_snr.exp(), torch.tensor(5.0)) / (log_snr.exp() + 1)
        >>> str(recognise(log_snr, measured, schedule, "v_prediction")[0])
        'min_snr(gamma=5)'
    """
    log_snr, log_weight = log_snr.double(), weight.double().log()
    if is_constant(weight, tolerance):
        return [
            Recognition("native", {}, float(log_weight.median().exp()), _deviation(log_weight - log_weight.median()))
        ]
    found = []
    for weighting in _candidates():
        fit = _fit(weighting, log_snr, log_weight, schedule, prediction_type)
        if fit is not None and fit.deviation <= tolerance:
            found.append(fit)
    found.sort(key=lambda fit: len(fit.hyperparameters))  # what needs no fit explains more
    return found


def _candidates() -> Iterator[Weighting]:
    yield from (PlainMSE(target) for target in PREDICTION_TYPES)
    yield from (get_weighting(name) for name in list_weightings())
    yield from (parity.get(name) for name in parity.names())


def _fit(
    weighting: Weighting, log_snr: Tensor, log_weight: Tensor, schedule: Schedule, prediction_type: str
) -> Recognition | None:
    """Fit the factor, and the hyperparameter if the weighting has just one number."""

    def compare(candidate: Weighting) -> tuple[float, float]:
        curve = candidate.curve(schedule, prediction_type=prediction_type)
        difference = log_weight - curve.log_weight(log_snr)
        middle = float(difference.median())
        worst = _deviation(difference - middle)
        return (worst if worst == worst else math.inf), middle

    numbers = [name for name, value in weighting.hyperparameters().items() if isinstance(value, float)]
    try:
        if len(numbers) == 1:
            weighting = dataclasses.replace(weighting, **{numbers[0]: _search(weighting, numbers[0], compare)})  # type: ignore[type-var]
        deviation, middle = compare(weighting)
    except ValueError:  # a weight that this prediction type or schedule does not have
        return None
    values: dict[str, Any] = {name: getattr(weighting, name) for name in numbers}
    return Recognition(weighting.name, values, math.exp(middle), deviation)


def _search(weighting: Weighting, name: str, compare: Any) -> float:
    """Minimise the deviation over one positive hyperparameter: a grid, then a golden section in its logarithm."""

    def at(value: float) -> float:
        return float(compare(dataclasses.replace(weighting, **{name: value}))[0])  # type: ignore[type-var]

    default = getattr(weighting, name)
    grid = sorted({*_GRID, default}) if default > 0 else [default]
    best = min(range(len(grid)), key=lambda i: at(grid[i]))
    if len(grid) == 1 or at(default) <= 1e-6:
        return float(default)
    low, high = math.log(grid[max(best - 1, 0)]), math.log(grid[min(best + 1, len(grid) - 1)])
    for _ in range(40):
        a, b = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        low, high = (low, b) if at(math.exp(a)) <= at(math.exp(b)) else (a, high)
    value = math.exp((low + high) / 2)
    rounded = float(f"{value:.3g}")
    return min((value, rounded, grid[best]), key=lambda v: (round(at(v), 6), v != rounded))


def _deviation(log_ratio: Tensor) -> float:
    return float(torch.expm1(log_ratio.abs().max()))
