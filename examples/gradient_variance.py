"""How noisy the gradient of a training step is under samplers of timesteps: predicted, and measured.

python examples/gradient_variance.py
python examples/gradient_variance.py --preset digits-edm
"""

from __future__ import annotations

import itertools
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from diffusers.optimization import get_scheduler
from gradient_moments import (
    BINS,
    MEASUREMENT,
    TRAINING,
    Case,
    Evidence,
    collect,
    density_of,
    explained,
    measure,
    ratio_of,
)
from matplotlib.figure import Figure
from options import Options
from snrweights.integrations.config import parse_options
from snrweights.integrations.data import ImageTensors, load_images
from snrweights.integrations.files import write_text
from snrweights.integrations.processes import PROCESSES
from snrweights.integrations.results import commit_of, save_results
from torch.nn.utils import clip_grad_norm_
from tqdm.auto import tqdm
from trainer import make_model

import snrweights
from snrweights.plots import save
from snrweights.seeds import seed_of
from snrweights.settings import parse_settings
from snrweights.uniforms import DRAWS, Draws

PRESETS = Path(__file__).parent / "configs"
OF_PARAMETERS = "parameter_gradient"  # the sampler by what the proxies stand for
TOLERANCE = 0.15  # on what it predicts
COLOURS = {"base": "#000000", "loss_second_moment": "#D55E00", "gradient": "#0072B2", OF_PARAMETERS: "#009E73"}


@dataclass
class Settings:
    """What to train and how much to measure."""

    preset: Literal["digits", "digits-v", "digits-flow", "digits-edm"] = "digits"
    """Model and process: a file of examples/configs."""
    method: str = ""
    """Weighting (default: the preset's)."""
    steps: int = 1000
    """Optimizer steps before the weights are held fixed."""
    seed: int = 0
    """Of everything."""
    samples: int = 10_000
    """Single samples whose gradients the samplers and predictions are made of."""
    groups: int = 24
    """Groups of batches measured per sampler; the standard errors are those over groups."""
    batches: int = 10
    """Batches in a group."""
    output_dir: str = ""
    """Folder for results.json, table.md and figure.png (default: runs/gradient-variance/<preset>-<method>)."""


def make_case(options: Options) -> Case:
    """Return the case of a preset, its model not trained yet."""
    process = PROCESSES[options.process.process](options.process)
    weighting = snrweights.get_weighting(options.weight.method, **parse_settings(options.weight.set))
    weight = weighting.bind(
        process.schedule, prediction_type=process.prediction_type, density=process.density, normalize="mean"
    )
    data = options.data
    rows = load_images(data.dataset, split=data.split, column=data.image_column)
    images = torch.stack([image for image, _ in ImageTensors(rows, data.image_column, data.resolution, data.channels)])
    return Case(process.wrap(make_model(options)), process, weight, images, options.run.seed)


def train(case: Case, options: Options) -> None:
    """Train with timesteps drawn independently from the base density; the learning rate ends its course."""
    settings, sampler = options.optimizer, case.sampler(TRAINING, "independent")
    optimizer = torch.optim.Adam(case.model.parameters(), lr=settings.learning_rate)
    lengths = {"num_warmup_steps": settings.lr_warmup_steps, "num_training_steps": settings.max_steps}
    schedule = get_scheduler(settings.lr_scheduler, optimizer, **lengths)
    for step in tqdm(range(settings.max_steps), desc="Training", mininterval=1):
        optimizer.zero_grad()
        case.backward(sampler.draw(settings.train_batch_size), TRAINING, step)
        clip_grad_norm_(case.model.parameters(), settings.max_grad_norm)
        optimizer.step()
        schedule.step()


def make_samplers(case: Case, evidence: Evidence) -> Iterator[tuple[str, Draws, snrweights.TimestepSampler]]:
    """Yield name, way of drawing and sampler: from the base density, by two proxies, and by the real thing."""
    for draws in DRAWS:
        yield "base", draws, case.sampler(MEASUREMENT, draws)
    rules = {"loss_second_moment": None, "gradient": None, OF_PARAMETERS: evidence.square}
    for (name, square), draws in itertools.product(rules.items(), ("independent", "stratified")):
        rule = "gradient" if name == OF_PARAMETERS else name
        sampler = snrweights.ImportanceSampler(
            case.process.schedule,
            rule,
            density=case.process.density,
            draws=draws,
            seed=seed_of(case.seed, MEASUREMENT),
        )
        # in one update, so that nothing fades
        sampler.update(evidence.t, evidence.loss, weight=evidence.weight, gradient_square=square)
        sampler.refresh()
        yield name, draws, sampler


@dataclass
class Row:
    """A sampler with a way of drawing. Ratios are to independent draws from the base density.

    Attributes:
        sampler: its name.
        draws: independent, antithetic or stratified.
        second_moment: predicted ratio of the second moment of a sample's gradient.
        predicted: predicted ratio of the trace of the covariance of a batch's gradient.
        measured: that ratio as measured.
        standard_error: of ``measured``.
        trace_predicted: batch size times the trace itself.
        trace_measured: likewise.
        own: what an importance sampler's own statistics say (``predicted()``), of independent draws.
    """

    sampler: str
    draws: Draws
    second_moment: float
    predicted: float
    measured: float
    standard_error: float
    trace_predicted: float
    trace_measured: float
    own: dict[str, Any] | None

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was measured."""
        return self.predicted / self.measured - 1

    @property
    def own_error(self) -> float | None:
        """Of the sampler's own prediction, read as one of the trace."""
        return self.own and self.own["ratio"] / self.measured - 1


