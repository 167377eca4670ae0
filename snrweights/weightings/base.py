"""What a weighting is, where weightings are registered, and how to get one."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from snrweights.densities import Density, exact
from snrweights.drawn import as_density
from snrweights.predictions import check_prediction_type
from snrweights.schedulers import as_schedule
from snrweights.schedules import Schedule
from snrweights.weightings.bound import BoundWeighting, WeightCurve

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:  # in typing from Python 3.11 on, and of use to type checkers alone

    def dataclass_transform(**options):
        """Do nothing."""
        del options
        return lambda decorator: decorator


Normalize = Literal["mean"] | None
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def hyper(
    default: Any,
    *,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
    in_curve: bool = True,
    number: bool = True,
) -> Any:
    """Declare a hyperparameter of a weighting: a finite number (``> above``, ``< below``), or one of ``choices``.

    ``in_curve=False`` says that the weight as a function of log-SNR alone does not depend on it; ``number=False``, that
    it is something else, which the class checks.

    Example:
        >>> get_weighting("min_snr", gamma=0)
        Traceback (most recent call last):
        ValueError: `MinSNR(gamma=...)` must be > 0, got 0.
    """
    metadata = {"above": above, "below": below, "choices": choices, "in_curve": in_curve, "number": number}
    return dataclasses.field(default=default, metadata=metadata)


class Formula:
    """What a registry holds: a formula with its name, source and checked hyperparameters.

    Attributes:
        name: its name in the registry.
        formula: for people.
        source: the paper.
        needs: hyperparameters that have no default.

    Example:
        >>> get_weighting("min_snr").formula
        'w_x0 = min(SNR, gamma)'
    """

    name: ClassVar[str]
    formula: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            _check_hyperparameter(self, field)

    @classmethod
    def hyperparameters(cls) -> dict[str, Any]:
        """Return names and defaults of the hyperparameters."""
        return {field.name: field.default for field in dataclasses.fields(cls)}  # type: ignore[arg-type]


class Weighting(Formula, ABC):
    """One weighting: a formula over log-SNR, on the MSE of the target in which it is simplest.

    Subclass it under ``@register_weighting``, declare hyperparameters with ``hyper`` and write ``log_weight``. The
    conversion table turns it into every other target.

    Attributes:
        target: what ``log_weight`` multiplies: a prediction type; ``"native"``, the loss's own target whatever it is;
            or ``"objective"``, where it is w_KG and the weight is w_KG / p with p the density of the draws.
        formula: for people, in w_eps, w_x0 or w_KG.
        rule: of ``ImportanceSampler``, by which timesteps are best drawn for it where it has no density of its own.

    Example:
        >>> get_weighting("min_snr").target, get_weighting("min_snr").hyperparameters()
        ('sample', {'gamma': 5.0})
    """

    target: ClassVar[str]
    refuses_infinities: ClassVar[bool] = True
    rule: ClassVar[str | None] = None

    @abstractmethod
    def log_weight(self, log_snr: Tensor) -> Tensor:
        """Return the natural logarithm of the weight at ``log_snr`` (any shape, float64, finite), same shape."""

    @property
    def batch_dependent(self) -> bool:
        """Whether the weight of a sample depends on the others in its batch."""
        return False

    @property
    def needs_loss(self) -> bool:
        """Whether it depends on their losses."""
        return False

    @property
    def averaged_over_steps(self) -> bool:
        """Whether what it depends on is averaged over many batches, so that the size of one matters little."""
        return False

    def for_draws(self, schedule: Schedule, density: Density) -> Weighting:
        """Return the weighting with what the schedule or the density of the draws decides filled in; here itself."""
        del schedule, density
        return self

    def own_density(self, prediction_type: str) -> Density | None:
        """Return the density that it asks log-SNR to be drawn from for a prediction type, or None."""
        del prediction_type
        return None

    def bound_to(self, curve: WeightCurve, schedule: Schedule, weights: Tensor) -> BoundWeighting:
        """Return what ``bind`` returns: the curve, checked, with its values on the schedule's grid."""
        return BoundWeighting(curve, schedule, weights)

    def over_log_snr(
        self,
        schedule: Any,
        *,
        prediction_type: str | None = None,
        density: Density | str | None = None,
        normalize: Normalize = None,
        clamp_max: float | None = None,
    ) -> WeightCurve:
        """Return the weight as a function of log-SNR, in float64; arguments as for ``bind``."""
        schedule = as_schedule(schedule)
        if prediction_type is None:
            prediction_type = schedule.prediction_type
        prediction_type = check_prediction_type(prediction_type)
        _check_normalize(normalize)
        if clamp_max is not None and not (_is_number(clamp_max) and clamp_max > 0):
            raise ValueError(f"`clamp_max` must be > 0, got {clamp_max!r}.")
        density = as_density(density, schedule)
        weighting = self.for_draws(schedule, density)
        curve = WeightCurve(weighting, prediction_type, density, schedule.sigma_data, clamp_max)
        return curve.normalized() if normalize == "mean" else curve

    def bind(
        self,
        schedule: Any,
        *,
        prediction_type: str | None = None,
        density: Density | str | None = None,
        normalize: Normalize = None,
        clamp_max: float | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> BoundWeighting:
        """Bind to a schedule: a snapshot that maps timesteps to weights, fast.

        Args:
            schedule: whatever ``as_schedule`` reads.
            prediction_type: the target whose plain MSE the loss equals; default: what the schedule states.
            density: density over log-SNR that the timesteps are really drawn from, or its name; default: uniform over
                the schedule's timesteps (``EDMSchedule``: the paper's log-normal). Weights defined by an objective and
                ``normalize`` need it.
            normalize: ``"mean"`` scales the weight to average 1 under the density.
            clamp_max: upper bound on the weight before normalisation, for weights that are infinite somewhere.
            dtype: of the weights returned; tables are built in float64.

        Returns:
            A callable from t (B,) to weights (B,).

        Raises:
            ValueError: a bad argument, or a weight that is not finite on a timestep of the schedule.
            TypeError: a schedule that cannot be read.

        Example:
            >>> bound = get_weighting("min_snr", gamma=5).bind("linear", prediction_type="v_prediction")
            >>> bound(torch.tensor([0, 500]))
            tensor([0.0005, 0.0778])
        """
        if dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of {list(DTYPES)}, got {dtype!r}.")
        _check_normalize(normalize)
        schedule = as_schedule(schedule)
        curve = self.over_log_snr(schedule, prediction_type=prediction_type, density=density, clamp_max=clamp_max)
        grid = schedule.grid()
        log_snr = schedule.log_snr(grid)
        weights = curve(log_snr)
        if self.refuses_infinities:
            _check_finite(curve, grid, weights)
        if normalize == "mean":
            curve = curve.normalized()
        weights = curve(log_snr).to(dtype)
        if self.refuses_infinities:
            _check_finite(curve, grid, weights)
        return curve.weighting.bound_to(curve, schedule, weights)


@dataclass(frozen=True)
class CallableWeighting(Weighting):
    """A user's function as a weighting: ``function(log_snr)`` returns w_eps, any shape, float64, non-negative."""

    function: Callable[[Tensor], Tensor]
    name: ClassVar[str] = "callable"
    target: ClassVar[str] = "epsilon"
    formula: ClassVar[str] = "the function given"
    source: ClassVar[str] = "the user"

    def __post_init__(self) -> None:
        pass

    def log_weight(self, log_snr: Tensor) -> Tensor:
        """Return ln of what the function returns, checked."""
        weight = self.function(log_snr)
        if not isinstance(weight, Tensor) or weight.shape != log_snr.shape:
            got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
            raise ValueError(f"The callable `method` must return a tensor of shape {tuple(log_snr.shape)}, got {got}.")
        if weight.device.type == "cpu" and bool((weight < 0).any()):
            raise ValueError(f"The callable `method` must return weights >= 0, got {weight.min().item():g}.")
        return exact(weight).log()


_REGISTRY: dict[str, type[Weighting]] = {}
W = TypeVar("W", bound=type[Weighting])
F = TypeVar("F", bound=Formula)


@dataclass_transform(frozen_default=True, field_specifiers=(hyper,))
def register_weighting(
    name: str, *, target: str, formula: str = "", source: str = "", registry: dict[str, type[Weighting]] = _REGISTRY
) -> Callable[[W], W]:
    """Register a weighting under ``name``: a frozen dataclass of its hyperparameters with one method, ``log_weight``.

    Args:
        name: how users call it.
        target: what ``log_weight`` multiplies; see ``Weighting.target``.
        formula: shown by ``snrweights methods``.
        source: likewise.
        registry: where; the package's own by default.

    Raises:
        ValueError: the name is taken, or the target unknown.

    Example:
        >>> @register_weighting("doctest_cube", target="epsilon", formula="SNR^-power")
        ... class Cube(Weighting):
        ...     power: float = hyper(3.0, above=0)
        ...     def log_weight(self, log_snr):
        ...         return -self.power * log_snr
        >>> cube = get_weighting("doctest_cube", power=1.0)
        >>> cube.over_log_snr("flow", prediction_type="epsilon")(torch.ones(1).log())
        tensor([1.])
        >>> del _REGISTRY["doctest_cube"]
    """
    if target not in ("native", "objective"):
        check_prediction_type(target)
    return register(registry, name, target=target, formula=formula, source=source)


def register(registry: dict[str, type[F]], name: str, **attributes: Any) -> Callable[[Any], Any]:
    """Return the decorator that makes a class a frozen dataclass and puts it into ``registry`` under ``name``.

    Raises:
        ValueError: the name is taken.

    Example:
        >>> registry = {}
        >>> @register(registry, "doctest_half", formula="w = 1/2")
        ... class Half(Formula):
        ...     value: float = hyper(0.5, above=0)
        >>> registry["doctest_half"](0.25), Half.formula
        (Half(value=0.25), 'w = 1/2')
    """
    if name in registry:
        raise ValueError(f"Weighting {name!r} is registered already, as {registry[name].__name__}.")

    def decorator(cls: Any) -> Any:
        for key, value in {"name": name, **attributes}.items():
            setattr(cls, key, value)
        registry[name] = dataclass(frozen=True)(cls)
        return registry[name]

    return decorator


def list_weightings() -> list[str]:
    """Return the names of all registered weightings, in the order of registration.

    Example:
        >>> "min_snr" in list_weightings()
        True
    """
    return list(_REGISTRY)


def needed_by(name: str) -> tuple[str, ...]:
    """Return the hyperparameters that a weighting has no default for; none for an unknown name.

    Example:
        >>> needed_by("min_snr"), needed_by("optimal_loss")
        ((), ('curve',))
    """
    return _REGISTRY[name].needs if name in _REGISTRY else ()


def get_weighting(method: str | Weighting | Callable[[Tensor], Tensor], **hp: Any) -> Weighting:
    """Return a weighting from its name and hyperparameters, from itself, or from a function w_eps(log_snr).

    Raises:
        ValueError: unknown name or hyperparameter, or a value outside its bounds; the message lists the choices.
        TypeError: ``method`` is none of the three, or hyperparameters were given with something other than a name.

    Example:
        >>> get_weighting("min_snr", gamma=5)
        MinSNR(gamma=5)
    """
    if isinstance(method, str):
        return build(_REGISTRY, method, hp)
    if hp:
        raise TypeError(f"Hyperparameters {list(hp)} go with a method's name only, got `method` {method!r}.")
    if isinstance(method, Weighting):
        return method
    if callable(method) and not isinstance(method, type):
        return CallableWeighting(method)
    raise TypeError(f"`method` must be a name in {list_weightings()}, a Weighting or a function, got {method!r}.")


def build(registry: dict[str, type[F]], name: str, hp: dict[str, Any]) -> F:
    """Instantiate ``registry[name](**hp)`` with messages that name the choices."""
    if name not in registry:
        raise ValueError(f"Unknown weighting {name!r}; choose one of {list(registry)}.")
    known = list(registry[name].hyperparameters())
    for key in hp:
        if key not in known:
            raise ValueError(f"Weighting {name!r} has no hyperparameter {key!r}; it takes {known}.")
    return registry[name](**hp)


def _check_normalize(normalize: object) -> None:
    if normalize not in ("mean", None):
        raise ValueError(f"`normalize` must be 'mean' or None, got {normalize!r}.")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_hyperparameter(owner: Formula, field: dataclasses.Field[Any]) -> None:
    value, choices = getattr(owner, field.name), field.metadata.get("choices")
    above, below = field.metadata.get("above"), field.metadata.get("below")
    what = f"`{type(owner).__name__}({field.name}=...)`"
    if choices is not None:
        if value not in choices:
            raise ValueError(f"{what} must be one of {list(choices)}, got {value!r}.")
        return
    if not field.metadata.get("number", True) or (value is None and field.default is None):
        return
    if not _is_number(value) or not abs(value) < math.inf:
        raise ValueError(f"{what} must be a finite number, got {value!r}.")
    if above is not None and not value > above:
        raise ValueError(f"{what} must be > {above:g}, got {value!r}.")
    if below is not None and not value < below:
        raise ValueError(f"{what} must be < {below:g}, got {value!r}.")


def _check_finite(curve: WeightCurve, grid: Tensor, weights: Tensor) -> None:
    bad = grid[~weights.isfinite()].tolist()
    if not bad:
        return
    shown = ", ".join(f"{t:g}" for t in bad[:5]) + (f", ... ({len(bad)} in all)" if len(bad) > 5 else "")
    raise ValueError(
        f"Weighting {curve.weighting.name!r} for prediction_type {curve.prediction_type!r} is not finite at t = "
        f"{shown}: give `clamp_max=`, another prediction type or dtype, or a schedule that stops short "
        "of these timesteps."
    )
