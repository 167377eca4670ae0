"""The loss side: weights of a batch of timesteps, per-sample errors, and their weighted mean."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from snrweights.densities import Density
from snrweights.schedules import DiscreteSchedule
from snrweights.weightings.base import Normalize, Weighting, get_weighting
from snrweights.weightings.bound import BoundWeighting

Method = str | Weighting | Callable[[Tensor], Tensor]

_CACHE_SIZE = 64
# key -> (the source, what may change in it, bound); holding the source keeps its id from being reused
_cache: OrderedDict[tuple[Any, ...], tuple[Any, tuple[Any, ...], BoundWeighting]] = OrderedDict()


def loss_weight(
    t: Tensor | int | float,
    schedule: Any,
    method: Method = "min_snr",
    *,
    prediction_type: str | None = None,
    density: Density | str | None = None,
    normalize: Normalize = None,
    clamp_max: float | None = None,
    dtype: torch.dtype = torch.float32,
    **hp: Any,
) -> Tensor:
    """Return the weight of each sample's MSE: ``loss = (loss_weight(t, ...) * per_sample_mse(pred, target)).mean()``.

    The weight is looked up or computed once per schedule and arguments, and anew when the scheduler was changed (its
    table, or its config). In a hot loop ``get_weighting(...).bind(...)`` saves the look-up and the checks.

    Args:
        t: timesteps as the model is given them, shape (B,) or (): an index for discrete schedules,
            ``sigma * num_train_timesteps`` for flow, sigma for ``EDMSchedule``, 0.25 ln sigma for EDM schedulers.
        schedule: a diffusers scheduler, an ``alphas_cumprod`` table, a schedule or its name; see ``as_schedule``.
        method: name of a weighting (``list_weightings()``), a ``Weighting``, or a function w_eps(log_snr): define it
            outside of the loop, a new one is bound anew.
        prediction_type: the target whose plain MSE the loss equals: ``epsilon``, ``sample``, ``v_prediction``,
            ``flow_prediction`` or ``edm``; default: what the scheduler states.
        density: density over log-SNR that t is really drawn from; default: uniform over the timesteps.
        normalize: ``"mean"`` scales the weight to average 1 under the density.
        clamp_max: upper bound on the weight, for weights that are infinite somewhere.
        dtype: of the result.
        **hp: hyperparameters of the method.

    Returns:
        Weights of shape (B,), or () for a single t.

    Raises:
        ValueError: a bad argument, NaN or a value outside the schedule in a t that is not an index (on the CPU;
            elsewhere its weight is NaN), an infinite weight, or a weighting that depends on the batch, which is to be
            bound.
        IndexError: t outside a discrete schedule.
        TypeError: t is not a tensor or number, or the schedule cannot be read.

    Source: MATH of the weights in the classes of ``snrweights.weightings``.

    Example:
        >>> loss_weight(torch.tensor([10, 500, 900]), "linear", "min_snr", prediction_type="epsilon", gamma=5.0)
        tensor([0.0110, 1.0000, 1.0000])
    """
    t = _as_timesteps(t)
    key = (id(schedule), method, prediction_type, density, normalize, clamp_max, dtype, *hp.items())
    if isinstance(schedule, str):
        key = (schedule, *key[1:])
    try:
        entry = _cache.get(key)
    except TypeError:
        raise TypeError(f"`method`, `density` and hyperparameters must be hashable, got {key[1:]}.") from None
    state = state_of(schedule)
    if entry is None or not same_state(entry[1], state):
        bound = check_depends_on_t_alone(get_weighting(method, **hp)).bind(
            schedule,
            prediction_type=prediction_type,
            density=density,
            normalize=normalize,
            clamp_max=clamp_max,
            dtype=dtype,
        )
        entry = _cache[key] = (schedule, state, bound)
        if len(_cache) > _CACHE_SIZE:
            _cache.popitem(last=False)
    _cache.move_to_end(key)
    bound = entry[2]
    if t.device.type == "cpu" and (t.is_floating_point() or not isinstance(bound.schedule, DiscreteSchedule)):
        bound.schedule.check(t)  # on a device it would wait for it, in every step: there such a t gives NaN
    return bound(t)


def check_depends_on_t_alone(weighting: Weighting) -> Weighting:
    """Return the weighting, or raise a ValueError if a sample's weight depends on the others in its batch."""
    if weighting.batch_dependent:
        raise ValueError(
            f"{weighting!r} gives weights that depend on the batch, not on the timestep alone: bind it, "
            "`bound = get_weighting(...).bind(...)`, and call `bound(t, loss)` in the loop; or give `center='fixed'`."
        )
    return weighting


