"""What several processes tracked, in one file: each saves its share, and the last to end adds them up.

No process waits for another, so that one that was killed, or has left its process group, keeps none from ending.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from snrweights.tracking import LossVarianceTracker


def _share(name: str, rank: int | str, world_size: int | str) -> str:
    return f"{name}.rank-{rank}-of-{world_size}.safetensors"


def discard_shares(folder: Path, rank: int, world_size: int) -> None:
    """Remove what an earlier run left that was not added up: this process's share, and those of another number."""
    others = set(folder.glob(_share("*", "*", "*"))) - set(folder.glob(_share("*", "*", world_size)))
    for path in others | set(folder.glob(_share("*", rank, world_size))):
        path.unlink(missing_ok=True)


def save_together(trackers: Sequence[LossVarianceTracker], folder: Path, rank: int = 0, world_size: int = 1) -> None:
    """Save trackers to ``tracker.safetensors``, ``tracker-1.safetensors``, ...: sums over all processes.

    Until the last process comes here, and for good if one never does, there are the shares of those that did, such as
    ``tracker.rank-0-of-2.safetensors``. ``LossVarianceTracker.merge`` adds these up as well.

    Args:
        trackers: of this process.
        folder: the same on all processes.
        rank: number of this process.
        world_size: number of processes.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for rank in (0, 1):
        ...         save_together([LossVarianceTracker()], Path(folder), rank, 2)
        ...         sorted(os.listdir(folder))
        ['tracker.rank-0-of-2.safetensors']
        ['tracker.safetensors']
    """
    for i, tracker in enumerate(trackers):
        name = f"tracker-{i}" if i else "tracker"
        whole = folder / f"{name}.safetensors"
        if world_size == 1:
            tracker.save(whole)
            continue
        shares = [folder / _share(name, each, world_size) for each in range(world_size)]
        whole.unlink(missing_ok=True)  # an earlier run's
        tracker.save(shares[rank])
        if all(share.exists() for share in shares):
            _add_up(shares, whole, aside=folder / f"{name}.sum-{rank}.tmp")


def _add_up(shares: Sequence[Path], whole: Path, aside: Path) -> None:
    """Two processes that end together may both do so: they write the same."""
    try:
        merged = LossVarianceTracker.merge([LossVarianceTracker.load(share) for share in shares])
    except FileNotFoundError:  # the other has done it
        return
    merged.save(aside)
    os.replace(aside, whole)
    for share in shares:
        share.unlink(missing_ok=True)
