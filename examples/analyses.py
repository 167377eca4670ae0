"""The analyses that a study can ask for, by name: each makes a section of tables and figures from records."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import study_figures as figures
import torch
from matplotlib.figure import Figure
from studies import Study
from study_claims import PROFILES, distances, fewer_steps, groups, laws, lower, mean_profile, select
from study_records import Record
from study_statistics import Bounds, Estimate, brown_forsythe, estimate, holm, steps_to, welch
from study_text import interval, markdown, number, share, with_spread

from snrweights.optimal.scaling import power_law


@dataclass
class Section:
    """What an analysis found.

    Attributes:
        title: of the section.
        text: Markdown under it.
        values: the numbers of the text, for results.json.
        figures: file name without ending -> figure, shown below the text.
    """

    title: str
    text: str = ""
    values: Any = None
    figures: dict[str, Figure] = field(default_factory=dict)


ANALYSES: dict[str, Callable[..., Section]] = {}


def analysis(function: Callable[..., Section]) -> Callable[..., Section]:
    """Register an analysis by its name: a section from study, records, and the arguments in the study's file."""
    ANALYSES[function.__name__] = function
    return function


def blocks(study: Study, records: list[Record], by: Sequence[str]) -> Iterable[tuple[str, list[Record]]]:
    """Yield title and records of every combination of levels of the axes ``by`` that has records."""
    for levels in itertools.product(*(study.axes[axis] for axis in by)):
        found = select(records, dict(zip(by, levels, strict=True)))
        if found:
            yield ", ".join(levels), found


@analysis
def course(
    study: Study,
    records: list[Record],
    metrics: Sequence[str],
    compare: str,
    by: Sequence[str] = (),
    thresholds: Mapping[str, Sequence[float]] | None = None,
) -> Section:
    """Metrics over steps, a curve for each level of an axis."""
    panels = {}
    for metric, (title, found) in itertools.product(metrics, list(blocks(study, records, by))):
        runs = {level: [r.series[metric] for r in select(found, {compare: level})] for level in study.axes[compare]}
        panels[metric, title or study.title] = {level: series for level, series in runs.items() if series}
    floors = {
        metric: float(np.mean([record.results[f"{metric}_real_vs_real"] for record in records]))
        for metric in metrics
        if all(f"{metric}_real_vs_real" in record.results for record in records)
    }
    text = "Lines are means over seeds, bands their range.\n"
    return Section("Over steps", text, figures={"course": figures.curves(panels, thresholds or {}, floors)})


@analysis
def final(
    study: Study,
    records: list[Record],
    metrics: Sequence[str],
    compare: str,
    reference: str,
    by: Sequence[str] = (),
) -> Section:
    """The last value of metrics: mean and spread by level, each tested against the reference.

    Where ``by`` makes several blocks, one of a single level is left out: nothing is compared there.
    """
    rows = []
    for metric, (title, found) in itertools.product(metrics, list(blocks(study, records, by))):
        ends = {level: [r.last(metric) for r in select(found, {compare: level})] for level in study.axes[compare]}
        ends = {level: values for level, values in ends.items() if values}
        if by and len(ends) == 1:
            continue
        base = ends.get(reference, [])
        for level, values in ends.items():
            one, other = {compare: level}, {compare: reference}
            less = None if level == reference else estimate(lower(found, one, other, metric))
            t, degrees, p = (math.nan,) * 3 if level == reference else welch(values, base)
            spread = math.nan if level == reference else brown_forsythe(values, base)
            rows.append(
                {
                    "metric": metric,
                    "block": title,
                    "level": level,
                    "values": values,
                    "lower": less and {"mean": less.mean[0], "t": less.interval, "bootstrap": less.bootstrap},
                    "welch": {"t": t, "degrees": degrees, "p": p},
                    "spread_p": spread,
                }
            )
    for name in ("welch", "spread"):
        tested = [row["welch"]["p"] if name == "welch" else row["spread_p"] for row in rows]
        for row, p in zip(rows, holm(tested), strict=True):
            row[f"{name}_p_holm"] = p
    head = ["metric", *([", ".join(by)] if by else []), compare, "mean ± std", "seeds"]
    head += [f"lower than {reference} (95 %)", "Welch's t", "p", "p of spread"]
    lines = []
    for row in rows:
        cells = [figures.label_of(row["metric"]), *([row["block"]] if by else []), f"`{row['level']}`"]
        cells += [with_spread(row["values"]), str(len(row["values"]))]
        cells += [lower_cell(row["lower"])]
        cells += [number(value) for value in (row["welch"]["t"], row["welch_p_holm"], row["spread_p_holm"])]
        lines.append(cells)
    text = markdown(head, lines) + (
        "\nShares are of runs with the same seed, their intervals by bootstrap over seeds. Welch's t compares means; "
        "spreads are compared by Brown and Forsythe's test, which sees little with few seeds. Both p are corrected for "
        "the comparisons of this table (Holm); as they were before they are in `results.json`.\n"
    )
    return Section("At the end", text, rows)


