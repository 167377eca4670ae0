"""One line that weighs an unmodified training loop: ``snrweights.attach``.

A forward hook on the denoiser reads the timestep from the model's own argument and multiplies row i of the gradient
that arrives at the output by w(t_i). For any loss that is a sum over samples these are the gradients of the weighted
loss; the printed loss stays the unweighted one.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from snrweights.integrations.timestep_adapters import Adapter, adapter_of, position_of, refusal_of
from torch import Tensor, nn

from snrweights.densities import Density
from snrweights.losses import Method, same_state, state_of
from snrweights.schedulers import as_schedule
from snrweights.schedules import Schedule
from snrweights.tracking import LossVarianceTracker
from snrweights.weightings.base import BoundWeighting, Normalize, Weighting, get_weighting

SampleMask = Callable[[int], Tensor]
Timestep = Callable[..., Any]
LossScale = float | Callable[[], float | Tensor]


def first_half(batch_size: int) -> Tensor:
    """Select the first half of a batch: the instance images of a prior-preservation batch.

    Example:
        >>> first_half(4)
        tensor([ True,  True, False, False])
    """
    return torch.arange(batch_size) < batch_size // 2


SAMPLE_MASKS: dict[str, SampleMask] = {"first_half": first_half}


def attach(
    model: nn.Module,
    scheduler: Any,
    method: Method | None = "min_snr",
    *,
    prediction_type: str | None = None,
    density: Density | str | None = None,
    normalize: Normalize = None,
    clamp_max: float | None = None,
    dtype: torch.dtype = torch.float32,
    track: bool = False,
    loss_scale: LossScale = 1.0,
    sample_mask: SampleMask | str | None = None,
    timestep: Timestep | None = None,
    force: bool = False,
    **hp: Any,
) -> Attachment:
    """Weigh the gradients of a training loop that does not weigh, from here on and until ``detach()``.

    With ``loss = mean_i l_i`` over the samples, the parameters get the gradient of ``mean_i w(t_i) l_i``, for any
    per-sample l_i (MSE, Huber, L1, already weighted). Forward values do not change; calls without gradients are left
    alone. The scheduler is read at every step: a table or prediction type that the script changes counts at once.

    Args:
        model: the denoiser that the loop calls, before or after ``accelerator.prepare``, ``torch.compile`` or PEFT's
            wrapper. With a ControlNet or textual inversion it is the frozen denoiser, not what is trained.
        scheduler: the noise scheduler that the loop noises with, or whatever else ``as_schedule`` reads.
        method: see ``loss_weight``; None only tracks.
        prediction_type: the target whose plain MSE the loss equals; default: what the scheduler states at each step.
        density: see ``loss_weight``.
        normalize: see ``loss_weight``.
        clamp_max: see ``loss_weight``.
        dtype: in which weights are computed and multiplied; the gradient keeps its own.
        track: record the unweighted loss over log-SNR in ``.tracker``. It is recovered from the gradient, so the
            loss must be a mean MSE, ``|g_i|^2 B^2 D / 4`` over the D elements that enter it; it carries the squares of
            a weight that the script itself applies.
        loss_scale: what multiplies the loss before ``backward``, divided out by ``track``: 1 / accumulation steps,
            GradScaler's scale; a number, or a function that returns one.
        sample_mask: which samples to weigh: a function from the batch size to a bool tensor (B,), or ``"first_half"``
            for prior preservation, where the second half keeps weight 1.
        timestep: for a model that this package does not know: a function from the arguments of the model's call to
            the scheduler's t, a number or (B,).
        force: attach where it is refused, because the weight has no meaning there.
        **hp: hyperparameters of the method.

    Returns:
        A handle: ``.detach()``, ``.tracker``, ``.report()``; also a context manager that detaches.

    Raises:
        TypeError: a model or scheduler that is refused or not known, with the reason.
        ValueError: a bad argument, an infinite weight, or a model that is weighted already.

    Example:
        >>> class Denoiser(torch.nn.Linear):
        ...     def forward(self, sample, t):
        ...         return super().forward(sample)
        >>> model, t = Denoiser(1, 1, bias=False), torch.tensor([10])
        >>> with attach(model, "linear", "min_snr", prediction_type="epsilon", timestep=lambda sample, t: t):
        ...     model(torch.ones(1, 1), t).sum().backward()
        >>> model.weight.grad
        tensor([[0.0110]])
    """
    target = denoiser_in(model)
    present = next((a for a in attachments(target)), None)
    if present is not None:
        raise ValueError(f"`model` is weighted already, by {present!r}; detach() that first.")
    adapter = _adapter(target, timestep, force)
    live = LiveWeighting(
        scheduler,
        None if method is None else get_weighting(method, **hp),
        prediction_type=prediction_type,
        density=density,
        normalize=normalize,
        clamp_max=clamp_max,
        dtype=dtype,
    )
    tracker = LossVarianceTracker() if track else None
    attachment = Attachment(target, live, adapter, timestep, _mask(sample_mask), tracker, loss_scale)
    attachment._handle = target.register_forward_hook(attachment._weigh, with_kwargs=True)
    return attachment


class LiveWeighting:
    """A weighting bound to a scheduler, bound anew when the scheduler changes."""

    def __init__(self, scheduler: Any, weighting: Weighting | None, **options: Any) -> None:
        self.scheduler = scheduler
        self.weighting = weighting
        self.options = options
        self._state = state_of(scheduler)
        self._bind()

    def _bind(self) -> None:
        self.schedule: Schedule = as_schedule(self.scheduler)
        weighting = self.weighting
        self.bound: BoundWeighting | None = weighting.bind(self.schedule, **self.options) if weighting else None

    def refresh(self) -> None:
        """Bind again if the scheduler's table or config is another than before."""
        state = state_of(self.scheduler)
        if not same_state(self._state, state):
            self._state = state
            self._bind()

    def __repr__(self) -> str:
        source = type(self.scheduler).__name__ if not isinstance(self.scheduler, str) else repr(self.scheduler)
        if self.bound is None:
            return f"no weight, on {source}"
        options = "".join(
            f", {name}={value!r}"
            for name, value in self.options.items()
            if value is not None and name not in ("prediction_type", "dtype")
        )
        return f"{self.weighting!r} on the MSE of {self.bound.curve.prediction_type!r}{options}, on {source}"


