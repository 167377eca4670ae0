"""The doctor's findings: one check each, from a configuration to what is wrong with it."""

from __future__ import annotations

import copy
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from snrweights.drawn import log_snr_moments, mean_under
from snrweights.objective import Objective, objective
from snrweights.schedules import CosineSchedule, FlowSchedule, Schedule, lookup
from snrweights.weightings.base import Weighting
from snrweights.weightings.bound import WeightCurve

Severity = Literal["error", "warning", "note"]

# what scripts call a weighting of their own
WEIGHT_FLAGS = (
    "snr_gamma",
    "min_snr_gamma",
    "debiased_estimation_loss",
    "scale_v_pred_loss_like_noise_pred",
    "v_pred_like_loss",
    "soft_min_snr_gamma",
)

_PURE_NOISE = -16.0  # log-SNR, below which float32 images hold nothing but noise
_SMALL_BATCH = 16  # samples, whose mean strays by a quarter of their standard deviation
_STAND_IN = -24 * math.log(2)  # diffusers ends some zero-SNR tables with 2**-24


@dataclass(frozen=True)
class Finding:
    """One thing to know about a configuration.

    Attributes:
        name: stable; a paragraph of ``examples/guides/doctor.md`` has it as its heading.
        severity: ``"error"`` breaks or defeats the training, ``"warning"`` changes it unasked, ``"note"`` informs.
        message: what, and how much.
        remedy: the one change that mends it.
        figures: the numbers in the message.

    Example:
        >>> print(Finding("an-example", "note", "Something.", "change it"))
        note      an-example
                  Something.
                  -> change it
    """

    name: str
    severity: Severity
    message: str
    remedy: str
    figures: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        width = {"width": 100, "subsequent_indent": "          "}
        message = textwrap.fill(self.message, initial_indent="          ", **width)  # type: ignore[arg-type]
        remedy = textwrap.fill(self.remedy, initial_indent="          -> ", **width)  # type: ignore[arg-type]
        return f"{self.severity:<10}{self.name}\n{message}\n{remedy}"


@dataclass(frozen=True)
class Configuration:
    """What the checks look at; arguments as for ``doctor``. ``weighting`` is ``native`` where no method is given."""

    source: Any
    schedule: Schedule
    weighting: Weighting
    curve: WeightCurve
    density_given: bool
    batch_size: int | None
    accumulation: int
    prior_preservation: bool
    sample_mask: bool
    script_flags: tuple[str, ...]
    refused: str | None = None

    @property
    def weighted(self) -> bool:
        """Whether a method was given."""
        return self.weighting.name != "native"

    @property
    def objective(self) -> Objective:
        """What is optimised."""
        return objective(
            self.schedule,
            self.weighting,
            prediction_type=self.curve.prediction_type,
            density=self.curve.density,
            clamp_max=self.curve.clamp_max,
        )


Check = Callable[[Configuration], Iterator[Finding]]
CHECKS: dict[str, Check] = {}


def _check(check: Check) -> Check:
    CHECKS[check.__name__.strip("_").replace("_", "-")] = check
    return check


@_check
def _scheduler_cannot_train(c: Configuration) -> Iterator[Finding]:
    if c.refused is not None:
        yield Finding(
            "scheduler-cannot-train",
            "error",
            f"{c.refused} What follows goes by its alphas_cumprod.",
            "noise with DDPMScheduler.from_config(scheduler.config), and keep this one for sampling",
        )


@_check
def _zero_terminal_snr(c: Configuration) -> Iterator[Finding]:
    grid = c.schedule.grid()
    log_snr = c.schedule.log_snr(grid)
    dead = grid[(log_snr == -math.inf) | ((log_snr - _STAND_IN).abs() < 1e-3)].tolist()
    if dead and c.curve.prediction_type == "epsilon":
        yield Finding(
            "zero-terminal-snr",
            "error",
            f"At t = {_listed(dead)} the input is pure noise: epsilon can be read off it and says nothing about the "
            f"image, so that these steps teach nothing and sampling from there divides by zero. Pasted Min-SNR code "
            f"gives NaN there.",
            'train with `prediction_type="v_prediction"` (or "sample")',
            {"timesteps": dead},
        )


