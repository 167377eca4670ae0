"""Distances between sets of images as ``evaluate`` modules, loaded from this folder without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import evaluate


def load(name: str, features: str = "pixels", **options: Any) -> evaluate.EvaluationModule:
    """Load ``frechet_distance`` or ``kernel_distance`` in the features named.

    The same as ``evaluate.load(folder, features)``. Feed it with ``add_batch(predictions=..., references=...)``.

    Args:
        name: of the module.
        features: see ``snrweights.integrations.features.extractor``.
        **options: for ``evaluate.load``.

    Raises:
        ValueError: no such module.
    """
    folder = Path(__file__).parent
    choices = sorted(path.name for path in folder.iterdir() if (path / f"{path.name}.py").is_file())
    if name not in choices:
        raise ValueError(f"Unknown metric {name!r}; choose one of {choices}.")
    return evaluate.load(str(folder / name), features, **options)