class Attachment:
    """What ``attach`` returns; see there.

    Attributes:
        tracker: the ``LossVarianceTracker``, or None without ``track``.
        weighted: whether an output with gradients was weighted (with method None: seen) so far.
    """

    def __init__(
        self,
        model: nn.Module,
        live: LiveWeighting,
        adapter: Adapter,
        timestep: Timestep | None,
        mask: SampleMask | None,
        tracker: LossVarianceTracker | None,
        loss_scale: LossScale,
    ) -> None:
        self.tracker = tracker
        self.weighted = False
        self._model = type(model).__name__
        self._live = live
        self._adapter = adapter
        self._position = position_of(model, adapter.argument)
        self._timestep = timestep
        self._mask = mask
        self._loss_scale = loss_scale
        self._called_without_grad = self._called_frozen = False
        self._handle: Any = None

    def __repr__(self) -> str:
        extras = (", part of each batch" if self._mask else "") + (", tracked" if self.tracker else "")
        return f"<{'attached' if self._handle else 'detached'} {self._model}: {self._live!r}{extras}>"

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        """A copy of the model, an EMA's say, goes on with the same scheduler and tracker."""
        memo[id(self)] = clone = copy.copy(self)
        return clone

    def detach(self) -> None:
        """Take the hook off; nothing of it remains on the model. Doing so twice is no error."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def report(self) -> Report:
        """Return what was weighted, how, and the tracked loss over log-SNR."""
        bound = self._live.bound
        statistics = None
        if self.tracker is not None:
            computed = self.tracker.compute()
            columns = {name: getattr(computed, name).tolist() for name in ("edges", "count", "mean", "variance")}
            statistics = {name: [None if v != v else v for v in column] for name, column in columns.items()}  # no NaN
        return Report(
            model=self._model,
            scheduler=type(self._live.scheduler).__name__,
            method=repr(self._live.weighting) if bound else "none",
            prediction_type=bound.curve.prediction_type if bound else None,
            normalize=self._live.options["normalize"],
            density=str(self._live.options["density"] or "uniform over the scheduler's timesteps"),
            mean_weight=bound.curve.mean() if bound else 1.0,
            weighted=self.weighted,
            reason=None if self.weighted else self._reason(),
            loss=statistics,
        )

    def _reason(self) -> str:
        if self._called_frozen:
            return f"no output of {self._model} depended on anything that is trained"
        if self._called_without_grad:
            return f"{self._model} was called without gradients only"
        return f"{self._model} was not called"

    def _weigh(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The forward hook. It stores flags without reading them, which torch.compile takes without recompiling."""
        if not torch.is_grad_enabled():
            self._called_without_grad = True
            return
        prediction = prediction_in(output, self._adapter.per_sample_list)
        rows = len(prediction)
        first = prediction if isinstance(prediction, Tensor) else prediction[0]
        if not first.requires_grad:
            self._called_frozen = True
            return
        if not torch.compiler.is_compiling():
            self._live.refresh()
        t = self._timesteps(model, args, kwargs, rows, first.device)
        weights = self._weights(t, rows)
        log_snr = self._live.schedule.log_snr(t).expand(rows) if self.tracker is not None else None
        if isinstance(prediction, Tensor):
            prediction.register_hook(functools.partial(self._scale, weights, log_snr, rows))
        else:
            for i, sample in enumerate(prediction):
                log_snr_i = None if log_snr is None else log_snr[i : i + 1]
                weight_i = weights if weights is None or weights.ndim == 0 else weights[i]
                sample.register_hook(functools.partial(self._scale, weight_i, log_snr_i, rows))
        self.weighted = True

    def _timesteps(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int, device: torch.device
    ) -> Tensor:
        """Read the schedule's t of this call, shape (rows,) or ()."""
        if self._timestep is not None:
            t = torch.as_tensor(self._timestep(*args, **kwargs), device=device)
        else:
            argument = self._adapter.argument
            given = kwargs[argument] if argument in kwargs else args[self._position]  # type: ignore[index]
            sample = args[0] if args else kwargs.get("hidden_states")
            t = self._adapter.meaning(torch.as_tensor(given, device=device), self._live.schedule, model, sample)
        if t.numel() == 1:
            return t.reshape(())
        if t.numel() != rows:
            raise ValueError(
                f"{self._model} was called with timesteps of shape {tuple(t.shape)} and returned {rows} samples; give "
                f"`timestep=`, a function from the call's arguments to one t a sample."
            )
        return t.reshape(rows)

    def _weights(self, t: Tensor, rows: int) -> Tensor | None:
        if self._live.bound is None:
            return None
        weights = self._live.bound(t)
        if self._mask is None:
            return weights
        return torch.where(self._selected(rows, t.device), weights, 1.0)

    def _selected(self, rows: int, device: torch.device) -> Tensor:
        mask = self._mask(rows).to(device)  # type: ignore[misc]
        if mask.shape != (rows,) or mask.dtype != torch.bool:
            raise ValueError(
                f"`sample_mask` must return a bool tensor of shape ({rows},), got {tuple(mask.shape)} {mask.dtype}."
            )
        return mask

    def _scale(self, weights: Tensor | None, log_snr: Tensor | None, rows: int, gradient: Tensor) -> Tensor:
        """The hook on the output's gradient; ``weights`` is (rows,), or () for all alike and for a single sample."""
        if log_snr is not None:
            self._record(gradient.unsqueeze(0) if len(log_snr) != len(gradient) else gradient, log_snr, rows)
        if weights is None:
            return gradient
        weights = weights.reshape(weights.shape + (1,) * (gradient.ndim - weights.ndim))
        return (gradient * weights).to(gradient.dtype)

    @torch.no_grad()
    def _record(self, gradient: Tensor, log_snr: Tensor, rows: int) -> None:
        scale = self._loss_scale() if callable(self._loss_scale) else self._loss_scale
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).flatten(1)
        elements = (gradient != 0).sum(1)  # what a script slices off has no gradient
        batch: float | Tensor = rows
        if self._mask is not None and len(gradient) == rows:  # each part has a mean of its own
            selected = self._selected(rows, gradient.device)
            batch = torch.where(selected, selected.sum(), rows - selected.sum())
        self.tracker.update(gradient.square().sum(1) * elements * (batch / (2 * scale)) ** 2, log_snr)  # type: ignore[union-attr]


