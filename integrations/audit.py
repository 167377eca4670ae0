"""What a script really optimises: the weight that it applies to each sample, read off its own loss.

For the first steps ``torch.autograd.backward`` is wrapped. Before it runs, the loss is differentiated twice by the
model's output o, which touches no parameter. With ``g = dL/do``, H its derivative and a random sign u for each
element, ``v_i = <Hu, u>_i B / 2`` is the weight on the mean squared error of sample i, whatever the target is. The loss
is such an MSE if and only if Hu is parallel to u and Hg to g, with one factor; its target is ``o - g B D / (2 v)``.
"""

from __future__ import annotations

import itertools
import math
import weakref
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from snrweights.integrations.audit_report import AuditReport, Samples, summarise
from torch import Tensor

from snrweights.process import alpha_sigma, target_coefficients
from snrweights.schedules import DiscreteSchedule, Schedule

_WATCHED = 4  # outputs without a backward pass that are remembered, lists apart
_PATIENCE = 8  # passes or calls for each step, after which an audit that reads nothing gives up


class DoubleWeightingError(ValueError):
    """The script weighs its loss by itself, and would be weighted twice."""


class Subject(Protocol):
    """Whom an audit is of.

    Attributes:
        weighted: whether its model was called with gradients.
    """

    weighted: bool

    def audited(self) -> tuple[Schedule, str, str | None]:
        """Return schedule, prediction type of the model's output and the declared one, as they are at a backward."""

    def judge(self) -> None:
        """Take note of a step of the audit, or of its end."""


@dataclass(frozen=True)
class _Output:
    """An output that is waiting for its backward pass, with what its model was given.

    ``prediction`` holds ``len(log_snr)`` of the ``batch`` samples of a call: all, or one of a list; ``part`` says in
    which part of the batch they are.
    """

    prediction: Tensor
    version: int
    log_snr: Tensor
    part: Tensor
    batch: int
    noisy: Tensor | None


class Audit:
    """Looks at the first backward passes through a model's outputs.

    Args:
        steps: how many, at least.
        samples: go on until so many were seen.
        subject: what is audited; a weak reference.
    """

    def __init__(self, steps: int, samples: int, subject: Subject) -> None:
        if steps < 1:
            raise ValueError(f"`audit` must be >= 1, got {steps!r}.")
        self.steps, self.samples = steps, samples
        self._subject = weakref.ref(subject)
        self._done = self._passes = self._calls = 0
        self._tolerance = 1e-3
        self._waiting: list[_Output] = []
        self._seen: list[Samples] = []
        self._not_read: list[str] = []
        _listen(self)

    @property
    def active(self) -> bool:
        """Whether it goes on looking."""
        return self in _LISTENING

    def stop(self) -> None:
        """Look at no more; ``torch.autograd.backward`` is its old self when no audit looks."""
        self._waiting = []
        _LISTENING.discard(self)
        _stop_listening_to_nobody()

    def __getstate__(self) -> dict[str, Any]:
        """A copy, in another process say, keeps what was seen and looks at no more."""
        return vars(self) | {"_waiting": [], "_subject": None}

    def watch(self, prediction: Tensor, log_snr: Tensor, part: Tensor, batch: int, noisy: Any) -> None:
        """Take note of an output with gradients.

        Args:
            prediction: (B, ...), or a sample (...) of a list of ``batch``.
            log_snr: (B,), or (1,).
            part: (B,) bool, or (1,): in which part of the batch, where a loss has a mean over each.
            batch: number of samples in the call.
            noisy: the model's input.
        """
        noisy = noisy.detach() if isinstance(noisy, Tensor) else None
        output = _Output(prediction, prediction._version, log_snr.detach(), part, batch, noisy)
        self._waiting = [*self._waiting[1 - max(_WATCHED, batch) :], output]
        self._calls += 1
        if self._calls > _PATIENCE * self.steps * batch and not self._done:  # trained otherwise, by autograd.grad say
            self._give_up()

    def before_backward(self, roots: list[Tensor], gradients: list[Tensor | None] | None) -> None:
        """Look at the outputs that this backward pass is going to reach."""
        subject = self._subject()
        if subject is None:
            self.stop()
            return
        self._passes += subject.weighted  # its own calls count, those of other models do not
        measured = [self._measure(roots, gradients, output, subject) for output in self._waiting]
        reached = [i for i, (is_reached, _) in enumerate(measured) if is_reached]
        if reached:
            self._done += 1
            self._seen += [samples for _, samples in measured if samples is not None]
            self._waiting = self._waiting[reached[-1] + 1 :]  # what is older and was not reached will not be
            if self._done >= self.steps and sum(len(seen.weight) for seen in self._seen) >= self.samples:
                self.stop()
            subject.judge()
        elif self._passes >= _PATIENCE * self.steps and not self._done:
            self._give_up()

    def _give_up(self) -> None:
        self.stop()
        subject = self._subject()
        if subject is not None:
            subject.judge()

    def _measure(
        self, roots: list[Tensor], gradients: list[Tensor | None] | None, output: _Output, subject: Subject
    ) -> tuple[bool, Samples | None]:
        """Return whether this pass reaches an output, and its samples if they can be read."""
        o = output.prediction
        try:
            obstacle = _obstacle(output, roots)
            if obstacle is not None:
                raise RuntimeError(obstacle)
            products = _products(roots, gradients, o)
        except RuntimeError as error:
            self._not_read = sorted({*self._not_read, str(error).splitlines()[0]})
            return True, None
        if products is None:
            return False, None
        self._tolerance = max(self._tolerance, 8 * torch.finfo(o.dtype).eps)
        flat = (part.detach().cpu().double().reshape(len(output.log_snr), -1) for part in (o, *products))
        return True, _samples(output, self._passes, subject.audited(), *flat)

    def report(self) -> AuditReport:
        """Sum up what was seen."""
        subject = self._subject() if self._subject is not None else None
        if subject is None:
            return summarise([], None, "", None, 0, ["the model is gone"])  # type: ignore[arg-type]
        return summarise(self._seen, *subject.audited(), self._tolerance, self._not_read)


