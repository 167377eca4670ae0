"""What a study's file can get wrong in what it asks: found before its first run, not hours later at its first table."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from analyses import ANALYSES
from studies import Study, known
from study_claims import EFFECTS

ANALYSIS_FIELDS = ("analysis", "where", "title")  # beside the arguments of the analysis
CLAIM_FIELDS = ("claim", "published", "source", "expected", "effect", "where", "of", "seen")
ARMS = ("one", "other", "reference", "references", "where")


def check_study(study: Study) -> None:
    """Refuse analyses and claims with names that do not exist, or without something that they need.

    Raises:
        SystemExit: naming the first, with the choices.
    """
    for number, item in enumerate(study.analyses, 1):
        where = f"analysis {number} of {study.name!r}"
        _need(item, ("analysis",), where)
        known([item["analysis"]], ANALYSES, where)
        given = {name: value for name, value in item.items() if name not in ANALYSIS_FIELDS}
        _check_arguments(ANALYSES[item["analysis"]], 2, given, where)
        _check_names(study, {**given, "where": item.get("where", {})}, where)
    for number, item in enumerate(study.claims, 1):
        where = f"claim {number} of {study.name!r}"
        known(item, CLAIM_FIELDS, where)
        _need(item, ("claim", "effect", "of", "seen"), where)
        known([item["effect"]], EFFECTS, where)
        _check_arguments(EFFECTS[item["effect"]], 1, item["of"], where)
        _check_names(study, {**item["of"], "where": item.get("where", {})}, where)
        if len(item["seen"]) != 2:
            raise SystemExit(f"'seen' in {where} must be [low, high], null for no border, got {item['seen']}.")


def _need(given: Iterable[str], names: Iterable[str], where: str) -> None:
    if missing := [name for name in names if name not in given]:
        raise SystemExit(f"{where} lacks {missing}.")


def _check_arguments(function: Callable[..., Any], own: int, given: Mapping[str, Any], where: str) -> None:
    """Compare what is given with a function's arguments after its ``own`` first."""
    arguments = list(inspect.signature(function).parameters.values())[own:]
    known(given, [one.name for one in arguments], where)
    _need(given, [one.name for one in arguments if one.default is one.empty], where)


def _check_names(study: Study, given: Mapping[str, Any], where: str) -> None:
    """Check axes, levels and what is kept of a run, wherever they are named."""
    axis = given.get("compare", given.get("axis"))
    known([*given.get("by", ()), *([] if axis is None else [axis])], study.axes, where)
    for name in ARMS:
        value = given.get(name, {})
        arm = value if isinstance(value, Mapping) else {axis: value}
        known(arm, study.axes, f"{where}, {name!r}")
        for of, level in arm.items():
            known([level], study.axes[of], f"{where}, {name!r}, axis {of!r}")
    if axis is not None:
        known([*given.get("pair", ()), *given.get("sizes", ())], study.axes[axis], f"{where}, axis {axis!r}")
    thresholds = given.get("thresholds")
    metrics = [*given.get("metrics", ()), *(thresholds if isinstance(thresholds, Mapping) else ())]
    metrics += [given["metric"]] if "metric" in given else []
    known(metrics, study.collect.series, f"{where}: metrics are those of 'collect', 'series'")
    if "profile" in given:
        losses = ["loss", "floor", "gap"] if study.collect.loss_since is not None else []
        known([given["profile"]], [*study.collect.profiles, *losses], f"{where}: profiles are those of 'collect'")
