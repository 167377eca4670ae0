"""The statistics of a handful of seeds: intervals, tests, and steps to a threshold with what was not seen said so."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 10_000
Bounds = tuple[float, float]
EVERYTHING: Bounds = (-math.inf, math.inf)


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation with n - 1; of one value the second is NaN.

    Example:
        >>> mean_and_std([1.0, 2.0, 3.0])
        (2.0, 1.0)
    """
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def t_interval(values: Sequence[float], level: float = LEVEL) -> Bounds:
    """Return Student's interval for the mean; of fewer than two values everything.

    Example:
        >>> low, high = t_interval([1.0, 2.0, 3.0])
        >>> round(low, 3), round(high, 3)  # 2 ± 4.303 / √3
        (-0.484, 4.484)
    """
    if len(values) < 2:
        return EVERYTHING
    mean, std = mean_and_std(values)
    half = float(stats.t.ppf(0.5 + level / 2, len(values) - 1)) * std / math.sqrt(len(values))
    return mean - half, mean + half


def interval_of_bounds(values: Sequence[Bounds], level: float = LEVEL) -> Bounds:
    """Return Student's interval for the mean of values of which only bounds are known.

    Its ends are those of the lowest and of the highest values that are possible, each taken together.

    Example:
        >>> low, high = interval_of_bounds([(0.0, math.inf), (1.0, 1.0), (2.0, 2.0)])
        >>> round(low, 3), high
        (-1.484, inf)
    """
    lows, highs = zip(*values, strict=True)
    low = t_interval(lows, level)[0] if all(map(math.isfinite, lows)) else -math.inf
    high = t_interval(highs, level)[1] if all(map(math.isfinite, highs)) else math.inf
    return low, high


def bootstrap_interval(values: Sequence[float], level: float = LEVEL, seed: int = 0) -> Bounds:
    """Return the percentile interval of the mean over resampled values; of fewer than two everything.

    Of few values it is too narrow: that of three lies within their range, which misses the mean of a symmetric
    distribution in about a quarter of the cases.

    Example:
        >>> low, high = bootstrap_interval([1.0, 2.0, 3.0])
        >>> round(low, 2), round(high, 2)
        (1.0, 3.0)
    """
    if len(values) < 2:
        return EVERYTHING
    picked = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    means = np.asarray(values, dtype=float)[picked].mean(1)
    low, high = np.quantile(means, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


def welch(one: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Return Welch's t of the difference of means, its degrees of freedom, and p on two sides; NaN below two values.

    Source: Welch 1947.

    Example:
        >>> [round(value, 4) for value in welch([3.0, 4.0, 5.0], [1.0, 2.0, 3.0])]
        [2.4495, 4.0, 0.0705]
    """
    if min(len(one), len(other)) < 2 or np.ptp(one) == np.ptp(other) == 0:
        return math.nan, math.nan, math.nan
    result = stats.ttest_ind(one, other, equal_var=False)
    return float(result.statistic), float(result.df), float(result.pvalue)


def brown_forsythe(one: Sequence[float], other: Sequence[float]) -> float:
    """Return p of equal spreads, by deviations from the medians; NaN below three values. Of three it sees little.

    Source: Brown & Forsythe 1974.

    Example:
        >>> round(brown_forsythe([1.0, 2.0, 3.0, 4.0], [0.0, 10.0, 20.0, 30.0]), 3)
        0.021
    """
    if min(len(one), len(other)) < 3 or np.ptp(one) == np.ptp(other) == 0:
        return math.nan
    return float(stats.levene(one, other, center="median").pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number, step down; NaN stays and does not count.

    Source: Holm 1979.

    Example:
        >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
    """
    corrected, highest = [math.nan] * len(values), 0.0
    tested = sorted((p, place) for place, p in enumerate(values) if not math.isnan(p))
    for rank, (p, place) in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - rank) * p))
        corrected[place] = highest
    return corrected


def steps_to(series: Sequence[Sequence[float]], threshold: float) -> Bounds:
    """Return bounds on the first step at which a distance is at most ``threshold``.

    Between two evaluations the logarithm of the distance is taken to be linear in the step; the two bounds are then one
    number. Below the threshold at the first evaluation: between 0 and that step. Never below it: from the last step to
    infinity. At 0 or below, which kernel distances can be: between that evaluation and the one before. What is not
    finite is passed over.

    Example:
        >>> steps_to([[100, 8.0], [200, 2.0], [300, 1.0]], 4.0)
        (150.0, 150.0)
        >>> steps_to([[100, 8.0], [200, 2.0]], 1.0), steps_to([[100, 8.0], [200, 2.0]], 9.0)
        ((200.0, inf), (0.0, 100.0))
    """
    known = [(step, value) for step, value in series if math.isfinite(value)]
    if known and known[0][1] <= threshold:
        return 0.0, float(known[0][0])
    for (step, value), (next_step, next_value) in itertools.pairwise(known):
        if next_value <= 0 < threshold:
            return float(step), float(next_step)
        if next_value <= threshold:
            fraction = math.log(value / threshold) / math.log(value / next_value)
            reached = step + fraction * (next_step - step)
            return reached, reached
    return float(series[-1][0]), math.inf


def fewer(one: Bounds, other: Bounds) -> Bounds:
    """Return bounds on 1 - one / other: the share of steps that the one saves.

    Example:
        >>> fewer((80.0, 80.0), (100.0, 100.0)), fewer((80.0, 80.0), (100.0, math.inf))
        ((0.19999999999999996, 0.19999999999999996), (0.19999999999999996, 1.0))
    """
    low = 1 - one[1] / other[0] if other[0] > 0 and math.isfinite(one[1]) else -math.inf
    return low, 1 - one[0] / other[1]


@dataclass(frozen=True)
class Estimate:
    """A number per seed, and what it says of their mean.

    Attributes:
        seeds: those that count.
        values: bounds, one pair per seed; equal where the number is known.
        interval: Student's, at 95 %.
        bootstrap: over seeds, of the middles, at 95 %; none of one seed or where a bound is infinite.
    """

    seeds: list[int]
    values: list[Bounds]
    interval: Bounds
    bootstrap: Bounds | None

    @property
    def mean(self) -> Bounds:
        """Return bounds on the mean over seeds."""
        lows, highs = zip(*self.values, strict=True)
        return float(np.mean(lows)), float(np.mean(highs))


def estimate(by_seed: dict[int, Bounds]) -> Estimate | None:
    """Summarise bounds by seed; of no seed nothing.

    Example:
        >>> estimate({1: (1.0, 1.0), 2: (3.0, 3.0)}).mean
        (2.0, 2.0)
    """
    if not by_seed:
        return None
    values = list(by_seed.values())
    known = all(math.isfinite(end) for bounds in values for end in bounds)
    middles = [(low + high) / 2 for low, high in values]
    sure = bootstrap_interval(middles) if known and len(values) > 1 else None
    return Estimate(list(by_seed), values, interval_of_bounds(values), sure)
