"""What ``attach`` puts on a denoiser: the hooks, the tracker and the audit, and how they are taken off."""

from __future__ import annotations

import copy
import functools
import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from snrweights.integrations.audit import Audit, DoubleWeightingError, measuring
from snrweights.integrations.audit_report import AuditReport
from snrweights.integrations.denoisers import TimestepReader, check_timesteps, prediction_in, with_prediction
from snrweights.integrations.live_weighting import LiveWeighting
from snrweights.integrations.redrawing import Redrawing
from torch import Tensor, nn

from snrweights.samplers import TimestepSampler
from snrweights.schedules import Schedule
from snrweights.tracking import LossVarianceTracker

SampleMask = Callable[[int], Tensor]
LossScale = float | Callable[[], float | Tensor]
OnDoubleWeighting = Literal["error", "warn", "ignore"]
ON_DOUBLE_WEIGHTING: tuple[OnDoubleWeighting, ...] = ("error", "warn", "ignore")


def first_half(batch_size: int) -> Tensor:
    """Select the first half of a batch: the instance images of a prior-preservation batch.

    Example:
        >>> first_half(4)
        tensor([ True,  True, False, False])
    """
    return torch.arange(batch_size) < batch_size // 2


SAMPLE_MASKS: dict[str, SampleMask] = {"first_half": first_half}

_ATTACHED: weakref.WeakKeyDictionary[nn.Module, Attachment] = weakref.WeakKeyDictionary()


