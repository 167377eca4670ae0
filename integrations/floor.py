"""The optimal loss of a run's training images: read or measured once, kept in its folder, checked against the data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from snrweights.integrations.results import to_bytes
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from snrweights.optimal import OptimalLossCurve, optimal_loss
from snrweights.optimal.reference import ReferenceSet

FILE = "optimal_loss.safetensors"
LEVELS = torch.linspace(8, -8, 65, dtype=torch.float64).exp().flip(0)  # log-SNR from -16 to 16, as trackers have it
DRAWS = 2048
_FEW = 64  # images of a dry run, and draws
_SAME = ("data", "points", "dim", "groups", "flips")


def floor_of(
    source: str,
    path: Path,
    data: Subset[Any],
    options: Any,
    accelerator: Any,
) -> OptimalLossCurve | None:
    """Return the optimal loss of the training images, from the run's own file where it goes on; every process calls it.

    The main process reads or measures it and writes ``path``, which all then read.

    Args:
        source: ``none``, ``measure``, or the file of a curve.
        path: where the run keeps it.
        data: the training images, of ``ImageTensors``.
        options: the run's, for flips, classes, their dropout, the seed, and whether it is resumed or a dry run.
        accelerator: of the run.

    Raises:
        SystemExit: the file is not there, damaged, or of other data.
    """
    if source == "none":
        if accelerator.is_main_process and not options.run.resume:
            path.unlink(missing_ok=True)  # of the run that is overwritten
        return None
    if options.run.dry_run:
        data = Subset(data.dataset, data.indices[:_FEW])
    if accelerator.is_main_process:
        kept = path if options.run.resume and path.is_file() else source
        reference = training_images(data, options, progress=True)
        try:
            draws = _FEW if options.run.dry_run else DRAWS
            curve = reference.measure(accelerator.device, draws) if kept == "measure" else OptimalLossCurve.load(kept)
            reference.check(curve, str(kept))
        except (FileNotFoundError, ValueError) as error:
            raise SystemExit(f"`--optimal-loss {source}`: {error}") from None
        if kept != path:
            path.parent.mkdir(parents=True, exist_ok=True)
            curve.save(path)
    accelerator.wait_for_everyone()
    return OptimalLossCurve.load(path)


def training_images(data: Subset[Any], options: Any, progress: bool = False) -> TrainingImages:
    """Return the images of a subset, in the data set's own order, as a run's options augment and label them."""
    ordered = Subset(data.dataset, sorted(data.indices))
    loader = DataLoader(ordered, batch_size=256, num_workers=options.data.dataloader_num_workers)
    images, labels = zip(*tqdm(loader, "Reading the data", disable=not progress), strict=True)
    conditional = bool(options.model.num_classes)
    return TrainingImages(
        torch.cat([to_bytes(batch) for batch in images]),
        torch.cat(labels) if conditional else None,
        options.data.random_flip,
        options.model.class_dropout if conditional else 0.0,
        options.run.seed,
    )


class TrainingImages:
    """What a denoiser is trained on, for the loss that none can beat.

    Args:
        images: uint8 (N, C, H, W).
        labels: (N,), or None where the model is not told.
        flips: whether half are mirrored.
        class_dropout: share of the labels that are withheld.
        seed: of the measurement.
    """

    def __init__(self, images: Tensor, labels: Tensor | None, flips: bool, class_dropout: float, seed: int) -> None:
        self.images, self.labels, self.flips = images, labels, flips
        self.class_dropout, self.seed = class_dropout, seed

    def measure(self, device: torch.device | str = "cpu", draws: int = DRAWS) -> OptimalLossCurve:
        """Return the curve: with class dropout p, (1 - p) times that with labels, and p times that without."""
        options: dict[str, Any] = {"draws": draws, "seed": self.seed, "flips": self.flips, "device": device}
        if self.labels is None or self.class_dropout == 0:
            return optimal_loss(self.images, LEVELS, labels=self.labels, **options)
        told = optimal_loss(self.images, LEVELS, labels=self.labels, **options)
        untold = optimal_loss(self.images, LEVELS, **options)
        p = self.class_dropout
        return replace(
            told,
            value=(1 - p) * told.value + p * untold.value,
            stderr=(1 - p) * told.stderr + p * untold.stderr,  # no less than that of the sum
            made={**told.made, "variance": (1 - p) * told.made["variance"] + p * untold.made["variance"]}
            | {"class_dropout": p},
        )

    def check(self, curve: OptimalLossCurve, name: str) -> None:
        """Check that a curve is of these images.

        Raises:
            ValueError: it is not; the message says in what they differ.
        """
        here = ReferenceSet(self.images, self.labels, self.flips, "cpu", 1024).provenance()
        wanted = {key: here[key] for key in _SAME} | {"class_dropout": self.class_dropout}
        found = {"class_dropout": 0.0} | curve.made
        other = [f"{key}: {found.get(key)}, here {value}" for key, value in wanted.items() if found.get(key) != value]
        if other:
            raise ValueError(f"{name!r} is not the optimal loss of the training images ({'; '.join(other)}).")
