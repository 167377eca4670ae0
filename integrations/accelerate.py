"""A tracker in an Accelerate script: summed over processes, saved and restored with its state, logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from snrweights.tracker_state import read_state
from snrweights.tracking import LossVarianceTracker, Reduce

FILE = "tracker.safetensors"


class SumOverProcesses:
    """``Accelerator.reduce`` as a sum, for ``LossVarianceTracker(reduce=...)``."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator

    def __call__(self, moments: Tensor) -> Tensor:
        """Return the sum over processes, on each of them; also of one that has seen nothing, on no device, yet."""
        summed: Tensor = self.accelerator.reduce(moments.to(self.accelerator.device), reduction="sum")
        return summed.to(moments.device)


class _Hooks:
    """What ``attach_to`` registers."""

    def __init__(self, tracker: LossVarianceTracker, accelerator: Any, file: str) -> None:
        self.tracker, self.accelerator, self.file = tracker, accelerator, file

    def save(self, models: Any, weights: Any, output_dir: str) -> None:
        del models, weights
        self.tracker.sync()
        if self.accelerator.is_main_process:
            self.tracker.save(Path(output_dir) / self.file)

    def load(self, models: Any, input_dir: str) -> None:
        del models
        path = Path(input_dir) / self.file
        state, options = read_state(path)
        if options.get("unit") != self.tracker.unit:
            raise ValueError(
                f"{path} has losses of unit {options.get('unit')!r}; the tracker's is {self.tracker.unit!r}."
            )
        self.tracker.load_state_dict(state)


class Attached:
    """What ``attach_to`` returns: ``detach()`` takes the tracker off the Accelerator again."""

    def __init__(self, handles: list[Any], tracker: LossVarianceTracker, reduce: Reduce | None) -> None:
        self._handles, self._tracker, self._reduce = handles, tracker, reduce

    def detach(self) -> None:
        """No longer save or load the tracker, which sums as it did before; doing so twice is no error."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            self._handles, self._tracker.reduce = [], self._reduce


def attach_to(tracker: LossVarianceTracker, accelerator: Any, file: str = FILE) -> Attached:
    """Let a tracker count over all processes, and save and restore it with the Accelerator's state.

    ``accelerator.save_state(folder)`` syncs the tracker and writes ``folder/tracker.safetensors``;
    ``accelerator.load_state(folder)`` reads it, on any number of processes. Nothing is pickled.

    Attach before the first update. A run that is saved goes on to the same bits as one that is resumed from there on
    the same number of processes. The state of a tracker with other bins or another unit is refused.

    Args:
        tracker: updated by each process with its own batches.
        accelerator: an ``accelerate.Accelerator``.
        file: name of the file, for a second tracker.

    Returns:
        A handle with ``detach()``.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from accelerate import Accelerator
        >>> tracker, accelerator = LossVarianceTracker(), Accelerator(cpu=True)
        >>> handle = attach_to(tracker, accelerator)
        >>> tracker.update(torch.ones(2), torch.zeros(2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = accelerator.save_state(folder)
        ...     tracker.reset()
        ...     accelerator.load_state(folder)
        >>> int(tracker.compute().count.sum())
        2
        >>> handle.detach()
    """
    hooks, reduce = _Hooks(tracker, accelerator, file), tracker.reduce
    tracker.reduce = SumOverProcesses(accelerator)
    return Attached(
        [
            accelerator.register_save_state_pre_hook(hooks.save),
            accelerator.register_load_state_pre_hook(hooks.load),
        ],
        tracker,
        reduce,
    )


def log_loss_by_noise(
    accelerator: Any,
    tracker: LossVarianceTracker,
    step: int,
    *,
    since: int | None = None,
    prefix: str = "loss_by_noise",
) -> None:
    """Sync the tracker and log mean and standard deviation per bin, and both terms of the variance.

    Every process calls it; ``accelerator.log`` writes on the main one.

    Args:
        accelerator: an ``accelerate.Accelerator``.
        tracker: to log.
        step: for the logger.
        since: what came after this update of the tracker alone; see ``LossVarianceTracker.since``.
        prefix: of the scalars' names.
    """
    tracker.sync()
    statistics = tracker.compute() if since is None else tracker.since(since)
    accelerator.log(statistics.scalars(prefix), step=step)