class Attachment:
    """What ``attach`` returns; see there.

    Attributes:
        tracker: the ``LossVarianceTracker``, or None without ``track``.
        sampler: what redraws the timesteps, or None without ``sampler``.
        weighted: whether an output with gradients was weighted (with method None: seen) so far.
    """

    def __init__(
        self,
        *,
        name: str,
        live: LiveWeighting,
        timesteps: TimestepReader,
        per_sample_list: bool,
        mask: SampleMask | None,
        tracker: LossVarianceTracker | None,
        redrawing: Redrawing | None,
        loss_scale: LossScale,
        audit: int,
        audit_samples: int,
        on_double_weighting: OnDoubleWeighting,
    ) -> None:
        self.tracker = tracker
        self.sampler: TimestepSampler | None = None if redrawing is None else redrawing.sampler
        self.weighted = False
        self._redrawing = redrawing
        self._learner = None if redrawing is None else redrawing.learner
        self._name = name
        self._live = live
        self._timesteps = timesteps
        self._per_sample_list = per_sample_list
        self._mask = mask
        self._loss_scale = loss_scale
        self._on_double_weighting = on_double_weighting
        self._audit_plan = (audit, audit_samples) if audit and live.output_type else None
        self._audit: Audit | None = None  # from the first call with gradients
        live.on_trace = self._traced
        self._checked = self._called_without_grad = self._called_frozen = False
        self._handle: Any = None

    def hook_onto(self, model: nn.Module) -> None:
        """Start."""
        self._handle = model.register_forward_hook(self._weigh, with_kwargs=True)
        _ATTACHED[model] = self
        if self._redrawing is not None:
            self._redrawing.start(self, model)

    def drawn_before(self, t: Any) -> None:
        """Take note that the script has noised already with ``t``, of its own draws, for the call that comes next."""
        if self._redrawing is not None and isinstance(t, Tensor) and t.ndim == 1:
            self._redrawing.remember(t)

    def __repr__(self) -> str:
        extras = (", part of each batch" if self._mask else "") + (", tracked" if self.tracker else "")
        extras += f", drawn by {self.sampler!r}" if self.sampler else ""
        return f"<{'attached' if self.attached else 'detached'} {self._name}: {self._live!r}{extras}>"

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        """A copy of the model goes on with the same scheduler and tracker, and a hook of its own."""
        memo[id(self)] = clone = copy.copy(self)
        clone._handle = copy.deepcopy(self._handle, memo)
        clone._audit, clone._audit_plan = None, self._audit_plan if self.auditing else None
        return clone

    @property
    def attached(self) -> bool:
        """Whether the hook is on."""
        return self._handle is not None

    def shares_with(self, other: Attachment) -> bool:
        """Whether one is a copy of the other, made with the model."""
        return self._live is other._live

    @property
    def audit(self) -> AuditReport | None:
        """What the script's own loss turned out to be so far, or None without an audit."""
        if self._audit is None:
            return None
        return self._audit.report()

    def audited(self) -> tuple[Schedule, str, str | None]:
        """Return schedule, prediction type of the model's output and the one that was given, as they are now."""
        self._live.refresh()
        return self._live.schedule, str(self._live.output_type), self._live.options["prediction_type"]

    @property
    def auditing(self) -> bool:
        """Whether the audit goes on."""
        return self._audit_plan is not None if self._audit is None else self._audit.active

    def detach(self) -> None:
        """Take the hook off; nothing of it remains on the model. Doing so twice is no error."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            if self._redrawing is not None and self._redrawing.belongs_to(self):
                self._redrawing.stop()
        self._audit_plan = None
        if self._audit is not None:
            self._audit.stop()

    def report(self) -> Report:
        """Return what was weighted, how, and the tracked loss over log-SNR."""
        bound = self._live.bound
        statistics = None
        if self.tracker is not None:
            statistics = self.tracker.compute().as_dict()
        return Report(
            model=self._name,
            scheduler=self._live.scheduler_name,
            method=repr(self._live.weighting) if bound else "none",
            prediction_type=bound.curve.prediction_type if bound else None,
            normalize=self._live.options["normalize"],
            density=self._live.density_name,
            mean_weight=bound.curve.mean() if bound else 1.0,
            weighted=self.weighted,
            reason=None if self.weighted else self.why_not(),
            sampler=None if self.sampler is None else repr(self.sampler),
            loss=statistics,
            audit=self.audit,
        )

    def why_not(self) -> str:
        """Say why nothing was weighted, or why no loss was read."""
        if self.weighted:
            report = self.audit
            unread = "; ".join(report.not_read) if report is not None else ""
            return f"{self._name}: {unread or 'no output was seen in a backward pass'}"
        if self._called_frozen:
            return f"no output of {self._name} depended on anything that is trained"
        if self._called_without_grad:
            return f"{self._name} was called without gradients only"
        return f"{self._name} was not called, or only inside a larger module that was compiled before"

    def _weigh(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The forward hook. It stores flags without reading them, which torch.compile takes without recompiling."""
        if not torch.is_grad_enabled():
            self._called_without_grad = True
            return None
        prediction = prediction_in(output, self._per_sample_list)
        samples = [prediction] if isinstance(prediction, Tensor) else prediction
        if not samples[0].requires_grad:
            self._called_frozen = True
            return None
        eager = not torch.compiler.is_compiling()
        if eager and isinstance(prediction, Tensor) and prediction._is_view():
            # an in-place operation on a view takes it out of the graph, and a hook with it
            samples = [prediction.clone()]
            output = with_prediction(output, samples[0])
        self._live.refresh()
        rows = len(prediction)
        t = self._timesteps(model, args, kwargs, self._live.schedule, rows, samples[0].device)
        if eager:
            self._look(model, samples, t, rows, args[0] if args else kwargs.get("hidden_states", kwargs.get("sample")))
        factor = None if self._redrawing is None else self._redrawing.factor(t)
        for i, sample in enumerate(samples):
            call = _Call(t, rows, factor, None if isinstance(prediction, Tensor) else i)
            sample.register_hook(functools.partial(self._pass_on, call))
        self.weighted = True
        return output

    def _look(self, model: nn.Module, samples: list[Tensor], t: Tensor, rows: int, noisy: Any) -> None:
        """Check the first timesteps; hand outputs to the audit. Both wait for the device, and both come to an end."""
        if self._checked and not self.auditing:
            return
        part = (self._mask or first_half)(rows)
        if not self._checked:
            check_timesteps(t, self._live.schedule)
            _check_mask(part, rows)
            self._checked = True
        if not self.auditing:
            return
        if self._audit is None:
            self._audit = Audit(*self._audit_plan, subject=self)  # type: ignore[misc]
            weakref.finalize(model, self._audit.stop)
        log_snr = self._live.schedule.log_snr(t).expand(rows)
        if len(samples) == 1:
            self._audit.watch(samples[0], log_snr, part, rows, noisy)
            return
        for i, sample in enumerate(samples):
            self._audit.watch(sample, log_snr[i : i + 1], part[i : i + 1], rows, None)

    def _pass_on(self, call: _Call, gradient: Tensor) -> Tensor:
        """The hook on the output's gradient. The scheduler counts as it is now: scripts set it after the forward."""
        if not torch.compiler.is_compiling():
            if measuring():
                return gradient
            self._live.refresh()
        weights = self._weights(call)
        if self.tracker is not None or self._learner is not None:
            self._record(call, gradient, weights)
        if call.factor is not None:
            weights = call.factor if weights is None else weights * call.factor
        return gradient if weights is None else _scaled(gradient, call.part(weights))

    def _weights(self, call: _Call) -> Tensor | None:
        """Return w(t), (rows,) or (), or None without a weighting."""
        if self._live.bound is None:
            return None
        weights = self._live.bound(call.t)
        if self._mask is None:
            return weights
        return torch.where(self._selected(call.rows, call.t.device), weights, 1.0)

    def _selected(self, rows: int, device: torch.device) -> Tensor:
        mask = self._mask(rows).to(device)  # type: ignore[misc]
        _check_mask(mask, rows)
        return mask

    @torch.no_grad()
    def _record(self, call: _Call, gradient: Tensor, weights: Tensor | None) -> None:
        """Recover the loss of each sample from its gradient, for the tracker and for the sampler."""
        t = call.of_each(call.t)
        log_snr = self._live.schedule.log_snr(t)
        scale = self._loss_scale() if callable(self._loss_scale) else self._loss_scale
        samples = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).reshape(len(log_snr), -1)
        elements = (samples != 0).any(0).sum()  # what a script slices off has no gradient in any sample
        mean_over: float | Tensor = call.rows
        if self._mask is not None:  # each part has a mean of its own
            selected = self._selected(call.rows, gradient.device)
            mean_over = call.part(torch.where(selected, selected.sum(), call.rows - selected.sum()))
        gradient_square = samples.square().sum(1) * (mean_over / scale) ** 2  # of a sample's own loss
        output_type, weight_of_output = self._live.tracked_as(log_snr)
        mse = gradient_square * elements / 4 / weight_of_output**2
        if self.tracker is not None:
            self.tracker.update(mse, log_snr, prediction_type=output_type, gradient_square=gradient_square)
        if self._learner is not None:
            weight = None if weights is None else call.of_each(weights)
            self._learner.update(t, mse, weight=weight, gradient_square=gradient_square)

    def _traced(self) -> None:
        """Called when torch.compile traces the model: a graph's outputs are not looked at."""
        if self._audit_plan is not None and self._live.bound is not None and self._on_double_weighting != "ignore":
            self._audit_plan = None
            warnings.warn(
                f"Could not look whether {self._name}'s loss is weighted already: the model is compiled.", stacklevel=2
            )

    def judge(self) -> None:
        """After a step of the audit, and at its end: is there a weight of the script's own on top of ours?"""
        if self._live.bound is None or self._on_double_weighting == "ignore":
            return
        report = self._audit.report()  # type: ignore[union-attr]
        if report.is_mse and not report.constant:
            self._audit.stop()  # type: ignore[union-attr]
            text = (
                f"The script's loss is weighted already: {report.description}, seen on {len(report.weight)} samples at "
                f"{report.levels}. {self._live!r} would multiply that. Drop one of the two; if the loss is the plain "
                f"MSE of another target, say so with `prediction_type=`; or give `on_double_weighting='ignore'`."
            )
            if self._on_double_weighting == "error":
                raise DoubleWeightingError(text)
            warnings.warn(text, stacklevel=2)
        elif not self.auditing and not (report.steps and report.is_mse):
            reasons = "it is not a mean squared error" if report.steps else "; ".join(report.not_read)
            reasons = reasons or "no output was seen in a backward pass"
            warnings.warn(f"Could not look whether {self._name}'s loss is weighted already: {reasons}.", stacklevel=2)


