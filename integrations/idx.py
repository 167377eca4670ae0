"""The IDX files of MNIST, Fashion-MNIST and their like."""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import numpy.typing as npt

_SPLITS = {"train": "train", "test": "t10k"}
_KINDS = {"images": (0x803, 3), "labels": (0x801, 1)}  # magic number, dimensions


def idx_splits(folder: Path) -> dict[str, Path]:
    """Return the splits whose images lie in a folder as IDX, compressed or not, each with its file of images."""
    names = {split: f"{prefix}-images-idx3-ubyte" for split, prefix in _SPLITS.items()}
    paths = ((split, folder / (name + end)) for split, name in names.items() for end in (".gz", ""))
    return {split: path for split, path in paths if path.is_file()}


def load_idx(images: Path) -> datasets.Dataset:
    """Load a file of images and the labels beside it as columns ``image`` and ``label``.

    Args:
        images: ``...-images-idx3-ubyte``, with ``.gz`` or not; ``...-labels-idx1-ubyte`` must lie beside it.

    Raises:
        FileNotFoundError: there are no labels.
        ValueError: a file is damaged or not what its name says, or there are not as many labels as images.
    """
    labels = images.with_name(images.name.replace("-images-idx3-", "-labels-idx1-"))
    pixels, classes = read_idx(images, "images"), read_idx(labels, "labels")
    if len(pixels) != len(classes):
        raise ValueError(f"{os.fspath(labels)!r} has {len(classes)} labels for {len(pixels)} images.")
    head = b"P5 %d %d 255\n" % pixels.shape[:0:-1]  # an image as PGM is this and its pixels: nothing to encode
    columns = {"image": [{"bytes": head + x.tobytes(), "path": None} for x in pixels], "label": classes.tolist()}
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict(columns, features=features)


def read_idx(path: Path, kind: str) -> npt.NDArray[np.uint8]:
    """Return the array of an IDX file of bytes: images (N, height, width) or labels (N,).

    Args:
        path: of the file, compressed by gzip if it ends in ``.gz``.
        kind: ``"images"`` or ``"labels"``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or not an IDX file of that kind.
    """
    magic, dimensions = _KINDS[kind]
    where = f"{os.fspath(path)!r} is not an IDX file of {kind}"
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{where}: {error}.") from None
    head = 4 * (1 + dimensions)
    found, *shape = struct.unpack(f">{1 + dimensions}I", data[:head].ljust(head, b"\0"))
    if found != magic:
        raise ValueError(f"{where}: its magic number is {found:#06x}, not {magic:#06x}.")
    if len(data) != head + np.prod(shape, dtype=object):
        raise ValueError(f"{where}: after its header are {len(data) - head} bytes, not those of the shape {shape}.")
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)
