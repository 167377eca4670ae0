"""The data that a denoiser is measured against: images as bytes and files of latents, for ``optimal_loss``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import ImageOps
from safetensors import safe_open
from snrweights.integrations.data import ImageTensors, load_images, open_image
from torch import Tensor


class ImageBytes(torch.utils.data.Dataset[Tensor]):
    """The images of a data set as uint8 (channels, resolution, resolution): fitted and cut as for training.

    Args:
        data: from ``load_images``.
        column: the column that holds the images.
        resolution: pixels of a side; None is the shorter side of the first image.
        channels: 1 (grey) or 3 (RGB); None is that of the first image.

    Attributes:
        key: what the images are a function of, to know their decoded copy by; None where nothing tells.

    Raises:
        ValueError: as of ``ImageTensors``.

    Example:
        >>> from snrweights.integrations.data import load_images
        >>> images = ImageBytes(load_images("digits"), "image")
        >>> len(images), images[0].dtype, tuple(images[0].shape)
        (1797, torch.uint8, (1, 8, 8))
    """

    def __init__(
        self, data: datasets.Dataset, column: str, resolution: int | None = None, channels: int | None = None
    ) -> None:
        if resolution is None or channels is None:
            if len(data) == 0:
                raise ValueError("`dataset` has no images.")
            first = ImageOps.exif_transpose(open_image(data[0][column]))
            resolution = min(first.size) if resolution is None else resolution
            channels = (
                (1 if first.mode in ("1", "L") or first.mode.startswith("I;16") else 3)
                if channels is None
                else channels
            )
        self._images = ImageTensors(data, column, resolution, channels)
        self.key: str | None = f"{data._fingerprint} {column} {resolution} {channels}"

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor:
        return self._images.pixels(index)[0]


def is_file_of_points(source: str) -> bool:
    """Whether a source is a file of latents, or of images as they are, and not a set of images to decode.

    Example:
        >>> is_file_of_points("latents.npy"), is_file_of_points("digits")
        (True, False)
    """
    return Path(source).suffix in _LATENTS


def load_reference(
    source: str | os.PathLike[str] | datasets.Dataset,
    *,
    name: str | None = None,
    split: str = "train",
    column: str | None = None,
    resolution: int | None = None,
    channels: int | None = None,
    labels: str | None = None,
) -> tuple[ImageBytes | Tensor, Tensor | None]:
    """Return the data and the labels, if wanted, that ``snrweights.optimal.optimal_loss`` takes.

    Images stay encoded until they are asked for. Files of latents are mapped into memory, not read.

    Args:
        source: what ``load_images`` takes (``"digits"``, a folder of images, one written by ``save_to_disk``, a name on
            the hub), or a data set with a column of images; or a file of latents (N, ...): ``.npy``, ``.safetensors``.
        name: configuration of a hub data set.
        split: which split.
        column: the column of images; None is ``image``. Of a ``.safetensors``: the tensor; None is the only one
            besides the labels.
        resolution: pixels of a side, for images; None is the shorter side of the first.
        channels: 1 or 3, for images; None is that of the first.
        labels: the column of labels, integers or text. Of a ``.safetensors``: the tensor. Of a ``.npy``: another such
            file.

    Raises:
        FileNotFoundError: there is no such file, folder or hub data set.
        TypeError: an ``IterableDataset``; ``optimal_loss`` takes what yields its images as tensors.
        ValueError: no such split, column or tensor; the message lists those there are.

    Example:
        >>> images, labels = load_reference("digits", labels="label")
        >>> len(images), labels.unique().tolist()
        (1797, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    if isinstance(source, (str, os.PathLike)) and Path(source).suffix in _LATENTS:
        given_to = {"name": name, "resolution": resolution, "channels": channels}
        for given, value in {**given_to, "split": None if split == "train" else split}.items():
            if value is not None:
                raise ValueError(f"`{given}` {value!r} is for images; {os.fspath(source)!r} is a file of latents.")
        return _LATENTS[Path(source).suffix](Path(source).expanduser(), column, labels)
    column = column or "image"
    if isinstance(source, (str, os.PathLike)):
        data = load_images(os.fspath(source), name=name, split=split, column=column)
    else:
        if isinstance(source, datasets.IterableDataset):
            raise TypeError(
                "`source` is an IterableDataset, which has no order to come back to; give its images as uint8"
                " tensors (C, H, W) to `optimal_loss`: (to_tensor(row['image']) for row in source)."
            )
        if column not in source.column_names:
            raise ValueError(f"`column` {column!r} is not in the data set; choose one of {source.column_names}.")
        data = source.cast_column(column, datasets.Image(decode=False))
    return ImageBytes(data, column, resolution, channels), None if labels is None else _labels(data, labels)


def _labels(data: datasets.Dataset, column: str) -> Tensor:
    if column not in data.column_names:
        raise ValueError(f"`labels` {column!r} is not in the data set; choose one of {data.column_names}.")
    values = np.asarray(data[column][:])
    if values.ndim != 1 or values.dtype.kind not in "biuU":
        raise ValueError(f"`labels` {column!r} holds neither integers nor text.")
    if values.dtype.kind == "U":  # integers stay what a model is told
        values = np.unique(values, return_inverse=True)[1]
    return torch.from_numpy(values.astype(np.int64))


def _from_npy(path: Path, column: str | None, labels: str | None) -> tuple[Tensor, Tensor | None]:
    if column is not None:
        raise ValueError(f"`column` {column!r} is not in {str(path)!r}: a .npy holds one array.")
    read = [torch.from_numpy(np.load(file, mmap_mode="c", allow_pickle=False)) for file in (path, labels) if file]
    return read[0], read[1] if labels else None


def _from_safetensors(path: Path, column: str | None, labels: str | None) -> tuple[Tensor, Tensor | None]:
    with safe_open(path, "pt") as file:
        names = sorted(file.keys())
        others = [name for name in names if name != labels]
        if column is None and len(others) == 1:
            column = others[0]
        for argument, wanted in (("column", column), ("labels", labels)):
            if wanted not in names and not (argument == "labels" and wanted is None):
                raise ValueError(f"`{argument}` {wanted!r} is not in {str(path)!r}; choose one of {names}.")
        return file.get_tensor(column), None if labels is None else file.get_tensor(labels)


_LATENTS: dict[str, Any] = {".npy": _from_npy, ".safetensors": _from_safetensors}
