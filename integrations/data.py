"""Images from ``datasets``: a hub name, a folder, IDX files, a saved data set or the digits, as tensors in [-1, 1]."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from snrweights.integrations.idx import idx_splits, load_idx
from torch import Tensor

from snrweights.seeds import generator

_SPLIT = 5  # stream of random numbers, beside the seed


def load_images(
    source: str, *, name: str | None = None, split: str = "train", column: str = "image"
) -> datasets.Dataset:
    """Load a data set with a column of images, left encoded: decoding happens per item, in the loader's workers.

    Args:
        source: ``"digits"`` (scikit-learn's 1797 grey 8x8 digits, nothing to download), a folder of images, a folder
            of IDX files as MNIST and Fashion-MNIST come in, one written by ``save_to_disk``, or a name on the hub.
        name: configuration of a hub data set.
        split: which split.
        column: the column that holds the images.

    Raises:
        FileNotFoundError: neither a folder here nor a data set that the hub gives.
        ValueError: no such split or column; the message lists those there are.
    """
    path = Path(source).expanduser()
    if source == "digits":
        data = _digits()
    elif (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        data = datasets.load_from_disk(str(path))
    elif idx := idx_splits(path):
        data = {name: load_idx(images) for name, images in idx.items() if name == split} or dict.fromkeys(idx)
    elif path.is_dir():
        data = datasets.load_dataset("imagefolder", data_dir=str(path))
    else:
        data = _from_hub(source, name)
    if isinstance(data, dict):
        if split not in data:
            raise ValueError(f"`split` {split!r} is not in {source!r}; choose one of {list(data)}.")
        data = data[split]
    elif split not in ("train", str(data.split)):  # a single one, whatever it is called
        raise ValueError(f"`split` {split!r} is not in {source!r}; choose one of {[str(data.split or 'train')]}.")
    if column not in data.column_names:
        raise ValueError(f"`column` {column!r} is not in {source!r}; choose one of {data.column_names}.")
    return data.cast_column(column, datasets.Image(decode=False))


def _digits() -> datasets.Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 0..16 grey levels
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    columns = {"image": [Image.fromarray(image) for image in pixels], "label": digits.target.tolist()}
    return datasets.Dataset.from_dict(columns, features=features)


def _from_hub(source: str, name: str | None) -> Any:
    try:
        return datasets.load_dataset(source, name)
    except (OSError, ValueError) as error:  # what datasets raises for a wrong name, no network, no permission
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"`dataset` {source!r} is neither a folder here nor a hub data set: {reason}") from None


_SMALL = 2**26  # bytes of images that are kept decoded, by each of the loader's workers
_UNREAD = -1  # in place of the class of an image that is not decoded yet


class ImageTensors(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """The images of a data set as (channels, resolution, resolution) float32 tensors in [-1, 1], each with its class.

    The shorter side is scaled to ``resolution`` and the middle cut out; an image that fits is left as it is. Where all
    images fit into 64 MiB, each is decoded once.

    Args:
        data: from ``load_images``.
        column: the column that holds the images.
        resolution: pixels of a side.
        channels: 1 (grey) or 3 (RGB).
        label_column: the column that holds the classes, or None: then every class is 0.
        num_classes: classes lie in [0, num_classes).

    Raises:
        ValueError: no images, another number of channels, no such column; when indexed, an image that cannot be
            decoded or a class outside the range.
    """

    def __init__(
        self,
        data: datasets.Dataset,
        column: str,
        resolution: int,
        channels: int,
        label_column: str | None = None,
        num_classes: int = 0,
    ) -> None:
        modes = {1: "L", 3: "RGB"}
        if channels not in modes:
            raise ValueError(f"`channels` must be one of {list(modes)}, got {channels}.")
        if len(data) == 0:
            raise ValueError("`dataset` has no images.")
        if label_column is not None and label_column not in data.column_names:
            raise ValueError(f"`label_column` {label_column!r} is not there; choose one of {data.column_names}.")
        self._cells = data.select_columns([column] + ([label_column] if label_column else []))
        self._column, self._label_column, self._num_classes = column, label_column, num_classes
        self._resolution = resolution
        self._mode = modes[channels]
        shape = (len(data), channels, resolution, resolution)
        self._decoded = torch.empty(shape, dtype=torch.uint8) if math.prod(shape) <= _SMALL else None
        self._labels = torch.full((len(data),), _UNREAD)

    def __len__(self) -> int:
        return len(self._cells)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pixels, label = self.pixels(index)
        return pixels / 127.5 - 1, label

    def pixels(self, index: int) -> tuple[Tensor, Tensor]:
        """Return an image as bytes, uint8 (channels, resolution, resolution), and its class."""
        if self._decoded is None:
            return self._read(index)
        if self._labels[index] == _UNREAD:
            self._decoded[index], self._labels[index] = self._read(index)
        return self._decoded[index], self._labels[index].clone()

    def _read(self, index: int) -> tuple[Tensor, Tensor]:
        row = self._cells[index]
        cell, label = row[self._column], row[self._label_column] if self._label_column else 0
        if self._label_column and not (isinstance(label, int) and 0 <= label < self._num_classes):
            raise ValueError(f"Image {index} has class {label}, outside [0, {self._num_classes}): set `num_classes`.")
        try:
            image = _fit(_eight_bits(ImageOps.exif_transpose(open_image(cell))).convert(self._mode), self._resolution)
        except (UnidentifiedImageError, OSError, TypeError, ValueError, Image.DecompressionBombError) as error:
            where = f" ({cell['path']})" if cell and cell.get("path") else ""
            raise ValueError(f"Image {index} of the data set{where} cannot be decoded: {error}") from None
        pixels = torch.from_numpy(np.array(image)).reshape(self._resolution, self._resolution, -1)
        return pixels.permute(2, 0, 1), torch.tensor(label)


def open_image(cell: dict[str, Any]) -> Image.Image:
    """Open the undecoded image of a cell: bytes or a path."""
    return Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"])


def split(
    images: torch.utils.data.Dataset[Any], held_out: int, seed: int
) -> tuple[torch.utils.data.Subset[Any], torch.utils.data.Subset[Any]]:
    """Return what a run of ``examples/train.py`` trains on, and so many images that it holds out: by the seed.

    Raises:
        ValueError: more images to be held out than there are.
    """
    size = len(images)  # type: ignore[arg-type]
    if not 0 <= held_out < size:
        raise ValueError(f"`validation_images` must be in [0, {size}), got {held_out}.")
    order = torch.randperm(size, generator=generator(seed, _SPLIT)).tolist()
    return torch.utils.data.Subset(images, order[held_out:]), torch.utils.data.Subset(images, order[:held_out])


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits, which ``convert`` would cut off."""
    return (
        Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8)) if image.mode.startswith("I;16") else image
    )


