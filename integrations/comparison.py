"""Samples compared with a data set in several features, each image going once through each features' network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from snrweights.integrations.distances import frechet_distance, kernel_distance
from snrweights.integrations.features import DISTANCE_NAMES, extractor
from snrweights.integrations.results import to_floats
from torch import Tensor


class Comparison:
    """Distances of samples to as many images of a data set, named after features and count: ``fid_50k``.

    Samples are compared with the first images of a random order. The floor at a count, which samples of the data's own
    distribution would have, is the distance of these images to as many after them.

    Args:
        data: images in [-1, 1], each with its class.
        features: names; see ``snrweights.integrations.features.extractor``.
        order: picks the images.
        batch_size: images at once through the features' network.
        device: where that network runs.
        weights: local file of Inception weights.

    Raises:
        ValueError: unknown features.
        ModuleNotFoundError: what the features need is not installed.
    """

    def __init__(
        self,
        data: torch.utils.data.Dataset[tuple[Tensor, Tensor]],
        *,
        features: Sequence[str],
        order: torch.Generator,
        batch_size: int,
        device: torch.device | str = "cpu",
        weights: str | None = None,
    ) -> None:
        self._data, self._batch_size = data, batch_size
        self._order = torch.randperm(len(data), generator=order).tolist()  # type: ignore[arg-type]
        self._extractors = {name: extractor(name, device, weights) for name in features}
        self._references = dict.fromkeys(self._extractors, torch.empty(0))

    def distances(self, samples: Tensor, counts: Sequence[int]) -> dict[str, float]:
        """Return both distances in every one of the features, of the first so many samples to as many images.

        Args:
            samples: (n, C, H, W) uint8.
            counts: how many of them, at least 2 and at most n and the number of images.

        Raises:
            ValueError: a count out of these bounds.
        """
        for count in counts:
            if not 2 <= count <= min(len(samples), len(self._order)):
                limits = f"{len(samples)} samples and {len(self._order)} images"
                raise ValueError(f"`counts` must each be at least 2 and at most the {limits} there are, got {count}.")
        results: dict[str, float] = {}
        for name, extract in self._extractors.items():
            parts = samples[: max(counts)].split(self._batch_size)
            generated = torch.cat([extract(to_floats(part)) for part in parts])
            for count in counts:
                results |= _both(name, count, generated[:count], self._reference(name, count))
        return results

    def floors(self, counts: Sequence[int]) -> dict[str, float]:
        """Return what ``distances`` does, suffix ``_real_vs_real``, of images to as many others.

        A count of more than half of the images has none.
        """
        results: dict[str, float] = {}
        for name in self._extractors:
            for count in counts:
                if 2 * count <= len(self._order):
                    images = self._reference(name, 2 * count)
                    results |= _both(name, count, images[count:], images[:count])
        return {f"{key}_real_vs_real": value for key, value in results.items()}

    def _reference(self, name: str, count: int) -> Tensor:
        """Return the features of the first images, computed when first asked for."""
        known = self._references[name]
        missing = self._order[len(known) : count]
        parts = [missing[k : k + self._batch_size] for k in range(0, len(missing), self._batch_size)]
        new = [self._extractors[name](torch.stack([self._data[i][0] for i in part])) for part in parts]
        self._references[name] = torch.cat([known, *new])
        return self._references[name][:count]


def counted(name: str, count: int) -> str:
    """Return the name of a distance that was taken of so many samples.

    Example:
        >>> counted("fid", 50_000), counted("fd_pixels", 700)
        ('fid_50k', 'fd_pixels_700')
    """
    return f"{name}_{count // 1000}k" if count % 1000 == 0 else f"{name}_{count}"


def _both(features: str, count: int, samples: Tensor, images: Tensor) -> dict[str, float]:
    frechet, kernel = (counted(name, count) for name in DISTANCE_NAMES[features])
    value, error = kernel_distance(samples, images)
    return {frechet: frechet_distance(samples, images), kernel: value, f"{kernel}_standard_error": error}
