"""What will go wrong in a training configuration, how much, and the one change that mends it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from snrweights.densities import Density
from snrweights.findings import CHECKS, WEIGHT_FLAGS, Configuration, Finding
from snrweights.losses import Method
from snrweights.schedulers import as_schedule
from snrweights.schedules import DiscreteSchedule, Schedule, alphas_cumprod_from_betas
from snrweights.weightings.base import Normalize, get_weighting


@dataclass(frozen=True)
class Diagnosis:
    """What ``doctor`` returns.

    Attributes:
        findings: the errors first.
        configuration: what was looked at.

    Example:
        >>> doctor("linear", "ddpm", prediction_type="epsilon").healthy
        True
    """

    findings: tuple[Finding, ...]
    configuration: Configuration = field(repr=False)

    @property
    def healthy(self) -> bool:
        """Whether nothing is an error."""
        return all(finding.severity != "error" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Return the findings as plain values, for JSON."""
        return {"healthy": self.healthy, "findings": [asdict(finding) for finding in self.findings]}

    def __str__(self) -> str:
        if not self.findings:
            return "Nothing found."
        return "\n\n".join(str(finding) for finding in self.findings)


def _flags_in(script_args: Sequence[str]) -> tuple[str, ...]:
    given: dict[str, str] = {}
    for arg, following in itertools.zip_longest(script_args, script_args[1:], fillvalue=""):
        name, equals, value = arg.removeprefix("--").partition("=")
        if arg.startswith("--"):
            given[name.replace("-", "_")] = value if equals else following
    return tuple(flag for flag in WEIGHT_FLAGS if given.get(flag, "none").lower() not in ("none", "0", "0.0", "false"))


def _read(scheduler: Any) -> tuple[Schedule, str | None]:
    """Return the schedule, from alphas_cumprod alone where the scheduler is refused for this reason."""
    table = getattr(scheduler, "alphas_cumprod", scheduler)
    try:
        return as_schedule(scheduler), None
    except TypeError as error:
        stated = getattr(getattr(scheduler, "config", None), "prediction_type", None)
        if not isinstance(table, Tensor) or (stated is None and table is not scheduler):
            raise
        refused: str | None = str(error)
    betas = getattr(scheduler, "betas", None)
    if table.dtype in (torch.float16, torch.bfloat16):
        refused = None  # a finding of its own
        if isinstance(betas, Tensor) and betas.dtype in (torch.float32, torch.float64):
            table = alphas_cumprod_from_betas(betas)
    prediction_type = getattr(getattr(scheduler, "config", None), "prediction_type", None)
    return DiscreteSchedule(table.double(), prediction_type), refused


def doctor(
    scheduler: Any,
    method: Method | None = None,
    *,
    prediction_type: str | None = None,
    density: Density | str | None = None,
    normalize: Normalize = None,
    clamp_max: float | None = None,
    batch_size: int | None = None,
    accumulation: int = 1,
    prior_preservation: bool = False,
    sample_mask: bool = False,
    script_args: Sequence[str] = (),
    **hp: Any,
) -> Diagnosis:
    """Say what will go wrong in a configuration, how much, and the one change that mends it.

    Args:
        scheduler: the noise scheduler of the training, or whatever else ``as_schedule`` reads.
        method: the weighting to be used; None for a script as it is.
        prediction_type: as for ``loss_weight``.
        density: as for ``loss_weight``.
        normalize: as for ``loss_weight``.
        clamp_max: as for ``loss_weight``.
        batch_size: samples in a micro-batch.
        accumulation: micro-batches in an optimizer step.
        prior_preservation: whether the second half of each batch are class images.
        sample_mask: whether ``attach`` is given one.
        script_args: arguments of the training script, in which flags for a weight of its own are looked for.
        **hp: hyperparameters of the method.

    Returns:
        A ``Diagnosis``: ``print`` it, or look at ``.findings``, ``.healthy``, ``.as_dict()``.

    Raises:
        ValueError: as ``loss_weight``.
        TypeError: a scheduler that cannot be read, with the reason.

    Example:
        >>> diagnosis = doctor("linear", "min_snr", prediction_type="epsilon", script_args=["--snr_gamma", "5.0"])
        >>> [finding.name for finding in diagnosis.findings]
        ['second-weighting', 'non-monotone-objective']
    """
    schedule, refused = _read(scheduler)
    weighting = get_weighting("native" if method is None else method, **hp)
    configuration = Configuration(
        source=scheduler,
        schedule=schedule,
        weighting=weighting,
        curve=weighting.over_log_snr(
            schedule, prediction_type=prediction_type, density=density, normalize=normalize, clamp_max=clamp_max
        ),
        density_given=density is not None,
        batch_size=batch_size,
        accumulation=accumulation,
        prior_preservation=prior_preservation,
        sample_mask=sample_mask,
        script_flags=_flags_in(script_args),
        refused=refused,
    )
    findings = [finding for check in CHECKS.values() for finding in check(configuration)]
    findings.sort(key=lambda finding: ("error", "warning", "note").index(finding.severity))
    return Diagnosis(tuple(findings), configuration)
