"""Configurations of a script: a dataclass, YAML presets for it, and any field on the command line."""

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

C = TypeVar("C")


def parse_config(kind: type[C], presets: Path, default_preset: str, argv: Sequence[str] | None = None) -> C:
    """Build a configuration: the preset named by ``--preset``, then the command line over it.

    A ``--method`` that differs from the preset's drops the preset's hyperparameters. Fields are spelled with hyphens
    or underscores.

    Args:
        kind: a dataclass with fields ``preset``, ``method`` and ``set`` among others.
        presets: folder of YAML files, one per preset.
        default_preset: name of the preset taken where none is named.
        argv: the command line; default: that of the process.

    Raises:
        SystemExit: unknown preset, field or value; the choices are printed.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    base = load_preset(kind, presets, _option(argv, "--preset") or default_preset)
    config, unknown = tyro.cli(kind, default=base, args=argv, return_unknown_args=True)
    if unknown:
        choices = ["--" + field.name.replace("_", "-") for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
        raise SystemExit(f"Unknown field {unknown[0]!r}; choose one of {choices}.")
    if config.method != base.method and not _option(argv, "--set"):  # type: ignore[attr-defined]
        config = dataclasses.replace(config, set=())  # type: ignore[type-var]
    return config


def _option(argv: Sequence[str], flag: str) -> str | None:
    """Return the text after ``flag``, whether spelled ``--flag text`` or ``--flag=text``."""
    for i, word in enumerate(argv):
        name, equals, text = word.partition("=")
        if name == flag:
            return text if equals else next(iter(argv[i + 1 : i + 2]), "")
    return None


def load_preset(kind: type[C], presets: Path, name: str) -> C:
    """Read ``presets/name.yaml`` as a configuration.

    Raises:
        SystemExit: no such preset, or a field in it that the dataclass does not have.
    """
    choices = sorted(path.stem for path in presets.glob("*.yaml"))
    if name not in choices:
        raise SystemExit(f"Unknown preset {name!r}; choose one of {choices}.")
    values = yaml.safe_load((presets / f"{name}.yaml").read_text()) or {}
    fields = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise SystemExit(f"Preset {name!r} has an unknown field {key!r}; choose one of {fields}.")
    tuples = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    return kind(**{"preset": name, **values, **tuples})


def save_config(config: Any, path: str | os.PathLike[str]) -> None:
    """Write a resolved configuration as YAML, with the versions of what ran it."""
    packages = ("snrweights", "torch", "diffusers", "accelerate", "datasets")
    versions = {name: importlib.metadata.version(name) for name in packages}
    versions["python"] = sys.version.split()[0]
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(config).items()}
    Path(path).write_text(yaml.safe_dump({**values, "versions": versions}, sort_keys=False))
