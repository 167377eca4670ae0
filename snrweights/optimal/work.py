"""A long computation as sums over steps: shared between processes, saved as it goes, taken up where it was left."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from snrweights.files import save_tensors

SAVE_EVERY = 20.0  # seconds
_Step = TypeVar("_Step")


class Progress:
    """Says on stderr, if that is a terminal, how far a stage is and how long it still takes."""

    def __init__(self, wanted: bool) -> None:
        self._shown = wanted and sys.stderr.isatty()
        self._stage = ""

    def __call__(self, stage: str, share: float) -> None:
        """Say that ``share`` of the stage is done."""
        if not self._shown:
            return
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._from, self._since = stage, share, now
        left = (1 - share) * (now - self._since) / max(share - self._from, 1e-9)
        rest = f", {_duration(left)} left" if share - self._from > 0 and share < 1 else ""
        end = "" if share < 1 else f" in {_duration(now - self._since)}\n"
        print(f"\r\x1b[Koptimal loss, {stage}: {share:4.0%}{rest}", end=end, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Work:
    """Sums over steps, this process's share of them; its state in a folder.

    A stage is a list of steps that is the same on all processes; each adds to the same tensors. The state of a stage is
    what the steps so far have added, so that an interrupted stage ends with the bits of one that was not.

    Args:
        folder: for the state, or None: nothing is saved.
        of: what the sums are a function of; the state of anything else is refused.
        rank: of this process.
        world: number of processes.
        reduce: returns the sum of a tensor over processes; None for one process.
        report: told the stage and the share that is done.

    Example:
        >>> total = torch.zeros(1)
        >>> _ = Work(None, {}).sums("all", [1, 2, 3], [total], total.add_)
        >>> total
        tensor([6.])
    """

    def __init__(
        self,
        folder: Path | None,
        of: dict[str, Any],
        rank: int = 0,
        world: int = 1,
        reduce: Callable[[Tensor], Tensor] | None = None,
        report: Callable[[str, float], None] = lambda *_: None,
    ) -> None:
        self._folder, self._of = folder, {**of, "world": world}
        self._rank, self._world, self._reduce, self._report = rank, world, reduce, report
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def sums(
        self, stage: str, steps: Sequence[_Step], into: Sequence[Tensor], add: Callable[[_Step], object]
    ) -> list[Tensor]:
        """Call ``add`` for every step of this process, each adding to ``into``; return the sums over all processes.

        Raises:
            ValueError: the folder has the state of something else.
        """
        own = steps[len(steps) * self._rank // self._world : len(steps) * (self._rank + 1) // self._world]
        done = self._load(stage, into)
        saved = time.monotonic()
        self._report(stage, done / max(len(own), 1))
        for number in range(done, len(own)):
            add(own[number])
            self._report(stage, (number + 1) / len(own))
            if time.monotonic() - saved >= SAVE_EVERY or number + 1 == len(own):
                self._save(stage, into, number + 1)
                saved = time.monotonic()
        if self._reduce is None:
            return list(into)
        summed = self._reduce(torch.cat([part.double().flatten() for part in into]))
        parts = summed.split([part.numel() for part in into])
        return [part.reshape(like.shape).to(like) for part, like in zip(parts, into, strict=True)]

    def _path(self, folder: Path, stage: str) -> Path:
        return folder / f"{stage.replace(' ', '-')}.{self._rank}.safetensors"

    def _save(self, stage: str, sums: Sequence[Tensor], done: int) -> None:
        if self._folder is None:
            return
        path = self._path(self._folder, stage)
        tensors = {str(i): part.cpu() for i, part in enumerate(sums)}
        try:
            save_tensors(path, tensors, {"of": json.dumps(self._of), "done": str(done)})
        except OSError as error:
            self._folder = None
            warnings.warn(f"The state {path} cannot be written; going on without one: {error}", stacklevel=4)

    def _load(self, stage: str, sums: Sequence[Tensor]) -> int:
        """Copy the state of a stage into the sums; return the number of steps in it."""
        path = None if self._folder is None else self._path(self._folder, stage)
        if path is None or not path.exists():
            return 0
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                of, done = json.loads(metadata["of"]), int(metadata["done"])
                found = [file.get_tensor(str(i)) for i in range(len(sums))]
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"The state {path} is damaged; this stage begins anew: {error}", stacklevel=4)
            return 0
        for name, value in self._of.items():
            if of.get(name) != value:
                raise ValueError(
                    f"`state` {str(path.parent)!r} is of another computation: `{name}` is {of.get(name)} there and "
                    f"{value} here. Name another folder, or delete it."
                )
        if [part.shape for part in found] != [part.shape for part in sums]:
            raise ValueError(f"`state` {str(path.parent)!r} holds sums of other shapes. Delete it.")
        for part, other in zip(sums, found, strict=True):
            part.copy_(other)
        return done
