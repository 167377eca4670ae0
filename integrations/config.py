"""Options of a script: nested dataclasses, YAML presets for them, and any field on the command line."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml
from snrweights.integrations.files import write_text

C = TypeVar("C")


def parse_options(kind: type[C], presets: Path, default_preset: str, argv: Sequence[str] | None = None) -> C:
    """Build options: the preset named by ``--preset``, then the command line over it.

    A ``--method`` that differs from the preset's drops the preset's hyperparameters. Fields are spelled with hyphens
    or underscores.

    Args:
        kind: a dataclass with ``preset``, a section ``weight`` with ``method`` and ``set``, and other sections.
        presets: folder of YAML files, one per preset.
        default_preset: name of the preset taken where none is named.
        argv: the command line; default: that of the process.

    Raises:
        SystemExit: unknown preset, field or value; the choices are printed.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    base = load_preset(kind, presets, _option(argv, "--preset") or default_preset)
    markers = (tyro.conf.OmitArgPrefixes,)
    options: Any
    options, unknown = tyro.cli(kind, default=base, args=argv, return_unknown_args=True, config=markers)
    if unknown:
        raise SystemExit(f"Unknown option {unknown[0]!r}; choose one of {_flags(base)}.")
    if options.weight.method != base.weight.method and _option(argv, "--set") is None:  # type: ignore[attr-defined]
        options.weight.set = ()
    return options


def _flags(options: Any) -> list[str]:
    flags = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        flags += _flags(value) if dataclasses.is_dataclass(value) else ["--" + field.name.replace("_", "-")]
    return flags


def _option(argv: Sequence[str], flag: str) -> str | None:
    """Return the text after ``flag``, whether spelled ``--flag text`` or ``--flag=text``."""
    for i, word in enumerate(argv):
        name, equals, text = word.partition("=")
        if name == flag:
            return text if equals else next(iter(argv[i + 1 : i + 2]), "")
    return None


def load_preset(kind: type[C], presets: Path, name: str) -> C:
    """Read ``presets/name.yaml`` as options.

    Raises:
        SystemExit: no such preset, or a field in it that the dataclass does not have.
    """
    choices = sorted(path.stem for path in presets.glob("*.yaml"))
    if name not in choices:
        raise SystemExit(f"Unknown preset {name!r}; choose one of {choices}.")
    options: Any = kind()
    _fill(options, yaml.safe_load((presets / f"{name}.yaml").read_text()) or {}, f"preset {name!r}")
    options.preset = name
    return options


def _fill(options: Any, values: dict[str, Any], where: str) -> None:
    fields = [field.name for field in dataclasses.fields(options)]
    for key, value in values.items():
        if key not in fields:
            raise SystemExit(f"Unknown field {key!r} in {where}; choose one of {fields}.")
        if dataclasses.is_dataclass(getattr(options, key)):
            _fill(getattr(options, key), value, f"{where}, section {key!r}")
        else:
            setattr(options, key, tuple(value) if isinstance(value, list) else value)


def save_options(options: Any, path: str | os.PathLike[str], **facts: Any) -> None:
    """Write resolved options as YAML, with the versions of what ran them and other facts."""
    packages = ("snrweights", "torch", "diffusers", "accelerate", "datasets")
    versions = {name: importlib.metadata.version(name) for name in packages}
    versions["python"] = sys.version.split()[0]
    values = {**dataclasses.asdict(options, dict_factory=_plain), **facts, "versions": versions}
    write_text(path, yaml.safe_dump(values, sort_keys=False))


def _plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in items}


def changed_options(saved: Path, options: Any, free: Sequence[str]) -> list[str]:
    """Return ``section.field: old -> new`` of what differs from a saved configuration, those in ``free`` apart."""
    old = yaml.safe_load(saved.read_text())
    new = dataclasses.asdict(options, dict_factory=_plain)
    return [
        f"{section}.{name}: {old.get(section, {}).get(name)} -> {value}"
        for section, fields in new.items()
        if isinstance(fields, dict)
        for name, value in fields.items()
        if not {section, f"{section}.{name}"} & set(free) and old.get(section, {}).get(name) != value
    ]
