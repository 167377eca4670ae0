"""What a study is: a YAML file of runs to make, and of what to ask of them. Nothing here trains or measures."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import masked_options
import yaml
from options import Options
from snrweights.integrations.config import parse_options

HERE = Path(__file__).parent
STUDIES = HERE / "studies"
PLACE = ("output_dir", "overwrite", "resume", "dry_run")  # where a run lies and how it starts are no part of what it is


@dataclass(frozen=True)
class Script:
    """A training script that a study can use: its file, its options and their presets."""

    path: Path
    options: type
    presets: Path

    def parse(self, flags: Sequence[str]) -> Any:
        """Return the options that the script makes of flags."""
        return parse_options(self.options, self.presets, "digits", flags)


SCRIPTS = {
    "train.py": Script(HERE / "train.py", Options, HERE / "configs"),
    "train_masked.py": Script(HERE / "train_masked.py", masked_options.Options, HERE / "configs" / "masked"),
}


@dataclass(frozen=True)
class Run:
    """One training run of a study.

    Attributes:
        name: the levels and the seed, joined; its folder's name.
        levels: axis -> level.
        seed: of everything random.
        flags: of the training script, without folder and resumption.
        settings: ``section.field`` -> value of every option that differs from the defaults without a preset, so that a
            preset that changes changes the run.
    """

    name: str
    levels: dict[str, str]
    seed: int
    flags: tuple[str, ...]
    settings: dict[str, Any]

    def matches(self, only: Mapping[str, list[str]]) -> bool:
        """Whether it has one of these levels of each axis; ``seed`` is one too."""
        return all({**self.levels, "seed": str(self.seed)}[axis] in levels for axis, levels in only.items())


@dataclass(frozen=True)
class Collect:
    """What is kept of a run.

    Attributes:
        series: scalars of metrics.jsonl, with their steps.
        profiles: lists of metrics.jsonl, of the last line that has them, beside that line's ``log_snr``.
        loss_since: fraction of the steps after which the unweighted training loss of epsilon by log-SNR is kept, as the
            profile ``loss``, with ``floor`` and ``gap`` where the run knows its optimal loss.
        variance_at: fractions of the steps at which the variance of the unweighted loss by log-SNR is kept.
    """

    series: list[str]
    profiles: list[str] = field(default_factory=list)
    loss_since: float | None = None
    variance_at: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Study:
    """A study as its file has it; see examples/guides/experiments.md for the fields."""

    name: str
    title: str
    question: str
    axes: dict[str, dict[str, dict[str, Any]]]
    seeds: list[int]
    collect: Collect
    script: str = "train.py"
    base: dict[str, Any] = field(default_factory=dict)
    select: list[dict[str, list[str]]] = field(default_factory=lambda: [{}])
    seconds: float | None = None
    analyses: list[dict[str, Any]] = field(default_factory=list)
    claims: list[dict[str, Any]] = field(default_factory=list)
    notes: str = ""

    @cached_property
    def runs(self) -> list[Run]:
        """Return the runs, seeds outermost so that an unfinished study has whole seeds."""
        arms = dict.fromkeys(
            tuple(zip(self.axes, levels, strict=True))
            for block in self.select
            for levels in itertools.product(*(block.get(axis, list(self.axes[axis])) for axis in self.axes))
        )
        return [self._run(dict(arm), seed) for seed in self.seeds for arm in arms]

    def _run(self, levels: dict[str, str], seed: int) -> Run:
        options: dict[str, Any] = dict(self.base)
        for axis, level in levels.items():
            options |= self.axes[axis][level]
        flags = flags_of({**options, "seed": seed})
        settings = settings_of(SCRIPTS[self.script].parse(flags))
        return Run("-".join((*levels.values(), f"s{seed}")), levels, seed, flags, settings)

    def changes(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
        """Return ``option: before -> now`` of what differs between settings of its script's options."""
        return changes(before, now, flat(SCRIPTS[self.script].options()))


def flags_of(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Spell options as flags of a training script; a list is given one word at a time, None drops the option.

    Example:
        >>> flags_of({"method": "min_snr", "set": ["gamma=5"], "random_flip": False})
        ('--method', 'min_snr', '--set', 'gamma=5', '--no-random-flip')
    """
    words: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return tuple(words)


def flat(options: Any) -> dict[str, Any]:
    """Return ``section.field`` -> value, tuples as lists, as JSON has them; without where a run lies."""
    sections = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    return {
        f"{section}.{item.name}": list(value) if isinstance(value := getattr(part, item.name), tuple) else value
        for section, part in sections.items()
        if dataclasses.is_dataclass(part)
        for item in dataclasses.fields(part)
        if item.name not in PLACE
    }


def settings_of(options: Any) -> dict[str, Any]:
    """Return what of the options differs from the defaults without a preset."""
    defaults = flat(type(options)())
    return {name: value for name, value in flat(options).items() if value != defaults[name]}


def changes(before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Return ``option: before -> now`` of what differs; what is not there has its default.

    Example:
        >>> changes({"weight.method": "ddpm"}, {"weight.method": "edm", "data.split": "train"}, flat(Options()))
        ['weight.method: ddpm -> edm']
    """
    old, new = {**defaults, **before}, {**defaults, **now}
    return [
        f"{name}: {old.get(name)} -> {new.get(name)}" for name in sorted({*old, *new}) if old.get(name) != new.get(name)
    ]


def load_study(name: str) -> Study:
    """Read a study by its name in examples/studies, or from a file.

    Raises:
        SystemExit: there is none, or the file has fields, axes or levels that do not exist; the choices are named.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else STUDIES / f"{name}.yaml"
    if not path.is_file():
        choices = sorted(path.stem for path in STUDIES.glob("*.yaml"))
        raise SystemExit(f"Unknown study {name!r}; choose one of {choices}, or give a YAML file.")
    values = yaml.safe_load(path.read_text())
    if not isinstance(values, dict):
        raise SystemExit(f"{path} is not a study: it has no fields.")
    fields = {item.name: item for item in dataclasses.fields(Study) if item.name != "name"}
    where = f"study {path.stem!r}"
    known(values, fields, where)
    required = (n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING)
    if missing := [item for item in required if item not in values]:
        raise SystemExit(f"{where} lacks {missing}.")
    known([values.get("script", "train.py")], SCRIPTS, f"{where}, 'script'")
    known(values["collect"], [item.name for item in dataclasses.fields(Collect)], f"{where}, 'collect'")
    study = Study(path.stem, **{**values, "collect": Collect(**values["collect"])})
    for axis, levels in study.axes.items():
        if bad := [level for level in levels if not isinstance(level, str) or "/" in level]:
            raise SystemExit(f"Levels name folders: {bad[0]!r} of axis {axis!r} in {where} must be a text without '/'.")
    for block in study.select:
        known(block, study.axes, f"{where}, 'select'")
        for axis, levels in block.items():
            known(levels, study.axes[axis], f"{where}, 'select', axis {axis!r}")
    if twice := [name for name, count in Counter(run.name for run in study.runs).items() if count > 1]:
        raise SystemExit(f"Two runs of {where} have the name {twice[0]!r}: rename a level, or a seed is there twice.")
    return study


def known(names: Iterable[str], choices: Iterable[str], where: str) -> None:
    """Refuse names that are not among the choices.

    Raises:
        SystemExit: naming the first.
    """
    for name in names:
        if name not in list(choices):
            raise SystemExit(f"Unknown {name!r} in {where}; choose one of {list(choices)}.")