@dataclass(frozen=True)
class Report:
    """What an attachment did.

    Attributes:
        model: class of the denoiser.
        scheduler: class of the scheduler.
        method: the weighting with its hyperparameters, or "none".
        prediction_type: the target on whose MSE the weight is.
        normalize: as given.
        density: which the mean weight is under.
        mean_weight: by which a loss that does not depend on t is scaled.
        weighted: whether anything was weighted.
        reason: why not, if not.
        loss: the tracker's edges, count, mean and variance per bin of log-SNR, if tracked; None in empty bins.
    """

    model: str
    scheduler: str
    method: str
    prediction_type: str | None
    normalize: str | None
    density: str
    mean_weight: float
    weighted: bool
    reason: str | None
    loss: dict[str, list[Any]] | None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for JSON."""
        return asdict(self)


def attachments(model: nn.Module) -> list[Attachment]:
    """Return what is attached to this very module."""
    owners = (getattr(hook, "__self__", None) for hook in model._forward_hooks.values())
    return [owner for owner in owners if isinstance(owner, Attachment)]


def denoiser_in(model: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of DDP, FSDP, ``torch.compile``, DeepSpeed and PEFT."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    while True:
        inner: Any = None
        if type(model).__module__.partition(".")[0] in ("torch", "deepspeed", "peft"):
            inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
            unwrap: Any = getattr(model, "get_base_model", None)
            inner = unwrap() if inner is None and unwrap is not None else inner
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner


def prediction_in(output: Any, per_sample_list: bool = False) -> Tensor | list[Tensor]:
    """Return the prediction in a model's output: a tensor, or for some models a list with one tensor a sample."""
    found = output
    while isinstance(found, (tuple, dict)):  # diffusers' outputs are dicts that take an integer too
        found = next(iter(found.values())) if isinstance(found, dict) else found[0]
    if isinstance(found, Tensor) or (per_sample_list and isinstance(found, list)):
        return found
    raise TypeError(f"No prediction found in an output of type {type(output).__name__}: it begins with {type(found)}.")


