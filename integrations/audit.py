"""What a script really optimises: the weight that it applies to each sample, read off its own loss.

For the first steps ``torch.autograd.backward`` is wrapped. Before it runs, the loss is differentiated twice by the
model's output o, which touches no parameter: with ``g = dL/do`` and a random sign u for each element,
``v_i = <d(g u)/do, u>_i B / 2`` is the weight on the mean squared error of sample i, whatever the target is, and
``d(g u)/do`` is parallel to u if and only if the loss is such an MSE. Its target is ``o - g B D / (2 v)``.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from snrweights.densities import DENSITIES, Density
from snrweights.drawn import default_density
from snrweights.predictions import LIMIT, convert_log_weight
from snrweights.process import alpha_sigma, target_coefficients
from snrweights.recognition import is_constant, recognise
from snrweights.schedules import Schedule

_NOT_PARALLEL = 1e-4  # 1 - cosine between d(g u)/do and u, above which the loss is no weighted MSE
_ENOUGH = 30  # draws, below which nothing is said of their density
_WATCHED = 8  # outputs without a backward pass that are remembered
_PATIENCE = 8  # passes for each step, after which an audit that reads nothing gives up


class DoubleWeightingError(ValueError):
    """The script weighs its loss by itself, and would be weighted twice."""


@dataclass(frozen=True)
class AuditReport:
    """What a script's loss turned out to be.

    Attributes:
        steps: backward passes looked at.
        log_snr: (N,) of the samples, ascending.
        weight: (N,) on the MSE of the model's own output, times whatever scales the loss.
        is_mse: whether the loss is an MSE with one weight a sample.
        constant: whether that weight is the same at every noise level, at least within each part of a batch: those of
            ``sample_mask``, else the halves.
        known_as: the weightings that it equals, up to a factor, the simplest first.
        target_as_expected: whether the target is the one of the prediction type; None if that could not be told.
        density: which the timesteps follow; None if there were too few or none fits.
        not_read: why some losses could not be looked at.
    """

    steps: int
    log_snr: list[float]
    weight: list[float]
    is_mse: bool
    constant: bool
    known_as: list[str]
    target_as_expected: bool | None
    density: str | None
    not_read: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for JSON, which has no infinities: they are None."""
        numbers = {"log_snr": self.log_snr, "weight": self.weight}
        finite = {name: [v if math.isfinite(v) else None for v in values] for name, values in numbers.items()}
        return asdict(self) | finite

    @property
    def description(self) -> str:
        """What the weight is, in words."""
        return (
            "the same at every noise level" if self.constant else ", or ".join(self.known_as[:3]) or "of its own kind"
        )

    def __str__(self) -> str:
        if not self.steps:
            return "audit: no loss was seen" + "".join(f"; {reason}" for reason in self.not_read)
        answers = {True: "as the prediction type says", False: "another than the prediction type says"}
        target = "cannot be told" if self.target_as_expected is None else answers[self.target_as_expected]
        levels = f"log-SNR {self.log_snr[0]:.2f} to {self.log_snr[-1]:.2f}"
        lines = [
            f"audit of {self.steps} steps, {len(self.weight)} samples, {levels}",
            f"  loss       {'a weighted MSE' if self.is_mse else 'not a weighted MSE'}",
            f"  weight     {self.description if self.is_mse else 'cannot be told'}",
            f"  target     {target}",
            f"  timesteps  {self.density or 'too few to tell their density, or none that is known'}",
        ]
        return "\n".join(lines + [f"  not read   {reason}" for reason in self.not_read])


class Subject(Protocol):
    """Whom an audit is of.

    Attributes:
        weighted: whether its model was called with gradients.
    """

    weighted: bool

    def audited(self) -> tuple[Schedule, str]:
        """Return the schedule and the prediction type of the model's output, as they are just before a backward."""

    def judge(self) -> None:
        """Take note of a step of the audit, or of its end."""


