"""The charts of runs: of each by itself, and of several in one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from snrweights.charts import DASHED, Line, bar_chart, extent, heat_map, line_chart, number, shares
from snrweights.optimal import floor_by_bin
from snrweights.plots import FEW, relative_weight
from snrweights.predictions import LIMIT, log_error_ratio
from snrweights.runs import Run
from snrweights.statistics import LossStatistics, mean_between

_DISTANCE = re.compile(r"(fid|fd_[a-z0-9]+|kid(_[a-z0-9]+)?)_[0-9]+k?")  # and the number of samples
_LOG_SNR = "log-SNR   (noise ← → clean)"
_VARIANCE = ("within a noise level", "between noise levels")
_VARIANCE_NOTE = "Var[L] = E[Var[L | log-SNR]] + Var[E[L | log-SNR]], with log-SNR in the tracker's bins."
_MOST_INTERVALS = 60  # of a heat map
_MOST_CURVES = 6  # of held-out losses in one chart


def training(runs: Sequence[Run]) -> Iterable[str]:
    """Yield what was logged over steps, a chart each with a curve per run.

    Example:
        >>> run = Run("a", metrics=[{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
        >>> ["Training loss" in chart for chart in training([run])]
        [True]
    """
    own_weight = "Each run's is weighted by its own weight; held-out losses are not." if len(runs) > 1 else ""
    for key, title, y_label, note in (
        ("loss", "Training loss (weighted)", "loss", own_weight),
        ("validation_loss", "Held-out loss (unweighted)", "loss", ""),
        ("gap", "Gap to the optimal loss", "loss", "Unweighted, each on its run's own target; its noise included."),
        ("lr", "Learning rate", "rate", ""),
    ):
        series = [(i, run.name, *run.series(key)) for i, run in enumerate(runs)]
        lines = [Line(name, x, y, i) for i, name, x, y in series if x]
        if lines:
            yield line_chart(title, lines, x_label="step", y_label=y_label, log=key not in ("lr", "gap"), note=note)
    yield from _distances(runs)


def _distances(runs: Sequence[Run]) -> Iterable[str]:
    """Yield a chart for each distance, such as ``fid_50k``, that a run measured more than once."""
    names = dict.fromkeys(key for run in runs for line in run.metrics for key in line if _DISTANCE.fullmatch(key))
    for name in names:
        series = [(i, run.name, *run.series(name)) for i, run in enumerate(runs)]
        if max(len(x) for _, _, x, _ in series) > 1:
            lines = [Line(label, x, y, i) for i, label, x, y in series if x]
            positive = all(value > 0 for line in lines for value in line.y)  # a kernel distance need not be
            yield line_chart(f"Distance to the data, {name}", lines, x_label="step", y_label=name, log=positive)


def by_noise(run: Run, seen: LossStatistics | None) -> Iterable[str]:
    """Yield the charts of the loss over log-SNR of one run.

    Args:
        run: the run.
        seen: what its tracker saw.

    Example:
        >>> list(by_noise(Run("a"), None))
        []
    """
    if seen is not None and bool((seen.count > 0).any()):
        both = [seen] if run.curve is None else [seen, seen.times(relative_weight(seen, run.curve))]
        curves = [_moments(statistics) for statistics in both]
        within = _positive(y for lines in curves for line in lines for y in line.y)
        optimal = _optimal(run, seen, within)
        for title, lines, unit in zip(("Unweighted", "Weighted"), curves, (_unit(seen.unit), "loss"), strict=False):
            note = "" if title == "Unweighted" else "Times the weight, scaled to mean 1 over the losses seen."
            shown = [*lines, *optimal] if title == "Unweighted" else lines
            yield line_chart(title, shown, x_label=_LOG_SNR, y_label=unit, y_extent=within, note=note)
        filled = (seen.count > 0).nonzero().flatten().tolist()
        low, high = filled[0], filled[-1] + 1
        yield bar_chart(
            "Where the losses were",
            seen.edges[low : high + 1].tolist(),
            seen.count[low:high].tolist(),
            x_label=_LOG_SNR,
            y_label="losses per bin",
            note=f"{number(float(seen.count.sum()), 10)} losses in all.",
        )
        rows = zip(("unweighted", "weighted"), (s.total_variance() for s in both), strict=False)
        yield shares("Total variance of the loss", list(rows), _VARIANCE, _VARIANCE_NOTE)
        yield from _history(run)
    validations = run.validations()
    if validations:
        yield line_chart("Held out, unweighted", _validations(validations), x_label=_LOG_SNR, y_label="loss")


def _unit(unit: str | None) -> str:
    return f"mean squared error of {unit}" if unit else "loss as it was tracked"


def _moments(statistics: LossStatistics) -> list[Line]:
    seen = statistics.count > 0
    centres = statistics.centres[seen].tolist()
    return [
        Line("mean", centres, statistics.mean[seen].tolist()),
        Line("standard deviation", centres, _deviation(statistics)[seen].tolist(), index=DASHED + 1),
    ]


def _optimal(run: Run, seen: LossStatistics, within: tuple[float, float] | None) -> list[Line]:
    """Return the optimal loss of the training data as a line, where it is not below the others' scale."""
    if run.optimal is None or run.curve is None or seen.unit is None or within is None:
        return []
    floor = floor_by_bin(seen.edges, run.optimal, run.curve.density, seen.unit, run.curve.sigma_data)
    shown = (seen.count > 0) & (floor >= within[0])
    return [Line("optimal", seen.centres[shown].tolist(), floor[shown].tolist(), index=2)]


def _deviation(statistics: LossStatistics) -> torch.Tensor:
    """Return the standard deviation per bin, NaN where there are too few losses to tell."""
    return torch.where(statistics.count >= FEW, statistics.variance.sqrt(), torch.nan)


def _positive(values: Iterable[float]) -> tuple[float, float] | None:
    return extent(value for value in values if value > 0)


def _history(run: Run) -> Iterable[str]:
    history = run.tracker.history() if run.tracker else []
    if len(history) < 2:
        return
    history = _thin(history, _MOST_INTERVALS + 1)
    means = mean_between(history)
    seen = means.isfinite().any(1).nonzero().flatten().tolist()
    if not seen:
        return
    low, high = seen[0], seen[-1] + 1
    accumulation = run.config.get("optimizer.gradient_accumulation_steps") or 1  # updates of the tracker in a step
    yield heat_map(
        "Unweighted, over steps",
        [update / accumulation for update, _ in history],
        history[0][1].edges[low : high + 1].tolist(),
        means[low:high].tolist(),
        x_label="step",
        y_label=_LOG_SNR,
        value_label=_unit(history[0][1].unit),
    )


def _thin(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most so many of the items, evenly spread, the first and the last among them."""
    last = len(items) - 1
    return [items[i] for i in sorted({round(i * last / (most - 1)) for i in range(most)})]


def _validations(validations: Mapping[int, tuple[list[float], list[float]]]) -> list[Line]:
    steps = _thin(sorted(validations), _MOST_CURVES)
    return [
        Line(f"step {number(step, 10)}", *validations[step], strength=0.25 + 0.75 * i / len(steps))
        for i, step in enumerate(steps, 1)
    ]


def compared(runs: Sequence[Run], statistics: Sequence[LossStatistics | None]) -> Iterable[str]:
    """Yield the charts of the loss over log-SNR in which all runs are, in one unit.

    Args:
        runs: the runs.
        statistics: what their trackers saw.

    Example:
        >>> list(compared([Run("a"), Run("b")], [None, None]))
        []
    """
    converted, unit, note = _in_one_unit(runs, statistics)
    seen = {i: s for i, s in enumerate(converted) if s is not None and bool((s.count > 0).any())}
    weights = {i: relative_weight(s, curve) for i, s in seen.items() if (curve := runs[i].curve) is not None}
    charts = (
        ("Mean of the loss", {i: s.mean for i, s in seen.items()}, _unit(unit), note),
        ("Standard deviation of the loss", {i: _deviation(s) for i, s in seen.items()}, _unit(unit), note),
        ("Weight", weights, f"on the error of {unit}" if unit else "on the loss", "Mean 1 over the losses seen."),
        ("Mean of the weighted loss", {i: w * seen[i].mean for i, w in weights.items()}, "loss", "Weights as above."),
    )
    for title, values, y_label, remark in charts:
        lines = [_line(runs[i].name, seen[i], value, i) for i, value in values.items()]
        if lines:
            yield line_chart(title, lines, x_label=_LOG_SNR, y_label=y_label, note=remark)
    held_out = [
        Line(run.name, *validations[max(validations)], i)
        for i, run in enumerate(runs)
        if (validations := run.validations())
    ]
    if held_out:
        yield line_chart("Held out, unweighted, last", held_out, x_label=_LOG_SNR, y_label="loss")
    if seen:
        rows = [(runs[i].name, s.total_variance()) for i, s in seen.items()]
        yield shares("Total variance of the unweighted loss", rows, _VARIANCE, note or _VARIANCE_NOTE)


def _line(name: str, statistics: LossStatistics, values: torch.Tensor, index: int) -> Line:
    seen = statistics.count > 0
    return Line(name, statistics.centres[seen].tolist(), values[seen].tolist(), index)


def _in_one_unit(
    runs: Sequence[Run], statistics: Sequence[LossStatistics | None]
) -> tuple[list[LossStatistics | None], str | None, str]:
    """Convert what is in other units to the error of epsilon, at the middle of each bin; leave out what cannot be."""
    units = {s.unit for s in statistics if s is not None}
    if len(units) <= 1:
        return list(statistics), next(iter(units), None), ""
    converted: list[LossStatistics | None] = []
    left_out: list[str] = []
    for run, s in zip(runs, statistics, strict=True):
        sigma_data = run.curve.sigma_data if run.curve else None
        if s is None or s.unit is None or (s.unit == "edm" and sigma_data is None):
            converted.append(None)
            left_out += [] if s is None else [run.name]
            continue
        at = s.centres.clamp(-LIMIT, LIMIT)
        factor = (log_error_ratio("epsilon", at) - log_error_ratio(s.unit, at, sigma_data)).exp()
        converted.append(replace(s.times(factor), unit="epsilon"))
    note = "In the error of epsilon, converted at the middle of each bin."
    return (
        converted,
        "epsilon",
        note + (f" Without {', '.join(left_out)}: their unit cannot be converted." if left_out else ""),
    )
