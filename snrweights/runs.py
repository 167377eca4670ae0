"""What a run of ``examples/train.py`` or ``snrweights launch --track`` left in its folder, read back."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from snrweights.optimal import OptimalLossCurve
from snrweights.settings import parse_settings
from snrweights.statistics import LossStatistics
from snrweights.tracking import LossVarianceTracker
from snrweights.weightings.base import get_weighting
from snrweights.weightings.bound import WeightCurve

# file -> what a report has from it
FILES = {
    "config.yaml": "configuration and weight",
    "metrics.jsonl": "training and held-out loss",
    "results.json": "results",
    "samples.png": "samples",
    "tracker.safetensors": "loss by noise level",
}

T = TypeVar("T")


@dataclass(frozen=True)
class Picture:
    """A PNG file as it is, with its size in pixels."""

    data: bytes
    width: int
    height: int


@dataclass(frozen=True)
class Run:
    """A run's folder; what it does not hold is empty or None.

    Attributes:
        name: the folder's, with as many parents as tell it from other runs.
        missing: names of the files in ``FILES`` that are not there.
        config: the options, ``section.field`` -> value.
        metrics: the lines of metrics.jsonl.
        results: what results.json holds.
        samples: the picture of samples.
        tracker: the loss by noise level.
        curve: the weight, if the options say which and it is registered.
        no_curve: why there is no weight.
        optimal: the optimal loss of the training data, if the run measured it.
    """

    name: str
    missing: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    samples: Picture | None = None
    tracker: LossVarianceTracker | None = None
    curve: WeightCurve | None = None
    no_curve: str = ""
    optimal: OptimalLossCurve | None = None

    def statistics(self) -> LossStatistics | None:
        """Return what the tracker saw in the second half of training, if it kept snapshots, else in all of it."""
        if self.tracker is None:
            return None
        if self.tracker.decay is not None or self.tracker.window is not None:
            return self.tracker.compute()
        return self.tracker.since(self.tracker.updates // 2)

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Return the steps at which a number was logged, and the numbers.

        Example:
            >>> Run("a", metrics=[{"step": 1, "loss": 0.5}, {"step": 2, "lr": 0.1}]).series("loss")
            ([1], [0.5])
        """
        lines = [line for line in self.metrics if key in line]
        return [line["step"] for line in lines], [line[key] for line in lines]

    def validations(self) -> dict[int, tuple[list[float], list[float]]]:
        """Return step -> (log-SNR, held-out loss)."""
        lines = [line for line in self.metrics if "validation_loss_by_log_snr" in line]
        return {line["step"]: (line["log_snr"], line["validation_loss_by_log_snr"]) for line in lines}