def lower_cell(found: Mapping[str, Any] | None) -> str:
    """Write by what share a level is lower than the reference, and the interval where there is one."""
    if not found:
        return ""
    return share(found["mean"]) + (f" ({interval(found['bootstrap'], percent=True)})" if found["bootstrap"] else "")


@analysis
def steps(
    study: Study,
    records: list[Record],
    thresholds: Mapping[str, Sequence[float]],
    compare: str,
    reference: str,
    by: Sequence[str] = (),
) -> Section:
    """Steps to thresholds fixed beforehand, and the share saved against the reference."""
    rows: list[dict[str, Any]] = []
    lines = []
    for metric, (title, found) in itertools.product(thresholds, list(blocks(study, records, by))):
        for level in study.axes[compare]:
            runs, cells = select(found, {compare: level}), []
            for threshold in thresholds[metric] if runs else ():
                reached = [steps_to(run.series[metric], threshold) for run in runs]
                one, other = {compare: level}, {compare: reference}
                saved = None if level == reference else estimate(fewer_steps(found, one, other, metric, [threshold]))
                row = {"metric": metric, "block": title, "threshold": threshold, "level": level, "steps": reached}
                rows.append(row | {"fewer": saved and {"mean": saved.mean, "t": saved.interval}})
                cells.append(reached_cell(reached, saved))
            if runs:
                lines.append([figures.label_of(metric), *([title] if by else []), f"`{level}`", *cells])
    most = max(map(len, thresholds.values()))
    head = ["metric", *([", ".join(by)] if by else []), compare, *(f"threshold {i + 1}" for i in range(most))]
    given = "; ".join(
        f"{figures.label_of(metric)}: {', '.join(f'{level:g}' for level in levels)}"
        for metric, levels in thresholds.items()
    )
    text = (
        f"Thresholds: {given}. In brackets: steps saved against {reference}.\n\n"
        + markdown(head, lines)
        + (
            "\nBetween evaluations the logarithm of the distance is taken to be linear. A run that never reached a "
            "threshold counts as one that needs at least all its steps: what it then saves has bounds, not a value; "
            "mean steps are of the runs where the step is known.\n"
        )
    )
    return Section("Steps to thresholds", text, rows)


def reached_cell(reached: Sequence[Bounds], saved: Estimate | None) -> str:
    """Write mean steps of the runs where they are known, how many that are if not all, and the share saved."""
    known = [low for low, high in reached if low == high]
    early = sum(low == 0 for low, _ in reached)
    cell = with_spread(known) if known else ""
    if len(known) < len(reached):
        cell += f" {len(known) + early} of {len(reached)}" + (" before the first evaluation" if early else "")
    if saved:
        cell += f" ({interval(saved.mean, percent=True)})"
    return cell.strip()


@analysis
def matching(
    study: Study,
    records: list[Record],
    metrics: Sequence[str],
    compare: str,
    pair: Sequence[str],
    reference: str,
    by: Sequence[str] = (),
) -> Section:
    """How far two methods are apart over intermediate evaluations, beside each one's distance to a reference."""
    arms = [{compare: level} for level in (*pair, reference)]
    rows = []
    for metric, (title, found) in itertools.product(metrics, list(blocks(study, records, by))):
        for seed, triples in groups(found, arms).items():
            for triple in triples:
                d = distances(triple, metric)
                values = {"pair": d.pair, pair[0]: d.one, pair[1]: d.other, "ratio": d.ratio}
                rows.append({"metric": metric, "block": title, "seed": seed, **values})
    head = ["metric", *([", ".join(by)] if by else []), "seeds", f"{pair[0]} to {pair[1]}"]
    head += [f"{name} to {reference}" for name in pair] + ["times closer"]
    lines = []
    for (metric, title), same in itertools.groupby(rows, key=lambda row: (row["metric"], row["block"])):
        found_rows = list(same)
        cells = [figures.label_of(metric), *([title] if by else []), str(len({row["seed"] for row in found_rows}))]
        names = ("pair", *pair, "ratio")
        lines.append([*cells, *(with_spread([row[name] for row in found_rows]) for name in names)])
    text = markdown(head, lines) + "\nMeans over the evaluations before the last of absolute differences, same seed.\n"
    return Section("How close the two weights are", text, rows)


@analysis
def factors(study: Study, records: list[Record], metrics: Sequence[str], references: Mapping[str, str]) -> Section:
    """Main effects: how much lower the last value is for a level than for its axis' reference, all else equal."""
    rows = []
    for metric, (axis, reference) in itertools.product(metrics, references.items()):
        for level in study.axes[axis]:
            found = estimate(lower(records, {axis: level}, {axis: reference}, metric)) if level != reference else None
            if found:
                row = {"metric": metric, "axis": axis, "level": level, "reference": reference}
                rows.append(row | {"mean": found.mean[0], "t": found.interval, "bootstrap": found.bootstrap})
    lines = [
        [
            figures.label_of(row["metric"]),
            row["axis"],
            f"`{row['level']}`",
            f"`{row['reference']}`",
            share(row["mean"]),
            interval(row["t"], percent=True),
            interval(row["bootstrap"], percent=True) if row["bootstrap"] else "",
        ]
        for row in rows
    ]
    head = ["metric", "factor", "level", "against", "lower by", "95 %, Student", "95 %, bootstrap"]
    text = markdown(head, lines) + "\nGeometric means over all levels of the other factors; intervals over seeds.\n"
    return Section("Factors", text, rows)