def study(case: Case, evidence: Evidence, batch_size: int, groups: int, batches: int) -> list[Row]:
    """Predict and measure the gradient under every sampler; the first row is what the others are compared with."""
    rows, base = [], None
    for name, draws, sampler in tqdm(list(make_samplers(case, evidence)), desc="Samplers"):
        second_moment = float((sampler.weight(evidence.t) * evidence.of_objective).mean())
        trace = second_moment - explained(sampler, evidence, batch_size)[draws]
        measured = measure(case, sampler, batch_size, groups, batches)
        base = base or (second_moment, trace, measured)
        ratio, standard_error = ratio_of(measured, base[2])
        independent = isinstance(sampler, snrweights.ImportanceSampler) and draws == "independent"
        rows.append(
            Row(
                sampler=name,
                draws=draws,
                second_moment=second_moment / base[0],
                predicted=trace / base[1],
                measured=ratio,
                standard_error=standard_error,
                trace_predicted=trace,
                trace_measured=float(measured.mean()),
                own=asdict(sampler.predicted()) if independent else None,
            )
        )
    return rows


def table(rows: list[Row]) -> str:
    """Return the rows in Markdown."""
    head = ("sampler", "draws", "measured", "predicted", "error", "second moment", "its own prediction", "error")
    lines = [head, ("---",) * len(head)]
    for row in rows:
        own = (f"{row.own['ratio']:.3f}", f"{100 * row.own_error:+.0f} %") if row.own else ("", "")
        measured = f"{row.measured:.3f} ± {row.standard_error:.3f}"
        numbers = (measured, f"{row.predicted:.3f}", f"{100 * row.error:+.1f} %", f"{row.second_moment:.3f}", *own)
        lines.append((f"`{row.sampler}`", row.draws, *numbers))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def densities(case: Case, evidence: Evidence) -> dict[str, list[float]]:
    """Return by sampler its density over log-SNR in bins, and under ``edges`` those of the bins."""
    drawn = {
        name: density_of(sampler, evidence)
        for name, draws, sampler in make_samplers(case, evidence)
        if draws == "independent"
    }
    return {"edges": drawn["base"][1].tolist()} | {name: density.tolist() for name, (density, _) in drawn.items()}


def figure(drawn: dict[str, list[float]], rows: list[Row]) -> Figure:
    """Draw where each sampler draws, and what was predicted beside what was measured."""
    result = Figure(figsize=(11, 4.2), layout="constrained", dpi=150)
    left, right = result.subplots(1, 2)
    for name, colour in COLOURS.items():
        left.stairs(drawn[name], drawn["edges"], color=colour, lw=1.6, label=name)
    left.set(title="where timesteps are drawn", xlabel="log-SNR   (noise  ←   → clean)", ylabel="density")
    for place, row in enumerate(rows):
        colour = COLOURS[row.sampler]
        right.barh(place, row.measured, 0.62, color=colour, alpha=0.45, label="measured" if place == 0 else None)
        right.errorbar(row.measured, place, xerr=2 * row.standard_error, color=colour, capsize=3)
        right.plot(row.predicted, place, "D", color="white", mec="black", label="predicted" if place == 0 else None)
    right.set_yticks(range(len(rows)), [f"{row.sampler}, {row.draws}" for row in rows], fontsize=9)
    right.invert_yaxis()
    right.axvline(1, color="black", lw=0.8)
    right.set(
        title="variance of the parameters' gradient", xlabel="trace of the covariance, ratio (± 2 standard errors)"
    )
    for ax in (left, right):
        ax.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return result


def main(argv: list[str] | None = None) -> None:
    """Train, measure, and write down what came out.

    Raises:
        SystemExit: a setting out of bounds; or what is predicted of the sampler by parameter gradients is further off
            than ``TOLERANCE``, after everything is written.
    """
    settings = tyro.cli(Settings, args=argv)
    for name, least in (("steps", 1), ("samples", 10 * BINS), ("groups", 2), ("batches", 2)):
        if getattr(settings, name) < least:
            raise SystemExit(f"`--{name}` must be >= {least}, got {getattr(settings, name)}.")
    began = time.perf_counter()
    flags = ["--preset", settings.preset, "--max-steps", str(settings.steps), "--seed", str(settings.seed)]
    flags += ["--method", settings.method] if settings.method else []
    options = parse_options(Options, PRESETS, settings.preset, flags)
    output = Path(settings.output_dir or f"runs/gradient-variance/{settings.preset}-{options.weight.method}")
    output.mkdir(parents=True, exist_ok=True)
    case = make_case(options)
    train(case, options)
    batch_size, trained = options.optimizer.train_batch_size, time.perf_counter() - began
    evidence = collect(case, settings.samples)
    rows = study(case, evidence, batch_size, settings.groups, settings.batches)
    drawn = densities(case, evidence)
    save(figure(drawn, rows), output / "figure.png")
    write_text(output / "table.md", table(rows))
    save_results(
        output / "results.json",
        commit=commit_of(Path(__file__).parent),
        command=shlex.join(["python", "examples/gradient_variance.py", *(sys.argv[1:] if argv is None else argv)]),
        settings=asdict(settings),
        method=options.weight.method,
        hyperparameters=parse_settings(options.weight.set),
        batch_size=batch_size,
        training_seconds=round(trained, 1),
        seconds=round(time.perf_counter() - began, 1),
        densities=drawn,
        rows=[asdict(row) | {"error": row.error, "own_error": row.own_error} for row in rows],
    )
    print(table(rows))
    for row in rows:
        if row.sampler == OF_PARAMETERS and not abs(row.error) <= TOLERANCE:
            raise SystemExit(f"{OF_PARAMETERS}, {row.draws} draws: predicted {100 * row.error:+.1f} % off.")


if __name__ == "__main__":
    main()
