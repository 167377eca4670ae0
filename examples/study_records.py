"""What is kept of a finished run: a line of runs.jsonl, from which every table and figure is drawn."""

from __future__ import annotations

import fcntl
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from snrweights.integrations.files import write_text
from studies import Collect, Run

import snrweights
from snrweights.optimal import floor_by_bin
from snrweights.runs import read_runs


class IncompleteError(Exception):
    """A run folder that lacks something."""


@dataclass(frozen=True)
class Record:
    """The numbers of a run.

    Attributes:
        run: its name in the study.
        levels: axis -> level.
        seed: of everything random.
        settings: its options, as ``Run.settings``.
        series: metric -> [step, value] of every evaluation, NaN for what is not finite.
        profiles: name -> step, log_snr and values.
        variance: fraction of the steps -> log_snr and variance of the unweighted loss there.
        results: the scalars of results.json.
        seconds: of training, in all sittings, evaluations included.
        made: threads, commit, time and versions.
    """

    run: str
    levels: dict[str, str]
    seed: int
    settings: dict[str, Any]
    series: dict[str, list[list[float]]]
    profiles: dict[str, dict[str, Any]]
    variance: dict[str, dict[str, list[float]]]
    results: dict[str, Any]
    seconds: float
    made: dict[str, Any]

    def last(self, metric: str) -> float:
        """Return the metric's last value."""
        return self.series[metric][-1][1]


def collect(folder: Path, run: Run, wanted: Collect, **made: Any) -> Record:
    """Read a finished run's folder.

    Raises:
        IncompleteError: something that the study wants is not there.
    """
    results = results_of(folder)
    if results is None:
        raise IncompleteError("it left no complete results.json")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    versions = yaml.safe_load((folder / "config.yaml").read_text()).get("versions", {})
    made |= {"commit": results.pop("_git_commit_hash", None), "time": results.pop("_timestamp", None)}
    scalars = {k: v for k, v in results.items() if isinstance(v, int | float | str) and not k.startswith("_")}
    return Record(
        run=run.name,
        levels=run.levels,
        seed=run.seed,
        settings=run.settings,
        series={name: _series(lines, name, results) for name in wanted.series},
        profiles={name: _profile(lines, name) for name in wanted.profiles} | _losses(folder, wanted.loss_since),
        variance=_variance(folder, wanted.variance_at),
        results=scalars,
        seconds=results["training_seconds"] + sum(line.get("evaluation_seconds", 0.0) for line in lines),
        made={**made, "versions": versions},
    )


def results_of(folder: Path) -> dict[str, Any] | None:
    """Return results.json of a run that ended, else None."""
    try:
        return json.loads((folder / "results.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _series(lines: list[dict[str, Any]], name: str, results: Mapping[str, Any]) -> list[list[float]]:
    """Return a metric's values; NaN from the step on where the training loss is not finite: nothing is sampled then."""
    found = {line["step"]: line[name] for line in lines if name in line}
    if name in results:
        found.setdefault(results["steps"], results[name])  # what is measured at the end only
    if not found:
        raise IncompleteError(f"no line of metrics.jsonl has {name!r}")
    lost = min((line["step"] for line in lines if not math.isfinite(line.get("loss", 0.0))), default=math.inf)
    known = {step: math.isfinite(value) and step < lost for step, value in found.items()}
    return [[step, found[step] if known[step] else math.nan] for step in sorted(found)]


def _profile(lines: list[dict[str, Any]], name: str) -> dict[str, Any]:
    found = [line for line in lines if name in line and "log_snr" in line]
    if not found:
        raise IncompleteError(f"no line of metrics.jsonl has {name!r} by log_snr")
    return {"step": found[-1]["step"], "log_snr": found[-1]["log_snr"], "values": found[-1][name]}


def _losses(folder: Path, since: float | None) -> dict[str, dict[str, Any]]:
    """Return the loss by log-SNR after a fraction of the steps, and what of it is beyond the optimal loss.

    The optimal loss of a bin is its mean under the density of the draws, as the loss is.
    """
    if since is None:
        return {}
    run = read_runs([folder])[0]
    if run.tracker is None:
        raise IncompleteError("no tracker.safetensors")
    statistics = run.tracker.since(int(since * run.tracker.updates))
    kept, columns = statistics.count > 1, {"loss": statistics.mean.double()}
    if run.optimal is not None:
        if run.curve is None or statistics.unit is None:
            raise IncompleteError(f"no density of the draws: {run.no_curve or 'the tracker has no unit'}")
        floor = floor_by_bin(statistics.edges, run.optimal, run.curve.density, statistics.unit, run.curve.sigma_data)
        kept &= floor.isfinite()
        columns |= {"floor": floor, "gap": columns["loss"] - floor}
    axis = {"step": run.tracker.updates, "log_snr": statistics.centres[kept].tolist()}
    return {name: axis | {"values": values[kept].tolist()} for name, values in columns.items()}


def _variance(folder: Path, fractions: list[float]) -> dict[str, dict[str, list[float]]]:
    """Return by fraction of the steps the variance of all losses up to the snapshot that is nearest."""
    if not fractions:
        return {}
    tracker = snrweights.LossVarianceTracker.load(folder / "tracker.safetensors")
    history = tracker.history()
    found = {}
    for fraction in fractions:
        _, statistics = min(history, key=lambda item: abs(item[0] - fraction * tracker.updates))
        seen = statistics.count > 1
        columns = {"log_snr": statistics.centres, "variance": statistics.variance}
        found[str(fraction)] = {name: column[seen].tolist() for name, column in columns.items()}
    return found


def read_records(path: Path) -> dict[str, Record]:
    """Return the records by the name of their run; none where there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    records = [Record(**json.loads(line)) for line in lines]
    return {record.run: record for record in records}


def add_record(path: Path, record: Record, order: list[str], lock: Path) -> None:
    """Add a record, or put it in place of the run's earlier one; lines are in the order of the study's runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with held(lock):
        records = {**read_records(path), record.run: record}
        known = {name: place for place, name in enumerate(order)}
        ordered = sorted(records.values(), key=lambda record: known.get(record.run, len(known)))
        write_text(path, "".join(json.dumps(asdict(record)) + "\n" for record in ordered))


@contextmanager
def held(lock: Path) -> Iterator[None]:
    """Hold a lock file, waiting for another process that does; the system lets go of it when a process ends."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