@_check
def _half_precision_table(c: Configuration) -> Iterator[Finding]:
    table = getattr(c.source, "alphas_cumprod", c.source)
    if not isinstance(table, Tensor) or table.dtype not in (torch.float16, torch.bfloat16):
        return
    rounded = table.double().cpu()
    exact = c.schedule.log_snr(torch.arange(len(table)))
    error = torch.expm1(rounded.log() - torch.log1p(-rounded) - exact)[exact.isfinite()].abs()
    if c.source is table:  # nothing to compare with: what half a unit in the last place can do
        error = (0.5 * torch.finfo(table.dtype).eps / (1 - rounded)).abs()
    infinite = int((~error.isfinite()).sum())
    worst = 100 * float(error[error.isfinite()].max())
    yield Finding(
        "half-precision-table",
        "error",
        f"alphas_cumprod is {str(table.dtype).removeprefix('torch.')}: SNR is off by up to {worst:.0f} %"
        + (f" and infinite at {infinite} timesteps." if infinite else "."),
        "keep the scheduler in float32: move models, not schedulers, to half precision",
        {"largest_error_percent": worst, "infinite": infinite},
    )


@_check
def _table_is_not_what_noises(c: Configuration) -> Iterator[Finding]:
    table = getattr(c.source, "alphas_cumprod", None)
    if not isinstance(table, Tensor) or not hasattr(c.source, "add_noise"):
        return
    own = getattr(c.source, "timesteps", None)
    steps = torch.arange(len(table)) if own is None else own.cpu()
    steps = steps[torch.linspace(0, len(steps) - 1, 9).long()]
    steps = steps[(steps >= 0) & (steps <= len(table) - 1)]
    worst, where = 0.0, 0.0
    for t in steps:
        a = float(lookup(table.double().cpu(), t.double()))
        stated = math.log(a / (1 - a)) if 0 < a < 1 else math.copysign(math.inf, a - 0.5)
        done = _log_snr_by_noising(c.source, t)
        off = 0.0 if stated == done or min(stated, done) < _PURE_NOISE else abs(stated - done)
        if off > worst:
            worst, where = off, float(t)
    if worst > 0.01:
        yield Finding(
            "table-is-not-what-noises",
            "error",
            f"At t = {where:g} add_noise mixes at a log-SNR {worst:.2f} away from what alphas_cumprod says "
            f"(a factor {math.exp(min(worst, 99)):.3g} in SNR): weights that scripts compute from the table are wrong.",
            "noise with the scheduler that the table belongs to, such as DDPMScheduler.from_config(scheduler.config)",
            {"timestep": where, "log_snr_difference": worst},
        )


@_check
def _second_weighting(c: Configuration) -> Iterator[Finding]:
    if c.script_flags and c.weighted and not isinstance(c.schedule, FlowSchedule):
        yield Finding(
            "second-weighting",
            "error",
            f"The script weighs by itself ({_flags(c)}), and {c.weighting!r} would multiply that.",
            f"drop {_flags(c)}, or use no method",
            {"flags": list(c.script_flags)},
        )


@_check
def _flag_ignored_on_flow(c: Configuration) -> Iterator[Finding]:
    if c.script_flags and isinstance(c.schedule, FlowSchedule):
        yield Finding(
            "flag-ignored-on-flow",
            "error",
            f"{_flags(c)} is for schedules with alphas_cumprod; on flow matching trainers that take it ignore it "
            "without a word, and the training is unweighted.",
            "drop it and weigh with `snrweights.attach` or `snrweights launch`, which do flow",
            {"flags": list(c.script_flags)},
        )