@dataclass(frozen=True)
class _Output:
    """An output that is waiting for its backward pass, with what its model was given.

    ``prediction`` holds ``len(log_snr)`` of the ``batch`` samples of a call: all, or one of a list; ``part`` says in
    which part of the batch they are.
    """

    prediction: Tensor
    log_snr: Tensor
    part: Tensor
    batch: int
    noisy: Tensor | None


class Audit:
    """Looks at the first backward passes through a model's outputs.

    Args:
        steps: how many.
        subject: what is audited; not kept alive by the audit.
    """

    def __init__(self, steps: int, subject: Subject) -> None:
        if steps < 1:
            raise ValueError(f"`audit` must be >= 1, got {steps!r}.")
        self.steps = steps
        self.measuring = False
        self._subject = subject
        self._done = self._passes = 0
        self._tolerance = 1e-3
        self._waiting: list[_Output] = []
        self._seen: list[dict[str, Tensor]] = []
        self._not_read: list[str] = []
        _LISTENING.add(self)
        torch.autograd.backward = _listening_backward

    @property
    def active(self) -> bool:
        """Whether it goes on looking."""
        return self in _LISTENING

    def stop(self) -> None:
        """Look at no more; ``torch.autograd.backward`` is its old self when no audit looks."""
        self._waiting = []
        _LISTENING.discard(self)
        _stop_listening_to_nobody()

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
        output = _Output(prediction, log_snr.detach(), part, batch, noisy)
        self._waiting = [*self._waiting[1 - max(_WATCHED, batch) :], output]

    def before_backward(self, roots: list[Tensor], gradients: list[Tensor | None] | None) -> None:
        """Look at the outputs that this backward pass is going to reach."""
        self.measuring = True
        try:
            measured = [self._measure(roots, gradients, output) for output in self._waiting]
        finally:
            self.measuring = False
        reached = any(samples is not None for samples in measured)
        self._waiting = [output for output, samples in zip(self._waiting, measured, strict=True) if samples is None]
        self._seen += [samples for samples in measured if samples]
        self._passes += self._subject.weighted  # its calls count, those of other models do not
        self._done += reached
        if self._done >= self.steps or self._passes == _PATIENCE * self.steps:
            self.stop()
        if reached or not self.active:
            self._subject.judge()

    def __getstate__(self) -> dict[str, Any]:
        """A copy, in another process say, keeps what was seen and looks at no more."""
        return vars(self) | {"_waiting": []}

    def _measure(
        self, roots: list[Tensor], gradients: list[Tensor | None] | None, output: _Output
    ) -> dict[str, Tensor] | None:
        """Return the samples of an output; empty if they cannot be read, None if this pass does not reach it."""
        o = output.prediction
        try:
            with torch.enable_grad():
                kept: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
                obstacle = _obstacle(o, roots)
                if obstacle is not None:
                    raise RuntimeError(obstacle)
                (g,) = torch.autograd.grad(roots, [o], gradients, create_graph=True, **kept)
                if g is None:
                    return None
                u = torch.where(g.detach() == 0, 0.0, _signs(g))
                hu = torch.zeros_like(u)  # of a loss that is linear
                if g.requires_grad:
                    (hu,) = torch.autograd.grad((g * u).sum(), [o], **kept)
                if hu is None:
                    raise RuntimeError("the loss cannot be differentiated twice")
        except RuntimeError as error:
            self._not_read = sorted({*self._not_read, str(error).splitlines()[0]})
            return {}
        self._tolerance = max(self._tolerance, 8 * torch.finfo(o.dtype).eps)
        parts = (part.detach().double().reshape(len(output.log_snr), -1) for part in (o, g, u, hu))
        return _read(output, self._subject.audited(), *parts)

    def report(self, declared: str | None = None) -> AuditReport:
        """Sum up what was seen; ``declared`` is the target on whose MSE the loss is said to be, if it is another."""
        samples = [samples for samples in self._seen if samples]
        schedule, output_type = self._subject.audited()
        if not samples:
            return AuditReport(0, [], [], False, False, [], None, None, self._not_read)
        seen = {name: torch.cat([part[name] for part in samples]) for name in samples[0]}
        order = seen["log_snr"].argsort()
        log_snr, weight, part = (seen[name][order] for name in ("log_snr", "weight", "part"))
        is_mse = bool((seen["off"] <= max(_NOT_PARALLEL, self._tolerance)).all())
        on_declared = convert_log_weight(
            weight.log(), log_snr.clamp(-LIMIT, LIMIT), output_type, declared or output_type, schedule.sigma_data
        ).exp()
        usable = weight.isfinite() & (weight > 0)
        matches = []
        if is_mse and bool(usable.any()):
            matches = recognise(log_snr[usable], weight[usable], schedule, output_type, self._tolerance)
        return AuditReport(
            steps=self._done,
            log_snr=log_snr.tolist(),
            weight=weight.tolist(),
            is_mse=is_mse,
            constant=is_mse and any(_constant(values, part, self._tolerance) for values in (weight, on_declared)),
            known_as=[str(match) for match in matches],
            target_as_expected=_noise_is_normal(seen["noise_variance"], seen["elements"]) if is_mse else None,
            density=density_of(log_snr, schedule),
            not_read=self._not_read,
        )


