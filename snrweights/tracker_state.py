"""The state of a tracker: what its tensors must be, and the file that holds them."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from snrweights.files import save_tensors

ROWS = ("count", "sum", "squares", "nonfinite", "gradients", "gradient_squares")
_SIGNED = ROWS.index("sum")  # the only moments that may be negative
_NEEDED = {"edges", "moments", "moments_before", "updates"}
_SNAPSHOTS = {"snapshot_steps", "snapshots"}


def check_state(state: dict[str, Tensor]) -> None:
    """Refuse what is not the state of a tracker, or a damaged one.

    Raises:
        ValueError: naming the tensor and what is wrong with it.
    """
    snapshots = _SNAPSHOTS if _SNAPSHOTS & set(state) else set()
    if set(state) != _NEEDED | snapshots:
        wrong = {"missing": (_NEEDED | snapshots) - set(state), "unknown": set(state) - _NEEDED - snapshots}
        reasons = "; ".join(f"{what}: {sorted(names)}" for what, names in wrong.items() if names)
        raise ValueError(f"Not the state of a LossVarianceTracker: it has {sorted(state)} ({reasons}).")
    bins = len(state["edges"]) - 1 if state["edges"].ndim == 1 else 0
    _expect(bins > 0, state, "edges", "not of shape (bins + 1,)")
    _check_numbers(state, "edges", (bins + 1,), torch.float64)
    _expect(bool((state["edges"].diff() > 0).all()), state, "edges", "not increasing")
    _check_numbers(state, "updates", (2,), torch.int64)
    _expect(bool((state["updates"] >= 0).all()), state, "updates", "negative")
    moments: dict[str, tuple[int, ...]] = {"moments": (len(ROWS), bins), "moments_before": (len(ROWS), bins)}
    if snapshots:
        steps = state["snapshot_steps"].numel()
        _check_numbers(state, "snapshot_steps", (steps,), torch.int64)
        moments["snapshots"] = (steps, len(ROWS), bins)
    for name, shape in moments.items():
        _check_numbers(state, name, shape, torch.float64)
        unsigned = [i for i in range(len(ROWS)) if i != _SIGNED]
        negative = bool((state[name][..., unsigned, :] < 0).any())
        _expect(not negative, state, name, "damaged: a count or a sum of squares is negative")


def _check_numbers(state: dict[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    value = state[name]
    dtypes = (dtype, torch.float32) if dtype.is_floating_point else (dtype,)  # devices without float64 have float32
    _expect(value.dtype in dtypes, state, name, f"of {value.dtype}, not {dtype}")
    _expect(tuple(value.shape) == shape, state, name, f"of shape {tuple(value.shape)}, not {shape}")
    _expect(bool(value.isfinite().all()), state, name, "damaged: it holds values that are not finite")


def _expect(holds: bool, state: dict[str, Tensor], name: str, otherwise: str) -> None:
    if not holds:
        raise ValueError(f"Not the state of a LossVarianceTracker: `{name}` is {otherwise}.")


def write_state(path: str | os.PathLike[str], state: dict[str, Tensor], options: dict[str, Any]) -> None:
    """Write a state as safetensors, aside and then renamed; the options go into its metadata."""
    save_tensors(path, state, {"options": json.dumps(options)})


def read_state(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a state and the options, of a file that ``write_state`` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a tracker's file, or damaged.
    """
    try:
        state = load_file(path)
        check_state(state)
        with safe_open(path, "pt") as file:
            options = json.loads((file.metadata() or {}).get("options", "{}"))
    except (SafetensorError, ValueError) as error:
        raise not_a_file(path, error) from None
    return state, options


def not_a_file(path: str | os.PathLike[str], reason: object) -> ValueError:
    """Return the error that says why a file is not a tracker's."""
    return ValueError(f"`path` {os.fspath(path)!r} is not a tracker's file: {reason}")
