"""Hyperparameters as they are written on a command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def parse_settings(settings: Sequence[str]) -> dict[str, float | str]:
    """Turn ``["gamma=5", "coords=ve"]`` into hyperparameters.

    Example:
        >>> parse_settings(["gamma=5", "coords=ve"])
        {'gamma': 5.0, 'coords': 've'}
    """
    values: dict[str, float | str] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name or not text:
            raise ValueError(f"`--set` takes NAME=VALUE, got {setting!r}.")
        try:
            values[name] = float(text)
        except ValueError:
            values[name] = text
    return values


def parse_method(specification: str) -> tuple[str, dict[str, Any]]:
    """Turn ``min_snr`` or ``min_snr:gamma=5,other=1`` into a name and hyperparameters.

    Example:
        >>> parse_method("min_snr:gamma=5")
        ('min_snr', {'gamma': 5.0})
    """
    name, _, settings = specification.partition(":")
    return name, {**parse_settings(settings.split(",") if settings else [])}