def _signs(like: Tensor) -> Tensor:
    """Random signs that leave the script's own random numbers alone."""
    generator = torch.Generator(like.device).manual_seed(0)
    return torch.randint(0, 2, like.shape, generator=generator, device=like.device).to(like.dtype) * 2 - 1


def _read(output: _Output, of: tuple[Schedule, str], o: Tensor, g: Tensor, u: Tensor, hu: Tensor) -> dict[str, Tensor]:
    """Return the weight of each sample and what else is told by o, g, u and Hu, all (n, D)."""
    elements = u.abs().sum(1)
    along = (hu * u).sum(1)
    weight = along * output.batch / 2
    off = 1 - along / (hu.norm(dim=1) * u.norm(dim=1))
    target = o - g * (output.batch * elements / (2 * weight)).unsqueeze(1)
    samples = {
        "log_snr": output.log_snr.double(),
        "weight": weight,
        "off": torch.where(hu.norm(dim=1) == 0, math.inf, off),
        "part": output.part,
        "elements": elements,
        "noise_variance": _noise_variance(output, target, *of),
    }
    return {name: value.cpu() for name, value in samples.items()}


def _noise_variance(output: _Output, target: Tensor, schedule: Schedule, output_type: str) -> Tensor:
    """Return the variance of the noise that target and input imply, (n, 3), for each scale the input may have.

    From ``y = a x0 + b n`` and ``x = alpha x0 + sigma n``: n = (a x - alpha y) / (a sigma - b alpha), which is
    normal if the loss is on the target that the prediction type names. NaN where there is no such input.
    """
    log_snr, n = output.log_snr.double(), len(target)
    a, b = target_coefficients(output_type, log_snr, schedule.sigma_data)
    noisy = output.noisy
    if noisy is None or len(noisy) != n or noisy[0].numel() > target.shape[1]:
        noisy = torch.full((n, 1), math.nan)
    x = noisy.double().reshape(n, -1).to(target)
    y = target[:, : x.shape[1]]  # what follows is a learned variance
    variances = []
    for sigma_data in (None, 1.0, schedule.sigma_data or 1.0):  # x as it is mixed; scaled to unit variance; c_in x
        alpha, sigma = alpha_sigma(log_snr, schedule.coords if sigma_data is None else "ve")
        scale = 1.0 if sigma_data is None else (sigma**2 + sigma_data**2).rsqrt()
        alpha, sigma = alpha * scale, sigma * scale
        implied = (a[:, None] * x - alpha[:, None] * y) / (a * sigma - b * alpha)[:, None]
        variances.append(implied.square().mean(1))
    return torch.stack(variances, 1)