@_check
def _non_monotone_objective(c: Configuration) -> Iterator[Finding]:
    found = c.objective
    if not found.monotone:
        yield Finding(
            "non-monotone-objective",
            "note",
            f"w_KG rises with log-SNR by {found.negative_mass:.3g} of its maximum in all: the loss is not a mixture of "
            "variational bounds. Many objectives in use are like that, EDM's and the flow default among them.",
            'if you want a bound: `method="sigmoid"`, "elbo" or "edm_monotonic"',
            {"negative_mass": found.negative_mass},
        )


@_check
def _loss_scale(c: Configuration) -> Iterator[Finding]:
    mean = c.curve.mean()
    if c.weighted and math.isfinite(mean) and not 0.5 <= mean <= 2:
        yield Finding(
            "loss-scale",
            "warning",
            f"The weight averages {mean:.3g}: gradients are {mean:.3g} times as large. SGD, gradient clipping and "
            "weight decay that is added to the gradient feel that as another learning rate; Adam and AdamW only "
            "through their epsilon.",
            'give `normalize="mean"`',
            {"mean_weight": mean},
        )


@_check
def _density_does_not_cover(c: Configuration) -> Iterator[Finding]:
    if not c.weighted:
        return

    def moment(power: int) -> float:  # of the weight on v, whose error is of one size at every noise level
        return mean_under(c.curve.density, lambda log_snr: (power * c.curve.log_weight(log_snr, "v_prediction")).exp())

    mean, square = moment(1), moment(2)
    share = mean**2 / square if 0 < square < math.inf and math.isfinite(mean) else 0.0
    if share < 0.1:
        yield Finding(
            "density-does-not-cover",
            "error" if share == 0 else "warning",
            f"The timesteps drawn and {c.weighting!r} hardly meet: the weight "
            + (
                "has no finite variance under their density, and single samples dominate the gradient."
                if share == 0
                else f"is carried by {100 * share:.2g} % of them, and the gradient is as noisy as with a batch that "
                "much smaller."
            ),
            "draw timesteps from a density nearer the objective (`density=`), or bound the weight (`clamp_max=`)",
            {"effective_share": share},
        )


@_check
def _prior_preservation(c: Configuration) -> Iterator[Finding]:
    if not c.prior_preservation:
        return
    if c.script_flags:
        yield Finding(
            "prior-preservation",
            "error",
            f"With prior preservation {_flags(c)} has one weight for each of the whole batch and losses for its first "
            "half only: scripts crash on that, or multiply every loss by every weight.",
            f'drop {_flags(c)} and give `sample_mask="first_half"` to `snrweights.attach`',
            {"flags": list(c.script_flags)},
        )
    elif c.weighted and not c.sample_mask:
        yield Finding(
            "prior-preservation",
            "warning",
            "The class images in the second half of each batch are weighted too, and the balance that "
            "prior_loss_weight sets moves.",
            'give `sample_mask="first_half"`',
        )


@_check
def _micro_batches(c: Configuration) -> Iterator[Finding]:
    small = c.batch_size is not None and c.batch_size < _SMALL_BATCH
    if not c.weighting.batch_dependent or c.weighting.averaged_over_steps or not (small or c.accumulation > 1):
        return
    size = "" if c.batch_size is None else f" of {c.batch_size}"
    figures: dict[str, Any] = {"batch_size": c.batch_size, "accumulation": c.accumulation}
    message = f"{c.weighting!r} compares a sample with the others in its micro-batch{size}"
    if c.accumulation > 1:
        message += f", and an optimizer step has {c.accumulation} of those: it is not the weight of the whole batch"
    if c.batch_size == 1:
        message += ". One sample is its own mean: there is nothing to compare, and no weight of its own."
    elif c.batch_size is not None:
        own, step = 1 / math.sqrt(c.batch_size), 1 / math.sqrt(c.batch_size * c.accumulation)
        _, spread = log_snr_moments(c.curve.density)
        figures |= {"stray": own, "stray_of_step": step, "stray_in_log_snr": own * spread}
        message += (
            f". The mean of {c.batch_size} samples strays from batch to batch by {100 * own:.0f} % of their standard "
            f"deviation (±{own * spread:.2g} for the mean log-SNR)"
            + (f"; that of the step by {100 * step:.0f} %." if c.accumulation > 1 else ".")
        )
    else:
        message += f", but of means that stray √{c.accumulation} = {math.sqrt(c.accumulation):.2g} times as far."
    yield Finding(
        "micro-batches",
        "warning",
        message,
        'use larger micro-batches, `center_on` in your own loop, or `center="fixed"`, which no batch moves',
        figures,
    )


