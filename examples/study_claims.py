"""Claims and the one rule by which they are seen or not; effects are numbers per seed, of paired runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from studies import Study
from study_records import Record
from study_statistics import EVERYTHING, Bounds, Estimate, estimate, fewer, steps_to

from snrweights.optimal.scaling import PowerLaw, power_law

SEEN, NOT_SEEN, UNDECIDED, TOO_FEW = "seen", "not seen", "not decidable at this size", "too few runs yet"
Effect = Callable[..., dict[int, Bounds]]
EFFECTS: dict[str, Effect] = {}
SHARES = ("lower", "lower_profile", "fewer_steps")  # are written in percent


def effect(function: Effect) -> Effect:
    """Register an effect by its name: bounds per seed from records and arguments."""
    EFFECTS[function.__name__] = function
    return function


def select(records: Iterable[Record], where: Mapping[str, str]) -> list[Record]:
    """Return the records that have these levels."""
    return [record for record in records if where.items() <= record.levels.items()]


def groups(records: Iterable[Record], arms: Sequence[Mapping[str, str]]) -> dict[int, list[tuple[Record, ...]]]:
    """Return by seed the groups of records that differ in the levels of ``arms`` alone, one record for each arm.

    Levels that an arm leaves open make a group each. A seed counts when it has as many groups as any.
    """
    records = list(records)
    by_levels = {(record.seed, frozenset(record.levels.items())): record for record in records}
    found: dict[int, list[tuple[Record, ...]]] = {}
    for record in select(records, arms[0]):
        keys = [(record.seed, frozenset({**record.levels, **arm}.items())) for arm in arms]
        if all(key in by_levels for key in keys):
            found.setdefault(record.seed, []).append(tuple(by_levels[key] for key in keys))
    most = max(map(len, found.values()), default=0)
    return {seed: found[seed] for seed in sorted(found) if len(found[seed]) == most}


Where = Mapping[str, str]
PROFILES = {"raw": "loss", "subtracted": "gap"}  # of the power law


@effect
def lower(records: Iterable[Record], one: Where, other: Where, metric: str) -> dict[int, Bounds]:
    """By what share the last value of the one is lower; over several pairs by the geometric mean of the ratios."""
    found = {}
    for seed, pairs in groups(records, [one, other]).items():
        logs = [log_ratio(first.last(metric), second.last(metric)) for first, second in pairs]
        share = -math.expm1(float(np.mean(logs)))
        found[seed] = (share, share)
    return found


def log_ratio(one: float, other: float) -> float:
    """Return ln(one / other); NaN where one of them is not above 0, such as that of a run that diverged."""
    return math.log(one / other) if one > 0 and other > 0 else math.nan


@effect
def lower_profile(
    records: Iterable[Record], one: Where, other: Where, profile: str, window: Sequence[float]
) -> dict[int, Bounds]:
    """By what share the mean of a profile over a window of log-SNR is lower; mean over pairs."""
    found = {}
    for seed, pairs in groups(records, [one, other]).items():
        share = float(
            np.mean([1 - mean_profile(a, profile, window) / mean_profile(b, profile, window) for a, b in pairs])
        )
        found[seed] = (share, share)
    return found


def mean_profile(record: Record, name: str, window: Sequence[float]) -> float:
    """Return the mean of a profile over the levels in a window of log-SNR; NaN where it has none there."""
    profile = record.profiles[name]
    pairs = zip(profile["log_snr"], profile["values"], strict=True)
    within = [value for log_snr, value in pairs if window[0] <= log_snr <= window[1]]
    return float(np.mean(within)) if within else math.nan


def laws(
    records: Iterable[Record], axis: str, sizes: Mapping[str, float], window: Sequence[float]
) -> dict[int, dict[str, tuple[list[float], PowerLaw]]]:
    """Return by seed, for the raw loss and for what is left of it above the optimal one, its values and their law.

    A seed with a value that is not above 0 and finite has no law.
    """
    found = {}
    for seed, (group, *_) in groups(records, [{axis: level} for level in sizes]).items():
        losses = {name: [mean_profile(record, p, window) for record in group] for name, p in PROFILES.items()}
        if all(0 < value < math.inf for values in losses.values() for value in values):
            found[seed] = {name: (values, power_law(list(sizes.values()), values)) for name, values in losses.items()}
    return found


@effect
def straighter(
    records: Iterable[Record], axis: str, sizes: Mapping[str, float], window: Sequence[float]
) -> dict[int, Bounds]:
    """By how much R² of a power law of the loss in the model's size rises when the optimal loss is subtracted."""
    fits = {
        seed: [law.r_squared for _, law in both.values()] for seed, both in laws(records, axis, sizes, window).items()
    }
    return {seed: (subtracted - raw,) * 2 for seed, (raw, subtracted) in fits.items()}


