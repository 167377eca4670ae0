"""What the distance modules share: features of two sets of images, collected batch by batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import datasets
import evaluate
import torch
from snrweights.integrations.features import DISTANCE_NAMES, Extract, extractor
from torch import Tensor

_INPUTS = """
Args:
    predictions: images (B, C, H, W) in [-1, 1], float tensors.
    references: as many, in the end, of the data.
"""


class ImageDistance(evaluate.Metric, ABC):
    """Collects features of generated and real images as they come; images themselves are not kept.

    The configuration's name is that of the features.
    """

    description = ""
    citation = ""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in DISTANCE_NAMES:
            raise ValueError(f"Unknown features {self.config_name!r}; choose one of {list(DISTANCE_NAMES)}.")
        images = datasets.Sequence(datasets.Sequence(datasets.Sequence(datasets.Value("float32"))))
        return evaluate.MetricInfo(
            description=self.description,
            citation=self.citation,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": images, "references": images}),
        )

    def _download_and_prepare(self, dl_manager: Any) -> None:
        self._extract: Extract | None = None  # made when first needed, or by ``use``
        self._seen: dict[str, list[Tensor]] = {"predictions": [], "references": []}

    @abstractmethod  # also keeps evaluate from taking this class for the module's own
    def _compute(self, predictions: Tensor, references: Tensor, **kwargs: Any) -> dict[str, float]:
        """Return the distance of two sets of features (n, d), under its name."""

    def use(self, device: torch.device | str, weights: str | None = None) -> ImageDistance:
        """Run the features' network on a device, with weights from a local file."""
        self._extract = extractor(self.config_name, device, weights)
        return self

    def add_batch(self, *, predictions: Tensor | None = None, references: Tensor | None = None, **kwargs: Any) -> None:
        """Add images of either kind, or of both."""
        for kind, images in (("predictions", predictions), ("references", references)):
            if images is None:
                continue
            if images.ndim != 4 or len(images) == 0:
                raise ValueError(f"`{kind}` must have shape (B, C, H, W) with B >= 1, got {tuple(images.shape)}.")
            self._extract = self._extract or extractor(self.config_name)
            self._seen[kind].append(self._extract(images))

    def compute(self, *, predictions: Tensor | None = None, references: Tensor | None = None, **kwargs: Any) -> Any:
        """Return the distance, the features' name and the count; then forget the images."""
        self.add_batch(predictions=predictions, references=references)
        counts = {kind: sum(map(len, batches)) for kind, batches in self._seen.items()}
        if counts["predictions"] != counts["references"] or counts["references"] < 2:
            raise ValueError(f"As many `predictions` as `references` are needed, at least 2 of each, got {counts}.")
        first, second = (torch.cat(batches) for batches in self._seen.values())
        self._seen = {kind: [] for kind in self._seen}
        return {**self._compute(first, second, **kwargs), "features": self.config_name, "count": len(first)}