@_check
def _shifted_objective(c: Configuration) -> Iterator[Finding]:
    if c.density_given:
        return
    name, value, plain = _shift_of(c.schedule)
    if plain is None or c.weighting.target == "objective":  # w_KG / p undoes a shift of p
        return
    moved = c.objective
    reference = objective(plain, c.weighting, prediction_type=c.curve.prediction_type)
    overlap = _overlap(moved, reference)
    yield Finding(
        "shifted-objective",
        "note",
        f"{name}={value:g} moves the draws by {abs(_displacement(c.schedule)):.2f} in log-SNR towards the "
        f"{'noise' if _displacement(c.schedule) < 0 else 'data'}, and the objective with them: {100 * overlap:.0f} % "
        "of it is where it was.",
        "an objective that stays where it is: a w_KG-defined method such as sigmoid(bias)",
        {"displacement": _displacement(c.schedule), "overlap": overlap},
    )


def _shift_of(schedule: Schedule) -> tuple[str, float, Schedule | None]:
    if isinstance(schedule, FlowSchedule) and schedule.shift != 1:
        return "shift", schedule.shift, FlowSchedule(1.0, schedule.num_train_timesteps, schedule.reversed)
    if isinstance(schedule, CosineSchedule) and schedule.resolution != 64:
        return "resolution", schedule.resolution, CosineSchedule(64.0, schedule.t_min, schedule.t_max)
    return "", 1.0, None


def _displacement(schedule: Schedule) -> float:
    if isinstance(schedule, FlowSchedule):
        return -2 * math.log(schedule.shift)
    assert isinstance(schedule, CosineSchedule)
    return 2 * math.log(64 / schedule.resolution)


def _overlap(one: Objective, other: Objective) -> float:
    """The mass that two objectives share, each scaled to mass 1, as weights on the v error."""
    x = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    densities = []
    for objective_ in (one, other):
        i = torch.searchsorted(objective_.log_snr, x).clamp(1, len(objective_.log_snr) - 1)
        x0, x1 = objective_.log_snr[i - 1], objective_.log_snr[i]
        y = torch.lerp(objective_.w_kg[i - 1], objective_.w_kg[i], ((x - x0) / (x1 - x0)).clamp(0, 1))
        y = torch.where((x < objective_.log_snr[0]) | (x > objective_.log_snr[-1]), 0.0, y)
        y = y * torch.sigmoid(x)  # on the v error, which is of one size at every noise level
        densities.append(y / y.sum())
    return float(torch.minimum(*densities).sum())


def _log_snr_by_noising(scheduler: Any, t: Tensor) -> float:
    """Log-SNR at one timestep, from what the scheduler does to a unit signal and to a unit noise."""
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    signal = float(copy.deepcopy(scheduler).add_noise(one, zero, t.reshape(1)))  # some remember what they noised
    noise = float(copy.deepcopy(scheduler).add_noise(zero, one, t.reshape(1)))
    if signal == 0 or noise == 0:
        return -math.inf if signal == 0 else math.inf
    return 2 * math.log(signal / noise)


def _listed(values: Sequence[float]) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:5])
    return shown + (f", ... ({len(values)} in all)" if len(values) > 5 else "")


def _flags(c: Configuration) -> str:
    return ", ".join(f"--{flag}" for flag in c.script_flags)