def _as_timesteps(t: Tensor | int | float) -> Tensor:
    if isinstance(t, bool) or not isinstance(t, Tensor | int | float):
        raise TypeError(f"`t` must be a tensor of timesteps or a number, got {type(t).__name__}.")
    t = torch.as_tensor(t)
    if t.ndim > 1 or t.numel() == 0:
        raise ValueError(f"`t` must have shape (B,) with B >= 1, or (), got {tuple(t.shape)}.")
    if t.dtype == torch.bool or t.is_complex():
        raise TypeError(f"`t` must be integer or floating point, got {t.dtype}.")
    return t if t.is_floating_point() or t.dtype in (torch.int32, torch.int64) else t.long()


def state_of(source: Any) -> tuple[Any, ...]:
    """Return what tells that a scheduler or table was changed; for ``same_state``."""
    table = source if isinstance(source, Tensor) else getattr(source, "alphas_cumprod", None)
    version = table._version if isinstance(table, Tensor) and not table.is_inference() else 0
    config = getattr(source, "config", None)
    return table, config, version, getattr(config, "prediction_type", None)


def same_state(old: tuple[Any, ...], new: tuple[Any, ...]) -> bool:
    """Whether two states are of an unchanged scheduler: the same table, a config that is equal."""
    return old[0] is new[0] and old[2:] == new[2:] and (old[1] is new[1] or bool(old[1] == new[1]))


def per_sample_mse(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared error of each sample: mean over all dimensions but the first.

    Computed in float32 at least, whatever the inputs' precision.

    Args:
        prediction: (B, ...).
        target: the same shape.
        mask: weights of the elements, broadcastable to the same shape; the mean is then over the mask's mass, and 0
            for a sample that is masked out entirely.

    Returns:
        (B,) errors.

    Raises:
        ValueError: shapes that differ, an empty batch, or a mask that does not broadcast.

    Example:
        >>> per_sample_mse(torch.ones(2, 3), torch.zeros(2, 3))
        tensor([1., 1.])
    """
    if prediction.shape != target.shape:
        raise ValueError(f"`prediction` {tuple(prediction.shape)} and `target` {tuple(target.shape)} differ in shape.")
    if prediction.ndim == 0 or prediction.numel() == 0:
        raise ValueError(f"`prediction` must have shape (B, ...) with B >= 1, got {tuple(prediction.shape)}.")
    wide = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    error = prediction.to(wide) - target.to(wide)
    if mask is None:
        squared = error.square()
        return squared.flatten(1).mean(1) if squared.ndim > 1 else squared
    try:
        mask = mask.to(wide).expand_as(error)
    except RuntimeError:
        raise ValueError(f"`mask` {tuple(mask.shape)} does not broadcast to {tuple(error.shape)}.") from None
    squared = torch.where(mask != 0, error, 0.0).square()  # what is masked out may be NaN
    dims = tuple(range(1, squared.ndim))
    mass = mask.sum(dims) if dims else mask
    total = (squared * mask).sum(dims) if dims else squared * mask
    return torch.where(mass == 0, 0.0, total / mass.where(mass != 0, 1.0))


Reduction = Literal["mean", "sum", "none"]
_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": torch.mean,
    "sum": torch.sum,
    "none": lambda loss: loss,
}


def weighted_loss(
    prediction: Tensor,
    target: Tensor,
    t: Tensor,
    schedule: Any,
    method: Method = "min_snr",
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    **options: Any,
) -> Tensor:
    """Return ``reduction(w(t) * per_sample_mse(prediction, target, mask))``.

    Args:
        prediction: the model's output, (B, ...).
        target: the same shape.
        t: timesteps, (B,); see ``loss_weight``.
        schedule: see ``loss_weight``.
        method: see ``loss_weight``.
        mask: see ``per_sample_mse``.
        reduction: ``"mean"`` or ``"sum"`` over the batch, or ``"none"``.
        **options: the other arguments of ``loss_weight``, hyperparameters among them.

    Returns:
        A scalar, or (B,) without reduction.

    Raises:
        ValueError: an unknown reduction, or shapes that do not go together.

    Example:
        >>> x = torch.ones(2, 3)
        >>> weighted_loss(x, 0 * x, torch.tensor([500, 600]), "linear", "min_snr", prediction_type="epsilon")
        tensor(1.)
    """
    if reduction not in _REDUCTIONS:
        raise ValueError(f"Unknown reduction {reduction!r}; choose one of {list(_REDUCTIONS)}.")
    errors = per_sample_mse(prediction, target, mask)
    weight = loss_weight(t, schedule, method, **options)
    if weight.shape != errors.shape:
        raise ValueError(
            f"`t` must have one timestep per sample, shape {tuple(errors.shape)}, got {tuple(weight.shape)}."
        )
    return _REDUCTIONS[reduction](weight * errors)
