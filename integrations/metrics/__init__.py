"""Distances between sets of images as ``evaluate`` modules, loaded from this folder without a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import evaluate
import torch
from snrweights.integrations.results import to_floats
from torch import Tensor


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


def compare(
    samples: Tensor,
    data: torch.utils.data.Dataset[tuple[Tensor, Tensor]],
    *,
    features: Sequence[str],
    order: torch.Generator,
    batch_size: int,
    device: torch.device | str = "cpu",
    weights: str | None = None,
) -> dict[str, Any]:
    """Return both distances, in every one of the features, of samples to as many images of the data.

    Beside each stands, with the suffix ``_real_vs_real``, the distance of these images to as many others: the floor at
    that count, which samples of the data's own distribution would have.

    Args:
        samples: (n, C, H, W) uint8.
        data: at least 2 n images in [-1, 1], each with its class.
        features: names; see ``snrweights.integrations.features.extractor``.
        order: picks the images.
        batch_size: images at once through the features' network.
        device: where that network runs.
        weights: local file of Inception weights.

    Raises:
        ValueError: fewer than 2 n images, or fewer than 2 samples.
    """
    n = len(samples)
    if len(data) < 2 * n:  # type: ignore[arg-type]
        raise ValueError(f"{n} samples need {2 * n} images to compare with, got {len(data)}.")  # type: ignore[arg-type]
    picked = torch.randperm(len(data), generator=order).tolist()  # type: ignore[arg-type]
    results: dict[str, Any] = {"count": n}
    for name in features:
        both = {kind: load(kind, name).use(device, weights) for kind in ("frechet_distance", "kernel_distance")}
        for suffix in ("", "_real_vs_real"):
            for k in range(0, n, batch_size):
                end = min(k + batch_size, n)
                references = torch.stack([data[i][0] for i in picked[k:end]])
                others = torch.stack([data[i][0] for i in picked[n + k : n + end]]) if suffix else None
                predictions = to_floats(samples[k:end]) if others is None else others
                for metric in both.values():
                    metric.add_batch(predictions=predictions, references=references)
            for metric in both.values():
                values = metric.compute()
                results |= {key + suffix: value for key, value in values.items() if key not in ("features", "count")}
    return results
