"""What an audit's measurements amount to: whether a loss is weighted by noise level, how, and on which target."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from snrweights.densities import DENSITIES, Density
from snrweights.drawn import as_density, default_density
from snrweights.predictions import LIMIT, convert_log_weight
from snrweights.recognition import Recognition, depends_on_noise, recognise
from snrweights.schedules import DiscreteSchedule, Schedule

_ENOUGH = 256  # draws, below which nothing is said of their density
_UNIFORM = "uniform over the schedule's timesteps"


@dataclass(frozen=True)
class AuditReport:
    """What a script's loss turned out to be.

    Attributes:
        steps: backward passes that were read.
        log_snr: (N,) of the samples, ascending.
        weight: (N,) on the MSE of the model's own output, times whatever scales the loss; 0 for samples that do not
            enter it.
        is_mse: whether the loss is an MSE with one weight a sample.
        constant: whether that weight does not depend on the noise level. What scales a whole backward pass, or a part
            of its batch (that of ``sample_mask``, else each half), is left out of that.
        known_as: the weightings that it equals, up to such factors, the simplest first.
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
        if self.constant:
            return "the same at every noise level"
        return ", or ".join(self.known_as[:3]) or "of its own kind"

    @property
    def levels(self) -> str:
        """Between which noise levels samples were seen."""
        return f"log-SNR {self.log_snr[0]:.2f} to {self.log_snr[-1]:.2f}" if self.log_snr else "nothing"

    def __str__(self) -> str:
        if not self.steps:
            return "audit: no loss was seen" + "".join(f"; {reason}" for reason in self.not_read)
        answers = {True: "as the prediction type says", False: "another than the prediction type says"}
        target = "cannot be told" if self.target_as_expected is None else answers[self.target_as_expected]
        lines = [
            f"audit of {self.steps} steps, {len(self.weight)} samples, {self.levels}",
            f"  loss       {'a weighted MSE' if self.is_mse else 'not a weighted MSE'}",
            f"  weight     {self.description if self.is_mse else 'cannot be told'}",
            f"  target     {target}",
            f"  timesteps  {self.density or 'too few to tell their density, or none that is known'}",
        ]
        return "\n".join(lines + [f"  not read   {reason}" for reason in self.not_read])


@dataclass(frozen=True)
class Samples:
    """Measurements of one output, on the CPU in float64; all (n,), but for ``implied`` (n, hypotheses, 2).

    Attributes:
        log_snr: of the samples.
        weight: on their MSE.
        off: how far the loss is from a weighted MSE; 0 is one.
        part: in which part of the batch they are.
        backward: the number of the backward pass.
        elements: that enter the loss; 0 where a sample does not.
        implied: variance of the noise that target and input imply and its correlation with the x0 that they imply,
            for each hypothesis on what they are.
    """

    log_snr: Tensor
    weight: Tensor
    off: Tensor
    part: Tensor
    backward: Tensor
    elements: Tensor
    implied: Tensor


def summarise(
    seen: list[Samples],
    schedule: Schedule,
    output_type: str,
    declared: str | None,
    tolerance: float,
    not_read: list[str],
) -> AuditReport:
    """Sum up measurements.

    Args:
        seen: one entry for each output that was read.
        schedule: of the timesteps.
        output_type: prediction type of the model's output.
        declared: the target on whose MSE the loss is said to be, if that is another.
        tolerance: relative error of the weights.
        not_read: reasons, passed on.
    """
    if not seen:
        return AuditReport(0, [], [], False, False, [], None, None, not_read)
    joined = {name: torch.cat([getattr(samples, name) for samples in seen]) for name in vars(seen[0])}
    order = joined["log_snr"].argsort()
    all_ = Samples(**{name: value[order] for name, value in joined.items()})
    entering = all_.elements > 0
    is_mse = bool(entering.any()) and bool((all_.off[entering] <= max(1e-4, tolerance / 4)).all())
    known: list[Recognition] = []
    constant = is_mse
    if is_mse:
        usable = all_.weight.isfinite() & (all_.weight > 0) & all_.log_snr.isfinite()
        for target, weight in _readings(all_.weight, all_.log_snr, output_type, declared, schedule).items():
            known = _recognised(all_, weight, usable, target, schedule, tolerance)
            constant = [match.name for match in known] == ["native"] or not (
                known or depends_on_noise(all_.log_snr, weight, all_.backward, tolerance)
            )
            if constant:
                break
    return AuditReport(
        steps=len(all_.backward.unique()),
        log_snr=all_.log_snr.tolist(),
        weight=all_.weight.tolist(),
        is_mse=is_mse,
        constant=constant,
        known_as=[str(match) for match in known],
        target_as_expected=_as_expected(all_.implied[entering], all_.elements[entering]) if is_mse else None,
        density=density_of(all_.log_snr, schedule),
        not_read=not_read,
    )