def _products(
    roots: list[Tensor], gradients: list[Tensor | None] | None, o: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Return g, u, Hu and Hg with g scaled to maximum 1, shapes of ``o``; None if the roots do not depend on it."""
    kept: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    with torch.enable_grad():
        (g,) = torch.autograd.grad(roots, [o], gradients, create_graph=True, **kept)
        if g is None:
            return None
        fixed = g.detach()
        u = torch.where(fixed == 0, 0.0, _signs(fixed))
        if not g.requires_grad:  # a loss that is linear
            return fixed, u, torch.zeros_like(u), torch.zeros_like(u)
        (hu,) = torch.autograd.grad((g * u).sum(), [o], **kept)
        (hg,) = torch.autograd.grad((g * _normed(fixed)).sum(), [o], **kept)
    if hu is None or hg is None:
        raise RuntimeError("the loss cannot be differentiated twice")
    return fixed, u, hu, hg


def _signs(like: Tensor) -> Tensor:
    """Random signs that leave the script's own random numbers alone."""
    generator = torch.Generator(like.device).manual_seed(0)
    return torch.randint(0, 2, like.shape, generator=generator, device=like.device).to(like.dtype) * 2 - 1


def _normed(g: Tensor) -> Tensor:
    return g / g.abs().amax().clamp(min=torch.finfo(g.dtype).tiny)


def _samples(
    output: _Output,
    backward: int,
    of: tuple[Schedule, str, str | None],
    o: Tensor,
    g: Tensor,
    u: Tensor,
    hu: Tensor,
    hg: Tensor,
) -> Samples:
    """Turn the products, all (n, D), into weights and what else they tell."""
    schedule, output_type, declared = of
    types = [output_type]
    if isinstance(schedule, DiscreteSchedule) and declared not in (None, output_type):
        types.append(str(declared))  # a config can be wrong
    elements = u.abs().sum(1)
    curvature = (hu * u).sum(1) / elements  # of one element; a mask takes elements away and leaves this as it is
    along_g = (hg * _normed(g)).sum(1) / _normed(g).square().sum(1)
    not_parallel = 1 - (hu * u).sum(1) / (hu.norm(dim=1) * u.norm(dim=1))
    off = torch.maximum(not_parallel, (along_g / curvature - 1).abs())
    entering = elements > 0
    return Samples(
        log_snr=output.log_snr.cpu().double(),
        weight=torch.where(entering, curvature * elements.max() * output.batch / 2, 0.0),
        off=torch.where(entering, off.nan_to_num(math.inf), 0.0),
        part=output.part.cpu(),
        backward=torch.full_like(elements, backward, dtype=torch.int64),
        elements=elements,
        implied=_implied(output, o - g / curvature.unsqueeze(1), u != 0, schedule, types),
    )


def _implied(output: _Output, target: Tensor, inside: Tensor, schedule: Schedule, types: list[str]) -> Tensor:
    """Return the variance of the noise that target and input imply, and its correlation with the x0 they imply.

    From ``y = a x0 + b n`` and ``x = alpha x0 + sigma n``: n = (a x - alpha y) / (a sigma - b alpha), which is standard
    normal and independent of x0 = (x - sigma n) / alpha if the loss is on the target that the prediction type names.
    Shape (n, hypotheses, 2), for each prediction type, for y and -y (some flow models point at the data), and for each
    scale that the input may have: as it is mixed, of unit variance, c_in x. NaN where there is no such input.
    """
    log_snr, n = output.log_snr.cpu().double(), len(target)
    noisy = output.noisy
    if noisy is None or len(noisy) != n or noisy[0].numel() > target.shape[1]:
        noisy = torch.full((n, 1), math.nan)
    x = noisy.cpu().double().reshape(n, -1)
    y, inside = target[:, : x.shape[1]], inside[:, : x.shape[1]]  # what follows is a learned variance
    found = []
    for kind, sign, sigma_data in itertools.product(types, (1, -1), (None, 1.0, schedule.sigma_data or 1.0)):
        a, b = target_coefficients(kind, log_snr, schedule.sigma_data)
        alpha, sigma = alpha_sigma(log_snr, schedule.coords if sigma_data is None else "ve")
        scale = 1.0 if sigma_data is None else (sigma**2 + sigma_data**2).rsqrt()
        alpha, sigma = alpha * scale, sigma * scale
        noise = (a[:, None] * x - sign * alpha[:, None] * y) / (a * sigma - b * alpha)[:, None]
        x0 = (x - sigma[:, None] * noise) / alpha[:, None]
        found.append(torch.stack((_mean(noise**2, inside), _correlation(noise, x0, inside)), 1))
    return torch.stack(found, 1)


def _mean(values: Tensor, inside: Tensor) -> Tensor:
    return torch.where(inside, values, 0.0).sum(1) / inside.sum(1)


def _correlation(one: Tensor, other: Tensor, inside: Tensor) -> Tensor:
    one, other = (part - _mean(part, inside).unsqueeze(1) for part in (one, other))
    return _mean(one * other, inside) / (_mean(one**2, inside) * _mean(other**2, inside)).sqrt()


_LISTENING: weakref.WeakSet[Audit] = weakref.WeakSet()
_original: Any = None  # what stands behind ours, as torch.autograd.backward
_installed = _within = _measuring = False


def measuring() -> bool:
    """Whether an audit is differentiating just now: hooks on gradients then let them pass."""
    return _measuring


def _listen(audit: Audit) -> None:
    global _original, _installed
    _LISTENING.add(audit)
    # once: under the wrapper of another library ours is still called
    if not _installed or torch.autograd.backward is _original:
        _original, _installed = torch.autograd.backward, True
        torch.autograd.backward = _listening_backward


def _stop_listening_to_nobody() -> None:
    global _installed
    if not _LISTENING and torch.autograd.backward is _listening_backward:
        torch.autograd.backward, _installed = _original, False


def _listening_backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
    """``torch.autograd.backward``, announced to the audits; not when checkpointing calls it within itself."""
    global _within, _measuring
    if _within:
        _original(tensors, grad_tensors, *args, **kwargs)
        return
    roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    gradients = [grad_tensors] if isinstance(grad_tensors, Tensor) else grad_tensors
    _measuring = True
    try:
        for audit in list(_LISTENING):
            audit.before_backward(roots, None if gradients is None else list(gradients))
    finally:
        _measuring = False
    _stop_listening_to_nobody()  # their models may be gone
    _within = True
    try:
        _original(tensors, grad_tensors, *args, **kwargs)
    finally:
        _within = False


def _obstacle(output: _Output, roots: list[Tensor]) -> str | None:
    """Return why a loss must not be differentiated ahead of its backward pass, if so."""
    o = output.prediction
    if o._version != output.version:
        return "the output was modified in place"
    if o.retains_grad:
        return "the output retains its gradient"
    for hook in (o._backward_hooks or {}).values():
        function: Any = getattr(hook, "func", hook)
        if getattr(function, "__self__", None) is None or not hasattr(function.__self__, "auditing"):
            return f"{getattr(function, '__module__', None) or 'another library'} has a hook of its own on the output"
    waiting, met = [root.grad_fn for root in roots], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in met or node is o.grad_fn:
            continue
        met.add(node)
        ddp = getattr(node, "ddp_weakref", None)
        if ddp is not None and ddp().static_graph:
            return "DDP's static_graph takes the first pass through its graph for the backward pass"
        waiting += [following for following, _ in node.next_functions]
    return None
