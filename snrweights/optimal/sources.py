"""Data from anywhere as one tensor in memory or mapped from a file: what the reference set is read from."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_BATCH = 64  # items that a worker hands over at once

Report = Callable[[str, float], None]


def as_tensor(data: Any, *, workers: int, folder: Path | None, report: Report) -> Tensor:
    """Return the data as a tensor (N, ...): as it is, or mapped from the file that it is in or was decoded to.

    A data set is decoded once, into a file of N numbers of bytes each: ``rows.bin`` in ``folder``, where it serves a
    later call on the same data, or a temporary file that goes with the process. Never more than a few batches of it
    are held in memory.

    Args:
        data: a tensor; a numpy array or memmap; a ``torch`` Dataset, or anything to iterate over, of tensors of one
            shape, or of tuples that begin with one.
        workers: processes that decode, for a data set with a length.
        folder: for the decoded copy.
        report: told the share that is decoded.

    Raises:
        TypeError: neither of these, or items that are no tensors.
        ValueError: items of different shapes.
    """
    if isinstance(data, Tensor):
        return data
    if isinstance(data, np.ndarray):
        return _from_numpy(data)
    if not hasattr(data, "__getitem__") and not hasattr(data, "__iter__"):
        raise TypeError(f"`data` must be a tensor, an array, a data set or the path of one, got {type(data).__name__}.")
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="snrweights-") as temporary:
            return _decoded(data, workers, Path(temporary), report)  # the mapping outlives the name
    folder.mkdir(parents=True, exist_ok=True)
    return _decoded(data, workers, folder, report)


def _from_numpy(data: np.ndarray[Any, Any]) -> Tensor:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(data)
    except (TypeError, ValueError) as error:  # strange numbers, byte orders, strides
        raise TypeError(f"`data` is an array of {data.dtype} that torch does not take: {error}") from None


def _decoded(data: Any, workers: int, folder: Path, report: Report) -> Tensor:
    """Return the data mapped from ``rows.bin``, which is written anew unless ``rows.json`` says that it is of them."""
    rows, description = folder / "rows.bin", folder / "rows.json"
    key = getattr(data, "key", None)
    found = _read(description)
    if key is None or found.get("key") != key or not rows.is_file() or rows.stat().st_size != found["bytes"]:
        aside, described = (path.with_name(f"{path.name}.{os.getpid()}.tmp") for path in (rows, description))
        try:
            with open(aside, "wb") as file:
                shape, dtype = _write(_batches(data, workers), file, getattr(data, "__len__", int)(), report)
            found = {"key": key, "shape": shape, "dtype": str(dtype), "bytes": aside.stat().st_size}
            described.write_text(json.dumps(found))
            description.unlink(missing_ok=True)  # it must not speak of other rows
            os.replace(aside, rows)
            os.replace(described, description)
        finally:
            aside.unlink(missing_ok=True)
            described.unlink(missing_ok=True)
    dtype = getattr(torch, found["dtype"].removeprefix("torch."))
    return torch.from_file(str(rows), size=int(np.prod(found["shape"])), dtype=dtype).view(found["shape"])


def _read(description: Path) -> dict[str, Any]:
    try:
        found = json.loads(description.read_text())
        return found if {"key", "shape", "dtype", "bytes"} <= found.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _write(batches: Iterable[list[Tensor]], file: Any, size: int, report: Report) -> tuple[list[int], torch.dtype]:
    """Write the items of batches one after the other; return the shape of them all and their type."""
    count, like = 0, torch.empty(0)
    for batch in batches:
        for item in batch:
            if not isinstance(item, Tensor):
                raise TypeError(f"`data` must yield tensors; item {count} is of {type(item).__name__}.")
            if count == 0:
                like = item
            if (item.shape, item.dtype) != (like.shape, like.dtype):
                raise ValueError(
                    f"`data` must yield tensors of one shape and type; item {count} is {tuple(item.shape)} of "
                    f"{item.dtype}, the first {tuple(like.shape)} of {like.dtype}."
                )
            file.write(item.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
            count += 1
        report("decoding", min(count / size, 1.0) if size else 0.0)
    report("decoding", 1.0)
    if count == 0:
        raise ValueError("`data` holds nothing.")
    return [count, *like.shape], like.dtype


def _batches(data: Any, workers: int) -> Iterator[list[Tensor]]:
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        yield from torch.utils.data.DataLoader(data, _BATCH, num_workers=workers, collate_fn=_firsts)
    else:  # what can only be iterated over is not ours to divide between workers
        for item in data:
            yield _firsts([item])


def _firsts(items: list[Any]) -> list[Any]:
    return [item[0] if isinstance(item, (tuple, list)) and len(item) else item for item in items]