def detach_worker(worker: int) -> None:
    """Put a loader's worker in a group of its own: a signal to the run's group is for the run, not its workers."""
    del worker
    os.setpgrp()


def _fit(image: Image.Image, resolution: int) -> Image.Image:
    if min(image.size) != resolution:
        scale = resolution / min(image.size)
        width, height = (max(resolution, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = ((side - resolution) // 2 for side in image.size)
    return image.crop((left, top, left + resolution, top + resolution))


class SeededBatches(torch.utils.data.Sampler[list[int]]):
    """Batches of indices as a function of (seed, step): a permutation per epoch, cut into batches, the tail dropped.

    Each process gets its slice of every global batch, so that the images of a step do not depend on how many there are.

    Args:
        size: number of images.
        batch_size: of one process.
        seed: of the permutations.
        steps: numbers of the batches, from 0; a run that goes on starts at a later one.
        rank: of the process.
        world: number of processes.
    """

    def __init__(self, size: int, batch_size: int, seed: int, steps: range, rank: int = 0, world: int = 1) -> None:
        self._per_epoch = size // (batch_size * world)
        if self._per_epoch == 0:
            raise ValueError(
                f"`batch_size` {batch_size} on {world} process(es) is more than the {size} images there are."
            )
        self._size, self._batch_size, self._seed, self._steps = size, batch_size, seed, steps
        self._rank, self._world = rank, world

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self):  # type: ignore[no-untyped-def]
        span = self._batch_size * self._world
        current = -1
        for step in self._steps:
            epoch, batch = divmod(step, self._per_epoch)
            if epoch != current:
                order, current = torch.randperm(self._size, generator=generator(self._seed, 0, epoch)), epoch
            start = batch * span + self._rank * self._batch_size
            yield order[start : start + self._batch_size].tolist()
