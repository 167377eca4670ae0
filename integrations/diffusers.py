"""One line that weighs an unmodified training loop: ``snrweights.attach``.

A forward hook on the denoiser reads the timestep from the model's own argument and multiplies row i of the gradient
that arrives at the output by w(t_i). For any loss that is a sum over samples these are the gradients of the weighted
loss; the printed loss stays the unweighted one.
"""

from __future__ import annotations

from typing import Any

import torch
from snrweights.integrations.attachment import (
    ON_DOUBLE_WEIGHTING,
    SAMPLE_MASKS,
    Attachment,
    LossScale,
    OnDoubleWeighting,
    SampleMask,
    attachments_around,
)
from snrweights.integrations.denoisers import Timestep, TimestepReader, choose_adapter, denoiser_in
from snrweights.integrations.live_weighting import LiveWeighting
from snrweights.integrations.redrawing import Redrawing, check_noising, sampler_of
from torch import nn

from snrweights.densities import Density
from snrweights.losses import Method, check_depends_on_t_alone
from snrweights.samplers import TimestepSampler
from snrweights.tracking import LossVarianceTracker
from snrweights.weightings.base import Normalize, get_weighting

AUDIT_STEPS = 8  # looked at for a second weight where no number is given,
AUDIT_SAMPLES = 32  # and as many more as it takes to see so many samples


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
    audit: int | None = None,
    on_double_weighting: OnDoubleWeighting = "error",
    force: bool = False,
    sampler: str | TimestepSampler | None = None,
    **hp: Any,
) -> Attachment:
    """Weigh the gradients of a training loop that does not weigh, from here on and until ``detach()``.

    With ``loss = mean_i l_i`` over the samples, the parameters get the gradient of ``mean_i w(t_i) l_i``, for any
    per-sample l_i (MSE, Huber, L1). Forward values do not change; calls without gradients are left alone. The
    scheduler is read at every step, when the gradient arrives, so that a table or prediction type that the script
    changes counts at once. A compiled model is traced again when the prediction type has changed, in time for the next
    forward pass, and does not see a new table.

    Args:
        model: the denoiser that the loop calls, before or after ``accelerator.prepare``, ``torch.compile`` or PEFT's
            wrapper. With a ControlNet or textual inversion it is the frozen denoiser, not what is trained.
        scheduler: the noise scheduler that the loop noises with, or whatever else ``as_schedule`` reads.
        method: see ``loss_weight``; None leaves the gradients as they are, to track or to audit.
        prediction_type: the target whose plain MSE the loss equals; default: what the scheduler states at each step.
        density: of the script's own draws; see ``loss_weight``.
        normalize: see ``loss_weight``.
        clamp_max: see ``loss_weight``.
        dtype: in which weights are computed and multiplied; the gradient keeps its own.
        track: record the unweighted loss over log-SNR in ``.tracker``, as the error of epsilon. It is recovered from
            the gradient, so the loss must be a mean MSE, ``|g_i|^2 B^2 D / 4`` over the D elements that enter it; it
            carries the squares of a weight that the script itself applies.
        loss_scale: what multiplies the loss before ``backward``, divided out by ``track``: 1 / accumulation steps,
            GradScaler's scale; a number, or a function that returns one.
        sample_mask: which samples to weigh: a function from the batch size to a bool tensor (B,), or ``"first_half"``
            for prior preservation, where the second half keeps weight 1.
        timestep: for a model that this package does not know: a function from the arguments of the model's call to
            the scheduler's t, a number or (B,).
        audit: for how many backward passes to look at what the script's loss itself weighs; default: 8, and until
            32 samples were seen, to find a weight that would be applied twice.
        on_double_weighting: what to do about one: ``"error"``, ``"warn"``, or ``"ignore"``, which does not look.
        force: attach where it is refused, because the weight has no meaning there.
        sampler: draw the timesteps by importance, by a rule of ``ImportanceSampler`` ("gradient", "loss_second_moment",
            "variance"): they are redrawn in place as the script calls ``scheduler.add_noise`` with gradients enabled,
            and row i of the gradient is multiplied by p / q besides, so that its mean stays that of draws from
            ``density``. It learns from the gradients, as ``track`` does, and has ``torch.initial_seed()`` of the first
            process for its seed. Or a sampler of your own, for ``density`` as its ``density`` (``ImportanceSampler``)
            or ``base`` (``TimestepSampler``); without ``base`` it changes what is optimised.
        **hp: hyperparameters of the method.

    Returns:
        A handle: ``.detach()``, ``.tracker``, ``.sampler``, ``.report()``; also a context manager that detaches.

    Raises:
        TypeError: a model or scheduler that is refused or not known, with the reason; with ``sampler`` also one whose
            loops do not noise by ``add_noise``.
        ValueError: a bad argument, an infinite weight, one that depends on the batch, or a model that is weighted
            already.
        DoubleWeightingError: from ``backward``, in the first steps. With ``sampler`` the model raises ValueError in
            them where it is not given the timesteps that ``add_noise`` was.

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
    if on_double_weighting not in ON_DOUBLE_WEIGHTING:
        raise ValueError(f"`on_double_weighting` must be one of {ON_DOUBLE_WEIGHTING}, got {on_double_weighting!r}.")
    if audit is not None and audit < 1:
        raise ValueError(f"`audit` must be >= 1, got {audit!r}.")
    target = denoiser_in(model)
    for present in attachments_around(target):
        raise ValueError(f"`model` is weighted already, by {present!r}; detach() that first.")
    if method is None:
        _check_unweighted(hp, normalize=normalize, clamp_max=clamp_max, density=None if sampler else density)
    adapter = choose_adapter(target, timestep, force)
    live = LiveWeighting(
        scheduler,
        None if method is None else check_depends_on_t_alone(get_weighting(method, **hp)),
        adapter.schedule,
        prediction_type=prediction_type,
        density=density,
        normalize=normalize,
        clamp_max=clamp_max,
        dtype=dtype,
    )
    by_default = AUDIT_STEPS if live.bound and on_double_weighting != "ignore" else 0
    attachment = Attachment(
        name=type(target).__name__,
        live=live,
        timesteps=TimestepReader(target, adapter, timestep),
        per_sample_list=adapter.per_sample_list,
        mask=_mask(sample_mask),
        tracker=_tracker(live) if track else None,
        redrawing=None if sampler is None else _redrawing(live, sampler),
        loss_scale=loss_scale,
        audit=by_default if audit is None else audit,
        audit_samples=AUDIT_SAMPLES if audit is None else 0,
        on_double_weighting=on_double_weighting,
    )
    attachment.hook_onto(target)
    return attachment


def _check_unweighted(hp: dict[str, Any], **options: Any) -> None:
    given = [*hp, *(name for name, value in options.items() if value is not None)]
    if given:
        raise ValueError(f"{given} go with a method, and `method` is None.")


def _redrawing(live: LiveWeighting, sampler: str | TimestepSampler) -> Redrawing:
    check_noising(live.scheduler, live.schedule)
    return Redrawing(live.scheduler, sampler_of(sampler, live.schedule, live.options["density"]))


def _tracker(live: LiveWeighting) -> LossVarianceTracker:
    unit = "epsilon" if live.output_type else None
    return LossVarianceTracker(unit=unit, sigma_data=live.schedule.sigma_data)


def _mask(sample_mask: SampleMask | str | None) -> SampleMask | None:
    if sample_mask is None or callable(sample_mask):
        return sample_mask
    if sample_mask not in SAMPLE_MASKS:
        raise ValueError(f"`sample_mask` must be a function or one of {list(SAMPLE_MASKS)}, got {sample_mask!r}.")
    return SAMPLE_MASKS[sample_mask]