@dataclass(frozen=True)
class _Call:
    """What the gradient hook needs of a call of the model.

    Attributes:
        t: (rows,) or ().
        rows: number of samples.
        factor: of the sampler that drew t, as t, or None.
        index: which sample of a list the gradient is for, or None for all.
    """

    t: Tensor
    rows: int
    factor: Tensor | None
    index: int | None

    def part(self, values: Tensor) -> Tensor:
        """What of values, (rows,) or (), belongs to the gradient: all, or those of one sample."""
        return values if self.index is None or values.ndim == 0 else values[self.index]

    def of_each(self, values: Tensor) -> Tensor:
        """What of values, (rows,) or (), belongs to each sample that the gradient is for."""
        return self.part(values.expand(self.rows)).reshape(-1).contiguous()


def _check_mask(mask: Tensor, rows: int) -> None:
    if mask.shape != (rows,) or mask.dtype != torch.bool:
        raise ValueError(
            f"`sample_mask` must return a bool tensor of shape ({rows},), got {tuple(mask.shape)} {mask.dtype}."
        )


def _scaled(gradient: Tensor, weights: Tensor) -> Tensor:
    weights = weights.reshape(weights.shape + (1,) * (gradient.ndim - weights.ndim))
    return (gradient * weights).to(gradient.dtype)


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
        sampler: what redraws the timesteps, if anything does.
        loss: ``LossStatistics.as_dict()`` of the tracker, if tracked.
        audit: what the script's own loss turned out to be, if looked at.
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
    sampler: str | None
    loss: dict[str, Any] | None
    audit: AuditReport | None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for JSON; an infinite mean weight is None."""
        mean_weight = self.mean_weight if math.isfinite(self.mean_weight) else None
        return vars(self) | {"mean_weight": mean_weight, "audit": None if self.audit is None else self.audit.as_dict()}


def attachments(model: nn.Module) -> list[Attachment]:
    """Return what is attached to this very module."""
    owners = (getattr(hook, "__self__", None) for hook in model._forward_hooks.values())
    return [owner for owner in owners if isinstance(owner, Attachment)]


def attachments_around(model: nn.Module) -> Iterator[Attachment]:
    """Yield what is attached to a module, to one inside it or to one around it."""
    for inner in model.modules():
        yield from attachments(inner)
    for other, attachment in list(_ATTACHED.items()):
        if attachment.attached and any(inner is model for inner in other.modules()):
            yield attachment