@effect
def fewer_steps(
    records: Iterable[Record], one: Where, other: Where, metric: str, thresholds: Sequence[float]
) -> dict[int, Bounds]:
    """Share of the steps to a threshold that the one saves; mean over thresholds and pairs."""
    found = {}
    for seed, pairs in groups(records, [one, other]).items():
        shares = [
            fewer(steps_to(first.series[metric], threshold), steps_to(second.series[metric], threshold))
            for first, second in pairs
            for threshold in thresholds
        ]
        lows, highs = zip(*shares, strict=True)
        found[seed] = (float(np.mean(lows)), float(np.mean(highs)))
    return found


@dataclass(frozen=True)
class Distances:
    """Mean absolute differences over checkpoints of two methods and a reference, over pairs of curves."""

    pair: float
    one: float
    other: float

    @property
    def ratio(self) -> float:
        """Return how many times closer the two are to each other than the closer of them is to the reference."""
        return min(self.one, self.other) / self.pair if self.pair else math.inf


def distances(group: tuple[Record, ...], metric: str) -> Distances:
    """Compare (one, other, reference) at the evaluations that all have, but the last."""
    curves = [dict(record.series[metric]) for record in group]
    steps = sorted(set.intersection(*map(set, curves)))[:-1]
    one, other, reference = (np.array([curve[step] for step in steps]) for curve in curves)
    return Distances(*(float(np.abs(a - b).mean()) for a, b in ((one, other), (one, reference), (other, reference))))


@effect
def matching(records: Iterable[Record], one: Where, other: Where, reference: Where, metric: str) -> dict[int, Bounds]:
    """How many times closer two methods are to each other than to a reference, over intermediate evaluations."""
    found = {}
    for seed, triples in groups(records, [one, other, reference]).items():
        ratio = float(np.mean([distances(triple, metric).ratio for triple in triples]))
        found[seed] = (ratio, ratio)
    return found


@effect
def wider(records: Iterable[Record], one: Where, other: Where, metric: str) -> dict[int, Bounds]:
    """How much further the one's last value lies from its median over seeds: what Brown & Forsythe compare.

    Two values are always equally far from their median: fewer than three say nothing.
    """
    pairs = {seed: found[0] for seed, found in groups(records, [one, other]).items()}
    if len(pairs) < 3:
        return {}
    values = np.array([[record.last(metric) for record in pair] for pair in pairs.values()])
    away = np.abs(values - np.median(values, axis=0))
    return {seed: (float(a - b), float(a - b)) for seed, (a, b) in zip(pairs, away, strict=True)}


def verdict(interval: Bounds, region: Sequence[float | None]) -> str:
    """Say whether an interval lies within a region, outside it, or across its border; None is no border.

    Example:
        >>> verdict((0.1, 0.3), [0, None]), verdict((-0.3, -0.1), [0, None]), verdict((-0.1, 0.3), [0, None])
        ('seen', 'not seen', 'not decidable at this size')
    """
    low, high = (end if border is None else border for end, border in zip(EVERYTHING, region, strict=True))
    if interval[1] <= low or interval[0] >= high:
        return NOT_SEEN
    inside = (interval[0] > low or low == -math.inf) and (interval[1] < high or high == math.inf)
    return SEEN if inside else UNDECIDED


@dataclass(frozen=True)
class Judged:
    """A claim with what was found.

    Attributes:
        claim: its sentence.
        published: what its source reports, marked as such.
        source: where.
        expected: what was expected here before the study, and why.
        rule: the region, as the study's file fixed it.
        percent: whether the effect is a share.
        estimate: of the effect.
        verdict: seen, not seen, not decidable at this size, or too few runs yet.
    """

    claim: str
    published: str
    source: str
    expected: str
    rule: str
    percent: bool
    estimate: Estimate | None
    verdict: str


def judge(study: Study, records: Sequence[Record]) -> list[Judged]:
    """Judge every claim of a study, whose file was checked."""
    judged = []
    for item in study.claims:
        found = estimate(EFFECTS[item["effect"]](select(records, item.get("where", {})), **item["of"]))
        interval = found.interval if found else EVERYTHING
        judged.append(
            Judged(
                claim=item["claim"],
                published=str(item.get("published", "")),
                source=item.get("source", ""),
                expected=item.get("expected", ""),
                rule=f"{item['effect'].replace('_', ' ')}: {region_of(item['seen'], item['effect'] in SHARES)}",
                percent=item["effect"] in SHARES,
                estimate=found,
                verdict=verdict(interval, item["seen"]) if found else TOO_FEW,
            )
        )
    return judged


def region_of(seen: Sequence[float | None], percent: bool) -> str:
    """Write the region of a claim.

    Example:
        >>> region_of([0, None], percent=True), region_of([None, 0.5], False), region_of([-0.1, 0.1], True)
        ('above 0 %', 'below 0.5', 'from -10 to 10 %')
    """
    low, high = (None if end is None else f"{100 * end if percent else end:g}" for end in seen)
    text = f"above {low}" if high is None else f"below {high}" if low is None else f"from {low} to {high}"
    return text + " %" * percent
