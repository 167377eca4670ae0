"""Checkpoints of a run: written aside and renamed, verified before use, the last few kept."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

_MANIFEST = "manifest.json"
_STATE = "state.safetensors"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which and why."""


class Checkpoints:
    """The checkpoints of one run, ``folder/step-00000500`` and so on.

    A checkpoint is one safetensors file, whole tensors however they are sharded in the run, and a manifest with the
    step and the file's size and hash. The manifest is written last and the folder renamed into place after it: what
    has no manifest, or does not match it, is no checkpoint. Nothing is pickled.

    Args:
        folder: where they lie.
        keep: how many to keep; None: all.
        accelerator: with everything prepared.
    """

    def __init__(self, folder: Path, keep: int | None, accelerator: Accelerator) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"`checkpoints_total_limit` must be >= 1, got {keep}.")
        self._folder, self._keep, self._accelerator = folder, keep, accelerator

    def save(self, step: int, state: dict[str, Tensor]) -> Path:
        """Write the checkpoint of ``step``; every process calls it, and the main one's ``state`` is written.

        Raises:
            CheckpointError: it could not be written (a full disk, say); earlier checkpoints are untouched.
        """
        final, aside = self._folder / f"step-{step:08d}", self._folder / f".writing-{step:08d}"
        error = None
        if self._accelerator.is_main_process:
            try:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
                save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, aside / _STATE)
                _write_manifest(aside, step)
                shutil.rmtree(final, ignore_errors=True)
                os.replace(aside, final)
                _sync(self._folder)
                self._prune(final)
            except (OSError, RuntimeError, SafetensorError) as caught:
                error = caught
                shutil.rmtree(aside, ignore_errors=True)
        failed = torch.tensor(int(error is not None), device=self._accelerator.device)
        if self._accelerator.reduce(failed, "sum").item():
            kept = [path.name for path in self.all()]
            raise CheckpointError(f"Checkpoint {final} could not be written: {error}. Kept: {kept}.")
        return final

    def all(self) -> list[Path]:
        """Return the checkpoints there are, oldest first, verified or not."""
        return sorted(self._folder.glob("step-*"))

    def find(self, which: str) -> Path | None:
        """Return the checkpoint to resume from.

        Args:
            which: ``"latest"``, the newest that is whole (None if there is none; damaged ones are named on stderr and
                passed over), or the path of one.

        Raises:
            CheckpointError: the path is not a whole checkpoint.
        """
        if which != "latest":
            reason = damage(Path(which))
            if reason:
                raise CheckpointError(f"Checkpoint {which} cannot be used: {reason}.")
            return Path(which)
        for path in reversed(self.all()):
            reason = damage(path)
            if not reason:
                return path
            if self._accelerator.is_main_process:
                print(f"Checkpoint {path} is damaged ({reason}); trying the one before.", file=sys.stderr)
        return None

    def load(self, path: Path) -> tuple[int, dict[str, Tensor]]:
        """Return the step and the state of a checkpoint; what a kill kept from being pruned before it is removed."""
        if self._accelerator.is_main_process and path in self.all():
            for surplus in self._surplus(path):
                shutil.rmtree(surplus)
        return int(json.loads((path / _MANIFEST).read_text())["step"]), load_file(path / _STATE)

    def clear(self) -> None:
        """Remove all checkpoints, and what a killed process left half-written."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _prune(self, newest: Path) -> None:
        """Remove what is newer than the run, damaged or left by one that went further, then all but the last few."""
        paths = self.all()
        for path in paths[paths.index(newest) + 1 :] + self._surplus(newest):
            shutil.rmtree(path)

    def _surplus(self, newest: Path) -> list[Path]:
        """Return those before the last few up to ``newest``."""
        paths = self.all()
        return paths[: max(0, paths.index(newest) + 1 - self._keep)] if self._keep else []


def _write_manifest(folder: Path, step: int) -> None:
    path, manifest = folder / _STATE, folder / _MANIFEST
    _sync(path)
    entry = {"bytes": path.stat().st_size, "sha256": _hash(path)}
    manifest.write_text(json.dumps({"step": step, "files": {_STATE: entry}}, indent=1))
    _sync(manifest)


def damage(folder: Path) -> str:
    """Return what is wrong with a checkpoint, or an empty string."""
    try:
        entry = json.loads((folder / _MANIFEST).read_text())["files"][_STATE]
        size, digest = entry["bytes"], entry["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"no readable {_MANIFEST}"
    path = folder / _STATE
    if not path.is_file():
        return f"{_STATE} is missing"
    if path.stat().st_size != size or _hash(path) != digest:
        return f"{_STATE} is not what was written"
    return ""


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Have the file or folder on disk, not in a cache, before what refers to it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def model_and_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return ``model.<name>`` and ``optimizer.<parameter>.<slot>``, whole; every process calls it, one gets it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: Any
    optimizer_state: Any
    weights, optimizer_state = get_state_dict(model, optimizer, options=options)
    slots = {
        f"optimizer.{parameter}.{slot}": torch.as_tensor(value)
        for parameter, values in optimizer_state.get("state", {}).items()
        for slot, value in values.items()
    }
    return {**{f"model.{name}": value for name, value in weights.items()}, **slots}


def load_model_and_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]
) -> None:
    """Take over what ``model_and_optimizer_state`` returned, on every process."""
    weights: Any = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    slots: Any = {}
    for name, value in state.items():
        if name.startswith("optimizer."):
            parameter, slot = name.removeprefix("optimizer.").rsplit(".", 1)
            slots.setdefault(parameter, {})[slot] = value
    groups = get_optimizer_state_dict(model, optimizer)["param_groups"]
    set_state_dict(
        model,
        optimizer,
        model_state_dict=weights,
        optim_state_dict={"state": slots, "param_groups": groups},
        options=StateDictOptions(full_state_dict=True),
    )


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that FSDP shards as one piece; every process calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_whole(tensor: Tensor, value: Tensor) -> None:
    """Fill a tensor, sharded or not, from the whole value."""
    value = value.to(tensor.device)
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
    tensor.copy_(value)


class StopSignal:
    """Notes SIGTERM and SIGINT, so that the loop can finish its step, save and leave.

    On several processes all of them must agree; ``__call__`` does, over gloo, without waiting for an accelerator. A
    second signal acts as it would have without this.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._received: int | None = None
        self._group = None
        if accelerator.num_processes > 1:
            self._group = torch.distributed.new_group(backend="gloo")
        self._previous: dict[int, Any] = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        self.restore()

    def __call__(self) -> int | None:
        """Return the number of the signal that any process received, or None."""
        if self._group is None:
            return self._received
        flag = torch.tensor([self._received or 0])
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self._group)
        return int(flag) or None

    def restore(self) -> None:
        """Put the previous handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