def read_runs(folders: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """Read the folders of runs; those of the same name are told apart by their parents, or by a number.

    Raises:
        FileNotFoundError: a folder is not there, or holds none of ``FILES``.
        ValueError: a file is damaged, or there is no folder.
        ModuleNotFoundError: what reads a config.yaml is not installed.

    Example:
        >>> import tempfile
        >>> from snrweights import LossVarianceTracker
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     LossVarianceTracker().save(Path(folder) / "tracker.safetensors")
        ...     (run,) = read_runs([folder])
        >>> run.missing
        ['config.yaml', 'metrics.jsonl', 'results.json', 'samples.png']
    """
    if not folders:
        raise ValueError("`folders` is empty; give at least one.")
    paths = [Path(folder) for folder in folders]
    return [_read_run(path, name) for path, name in zip(paths, names([path.resolve() for path in paths]), strict=True)]


def names(paths: Sequence[Path]) -> list[str]:
    """Return a short name for each path: its last parts, as many as it takes, and a number for a path given twice.

    Example:
        >>> names([Path("/one/run"), Path("/two/run"), Path("/two/run"), Path("/two/other")])
        ['one/run', 'two/run (1)', 'two/run (2)', 'other']
    """
    found = []
    for i, path in enumerate(paths):
        others = [other.parts for other in paths if other != path]
        length = 1
        while any(other[-length:] == path.parts[-length:] for other in others):
            length += 1
        name = "/".join(path.parts[-length:])
        twice = paths.count(path) > 1
        found.append(f"{name} ({list(paths[: i + 1]).count(path)})" if twice else name)
    return found


def _read_run(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {os.fspath(folder)!r}.")
    missing = [file for file in FILES if not (folder / file).is_file() and not _shares(folder, file)]
    if len(missing) == len(FILES):
        raise FileNotFoundError(
            f"{os.fspath(folder)!r} is not the folder of a run: it holds none of {', '.join(FILES)}."
        )

    def read(file: str, reader: Callable[[Path], T], otherwise: T) -> T:
        if file in missing:
            return otherwise
        try:
            return reader(folder / file)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{os.fspath(folder / file)!r} is damaged: {error}") from None

    sections: dict[str, Any] = read("config.yaml", _config, {})
    curve, no_curve = _curve(sections) if sections else (None, "there is no config.yaml")
    return Run(
        name=name,
        missing=missing,
        config=_flat(sections),
        metrics=read("metrics.jsonl", _metrics, []),
        results=read("results.json", _results, {}),
        samples=read("samples.png", _picture, None),
        tracker=_tracker(folder),
        curve=curve,
        no_curve=no_curve,
        optimal=OptimalLossCurve.load(floor) if (floor := folder / "optimal_loss.safetensors").is_file() else None,
    )


def _shares(folder: Path, file: str) -> list[Path]:
    """Return what the processes of ``snrweights launch --track`` left of a file that they did not come to add up."""
    return sorted(folder.glob(f"{Path(file).stem}.rank-*-of-*.safetensors"))


def _tracker(folder: Path) -> LossVarianceTracker | None:
    whole = folder / "tracker.safetensors"
    if whole.is_file():
        return LossVarianceTracker.load(whole)
    shares = _shares(folder, whole.name)
    return LossVarianceTracker.merge([LossVarianceTracker.load(share) for share in shares]) if shares else None


def _config(path: Path) -> dict[str, Any]:
    try:
        import yaml
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"{path} needs PyYAML: pip install 'snrweights[train]'.") from None
    try:
        return _mapping(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def _results(path: Path) -> dict[str, Any]:
    return _mapping(json.loads(path.read_text(encoding="utf-8")))


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"it must hold names with values, got {type(value).__name__}.")
    return value


def _flat(sections: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section, values in sections.items():
        inner = values if isinstance(values, dict) else {None: values}
        flat |= {f"{section}.{key}" if key is not None else str(section): value for key, value in inner.items()}
    return flat


def _metrics(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        del lines[-1]  # a killed process leaves half a line
    return [_metrics_line(line, number) for number, line in enumerate(lines, 1)]


def _metrics_line(text: str, number: int) -> dict[str, Any]:
    try:
        line = _mapping(json.loads(text))
        if not isinstance(line["step"], int):
            raise ValueError(f"its step is {line['step']!r}.")
        for key in line.keys() & {"loss", "lr", "validation_loss"}:
            line[key] + 0  # a TypeError if it is no number
        for pair in zip(line.get("log_snr", ()), line.get("validation_loss_by_log_snr", ()), strict=True):
            sum(pair)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"line {number}: {'no ' if isinstance(error, KeyError) else ''}{error}") from None
    return line


def _picture(path: Path) -> Picture:
    """Read a PNG file whose chunks are whole."""
    data = path.read_bytes()
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError("it is not a PNG file.")
    at, kind = 8, b""
    while kind != b"IEND":
        head = data[at : at + 8]
        if len(head) < 8:
            raise ValueError("it ends too early.")
        length, kind = struct.unpack(">I4s", head)
        checksum = data[at + 8 + length : at + 12 + length]
        if checksum != struct.pack(">I", zlib.crc32(data[at + 4 : at + 8 + length])):
            raise ValueError(f"its chunk {kind.decode('latin-1')} at byte {at} is not whole.")
        at += 12 + length
    width, height = struct.unpack(">II", data[16:24])
    return Picture(data, width, height)


def _curve(sections: dict[str, Any]) -> tuple[WeightCurve | None, str]:
    """Return the weight that was trained with, or None and the reason: methods of one's own are not known here."""
    try:
        from snrweights.integrations.processes import PROCESSES
    except ModuleNotFoundError:
        return None, "diffusers is not installed: pip install 'snrweights[train]'"
    try:
        options, weight = sections["process"], sections["weight"]
        process = PROCESSES[options["process"]](SimpleNamespace(**options))
        weighting = get_weighting(weight["method"], **parse_settings(weight["set"]))
        curve = weighting.curve(
            process.schedule,
            prediction_type=process.prediction_type,
            density=process.density_for(weighting),
            clamp_max=weight["clamp_max"],
        )
    except KeyError as error:
        return None, f"config.yaml has no {error} that is known here"
    except (AttributeError, TypeError, ValueError) as error:
        return None, str(error).rstrip(".")
    return curve, ""