def _recognised(
    samples: Samples, weight: Tensor, usable: Tensor, target: str, schedule: Schedule, tolerance: float
) -> list[Recognition]:
    """Recognise a weight up to a factor for each backward pass, or else for each part of its batch."""
    parts = 2 * samples.backward + samples.part.long()
    for groups in (samples.backward, parts):
        alone = torch.bincount(groups)[groups] == 1  # nothing to compare with: such samples share a factor
        shared = torch.where(alone, -1, groups)
        known = recognise(samples.log_snr[usable], weight[usable], schedule, target, tolerance, shared[usable])
        if known:
            return known
    return []


def _readings(
    weight: Tensor, log_snr: Tensor, output_type: str, declared: str | None, schedule: Schedule
) -> dict[str, Tensor]:
    """Return the weight on the MSE that was said to be the loss; of a config that may be wrong also the plain one."""
    if declared is None or declared == output_type:
        return {output_type: weight}
    finite = log_snr.clamp(-LIMIT, LIMIT)
    converted = convert_log_weight(weight.log(), finite, output_type, declared, schedule.sigma_data).exp()
    readings = {declared: converted}
    return readings | {output_type: weight} if isinstance(schedule, DiscreteSchedule) else readings


def _as_expected(implied: Tensor, elements: Tensor) -> bool | None:
    """Whether under one hypothesis the implied noise has variance 1 and nothing to do with the implied x0."""
    known = implied.isfinite().all(2).all(1)
    if not bool(known.any()):
        return None
    variance, correlation = implied[known].unbind(2)
    spread = (2 / elements[known]).sqrt().unsqueeze(1)
    right = ((variance - 1).abs() <= 0.05 + 6 * spread) & (correlation.abs() <= 0.05 + 5 * spread)
    return bool((right.double().mean(0) >= 0.9).any())


def density_of(log_snr: Tensor, schedule: Schedule) -> str | None:
    """Name the density that draws follow by a Kolmogorov-Smirnov test at 1 %, or None.

    Example:
        >>> from snrweights import FlowSchedule
        >>> density_of(FlowSchedule().log_snr((torch.arange(300) + 0.5) / 300), FlowSchedule())
        "uniform over the schedule's timesteps"
    """
    if len(log_snr) < _ENOUGH:
        return None
    candidates: dict[str, Density] = {_UNIFORM: default_density(schedule)}
    candidates |= {name: as_density(name, schedule) for name in DENSITIES}
    near = 1.63 / math.sqrt(len(log_snr))
    distances = {name: _distance(log_snr, density) for name, density in candidates.items()}
    best = min(distances, key=lambda name: (distances[name], name != _UNIFORM))
    return best if distances[best] <= near else None


def _distance(log_snr: Tensor, density: Density) -> float:
    """The largest distance between the distribution of draws and that of a density."""
    u = torch.linspace(0, 1, 20001, dtype=torch.float64)
    quantiles = density.icdf(u)
    at = torch.searchsorted(quantiles.contiguous(), log_snr.double().sort().values) / (len(u) - 1)
    n = len(log_snr)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return float(torch.maximum((at - steps[:-1]).abs().max(), (at - steps[1:]).abs().max()))