def _noise_is_normal(variance: Tensor, elements: Tensor) -> bool | None:
    """Whether one of the scales implies noise of variance 1, up to its spread over so many elements."""
    known = variance.isfinite().all(1)
    if not bool(known.any()):
        return None
    spread = 0.05 + 6 * (2 / elements[known]).sqrt()
    within = (variance[known] - 1).abs() <= spread.unsqueeze(1)
    return bool((within.double().mean(0) >= 0.9).any())


def _constant(weight: Tensor, part: Tensor, tolerance: float) -> bool:
    """Whether a weight is the same for all, or in each part: prior preservation is a mean over either."""
    parts = [weight[part], weight[~part]]
    return is_constant(weight, tolerance) or all(len(part) and is_constant(part, tolerance) for part in parts)


def density_of(log_snr: Tensor, schedule: Schedule) -> str | None:
    """Name the density that draws follow by a Kolmogorov-Smirnov test at 1 %, or None.

    Example:
        >>> from snrweights import FlowSchedule
        >>> density_of(FlowSchedule().log_snr((torch.arange(100) + 0.5) / 100), FlowSchedule())
        "uniform over the schedule's timesteps"
    """
    if len(log_snr) < _ENOUGH:
        return None
    candidates: dict[str, Density] = {"uniform over the schedule's timesteps": default_density(schedule)}
    candidates |= {name: density() for name, density in DENSITIES.items()}  # type: ignore[operator]
    near = 1.63 / math.sqrt(len(log_snr))
    distances = {name: _distance(log_snr, density) for name, density in candidates.items()}
    if distances["uniform over the schedule's timesteps"] <= near:
        return "uniform over the schedule's timesteps"
    best = min(distances, key=lambda name: distances[name])
    return best if distances[best] <= near else None


def _distance(log_snr: Tensor, density: Density) -> float:
    """The largest distance between the distribution of draws and that of a density."""
    u = torch.linspace(0, 1, 20001, dtype=torch.float64)
    quantiles = density.icdf(u)
    at = torch.searchsorted(quantiles.contiguous(), log_snr.double().sort().values) / (len(u) - 1)
    n = len(log_snr)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return float(torch.maximum((at - steps[:-1]).abs().max(), (at - steps[1:]).abs().max()))


_LISTENING: weakref.WeakSet[Audit] = weakref.WeakSet()
_backward = torch.autograd.backward
_within = False


def _listening_backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
    """``torch.autograd.backward``, announced to the audits; not when checkpointing calls it within itself."""
    global _within
    if _within:
        _backward(tensors, grad_tensors, *args, **kwargs)
        return
    roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    gradients = [grad_tensors] if isinstance(grad_tensors, Tensor) else grad_tensors
    for audit in list(_LISTENING):
        audit.before_backward(roots, None if gradients is None else list(gradients))
    _stop_listening_to_nobody()  # their models may be gone
    _within = True
    try:
        _backward(tensors, grad_tensors, *args, **kwargs)
    finally:
        _within = False


def _stop_listening_to_nobody() -> None:
    if not _LISTENING and torch.autograd.backward is _listening_backward:
        torch.autograd.backward = _backward


def _obstacle(output: Tensor, roots: list[Tensor]) -> str | None:
    """Return why a loss must not be differentiated ahead of its backward pass, if so."""
    for hook in (output._backward_hooks or {}).values():
        function: Any = getattr(hook, "func", hook)
        if getattr(function, "__self__", None) is None or not hasattr(function.__self__, "auditing"):
            return f"{getattr(function, '__module__', None) or 'another library'} has a hook of its own on the output"
    waiting, met = [root.grad_fn for root in roots], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in met or node is output.grad_fn:
            continue
        met.add(node)
        ddp = getattr(node, "ddp_weakref", None)
        if ddp is not None and ddp().static_graph:
            return "DDP's static_graph takes the first pass through its graph for the backward pass"
        waiting += [following for following, _ in node.next_functions]
    return None