@analysis
def by_noise(
    study: Study,
    records: list[Record],
    profile: str,
    compare: str,
    by: Sequence[str] = (),
    window: Sequence[float] | None = None,
) -> Section:
    """A quantity by log-SNR at the last evaluation, a curve for each level, mean over seeds; its means in a window."""
    panels = {
        title or study.title: {
            level: _mean_profile([(run.profiles[profile]["log_snr"], run.profiles[profile]["values"]) for run in runs])
            for level in study.axes[compare]
            if (runs := select(found, {compare: level}))
        }
        for title, found in blocks(study, records, by)
    }
    figure = figures.profiles(panels, profile)
    text, rows = "Means over seeds, at the noise levels that every run has met often enough.\n", []
    for title, found in blocks(study, records, by) if window else ():
        for level in study.axes[compare]:
            if values := [mean_profile(run, profile, window) for run in select(found, {compare: level})]:
                rows.append({"block": title, "level": level, "values": values})
    if window:
        head = [*([", ".join(by)] if by else []), compare, "mean ± std", "seeds"]
        lines = [
            [*([row["block"]] if by else []), f"`{row['level']}`", with_spread(row["values"]), str(len(row["values"]))]
            for row in rows
        ]
        text += f"\nOver log-SNR from {window[0]:g} to {window[1]:g}:\n\n" + markdown(head, lines)
    return Section(figures.label_of(profile), text, rows or None, {profile.replace("_", "-"): figure})


@analysis
def variance_maps(study: Study, records: list[Record], compare: str) -> Section:
    """The variance of the unweighted loss by log-SNR, after fractions of the steps."""
    fractions = study.collect.variance_at
    total = max(series[-1][0] for record in records for series in record.series.values())
    maps = {
        f"after {fraction * total:.0f} of {total} steps": {
            level: _mean_profile(
                [(run.variance[str(fraction)]["log_snr"], run.variance[str(fraction)]["variance"]) for run in runs]
            )
            for level in study.axes[compare]
            if (runs := select(records, {compare: level}))
        }
        for fraction in fractions
    }
    text = (
        "Of the loss of epsilon before any weight, of all that was seen until then, to the nearest logged step; means "
        "over seeds.\n"
    )
    figure = figures.heat_maps(maps, "variance of the loss")
    return Section("Variance by noise level", text, figures={"variance": figure})


@analysis
def scaling(
    study: Study,
    records: list[Record],
    axis: str,
    sizes: Mapping[str, float],
    window: Sequence[float],
    unit: str,
) -> Section:
    """Power laws of the training loss in the model's size: of the raw loss, and of what is above the optimal one."""
    found = laws(records, axis, sizes, window)
    rows = [
        {"seed": seed, "loss": name, "values": values, "exponent": law.exponent, "r_squared": law.r_squared}
        for seed, both in found.items()
        for name, (values, law) in both.items()
    ]
    lines, panels = [], {}
    for name in PROFILES if found else ():
        values = [list(of_size) for of_size in zip(*(both[name][0] for both in found.values()), strict=True)]
        law, together = power_law(list(sizes.values()), values), [both[name][1].r_squared for both in found.values()]
        cells = [
            number(law.exponent),
            interval(law.exponent_interval),
            number(law.r_squared),
            number(law.correlation),
        ]
        lines.append([name, str(len(found)), *cells, with_spread(together)])
        grid = torch.logspace(*(math.log10(end(sizes.values())) for end in (min, max)), 50, dtype=torch.float64)
        points = [(size, loss) for size, losses in zip(sizes.values(), values, strict=True) for loss in losses]
        panels[name] = (points, list(zip(grid.tolist(), law.at(grid).tolist(), strict=True)))
    head = ["loss", "seeds", "exponent", "95 %", "R²", "correlation", "R² by seed"]
    text = markdown(head, lines) + (
        f"\nOf epsilon, mean over log-SNR from {window[0]:g} to {window[1]:g}. Fitted to the logarithms of all runs, "
        "for the last column to those of each seed; intervals by bootstrap.\n"
    )
    return Section(f"Loss over {unit}", text, rows, {"scaling": figures.scaling(panels, unit)} if panels else {})


def _mean_profile(profiles: Sequence[tuple[Sequence[float], Sequence[float]]]) -> tuple[list[float], list[float]]:
    """Return the mean over runs at the levels that every one of them has."""
    found: dict[float, list[float]] = {}
    for log_snr, values in profiles:
        for level, value in zip(log_snr, values, strict=True):
            found.setdefault(level, []).append(value)
    levels = sorted(level for level, values in found.items() if len(values) == len(profiles))
    return levels, [float(np.mean(found[level])) for level in levels]