def _adapter(model: nn.Module, timestep: Timestep | None, force: bool) -> Adapter:
    name, reason = type(model).__name__, refusal_of(model)
    if reason is not None and not force and timestep is None:
        raise TypeError(f"{name} cannot be weighted: {reason}. `force=True` attaches nevertheless.")
    adapter = adapter_of(model)
    if adapter is not None:
        return adapter
    if timestep is not None:
        return Adapter()
    if force and position_of(model, "timestep") is not None:
        return Adapter()
    inside = [f"{path!r} ({type(m).__name__})" for path, m in model.named_modules() if adapter_of(m) is not None]
    raise TypeError(
        f"How {name} takes its timestep is not known: give `timestep=`, a function from the arguments of its call to "
        f"the scheduler's t, such as `lambda sample, t, *args, **kwargs: t`"
        + (f", or attach to what it contains: {inside[0]}." if inside else ".")
    )


def _mask(sample_mask: SampleMask | str | None) -> SampleMask | None:
    if sample_mask is None or callable(sample_mask):
        return sample_mask
    if sample_mask not in SAMPLE_MASKS:
        raise ValueError(f"`sample_mask` must be a function or one of {list(SAMPLE_MASKS)}, got {sample_mask!r}.")
    return SAMPLE_MASKS[sample_mask]
