"""Seconds of training, without those spent on measuring what was trained."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds since it was made, pauses left out.

    Args:
        device: that trains; a pause begins when it has done what it was given.
        seconds: that earlier parts of the run took.

    Example:
        >>> clock = Clock("cpu", seconds=60.0)
        >>> with clock.paused():
        ...     before = clock.seconds
        ...     before == clock.seconds > 60
        True
    """

    def __init__(self, device: torch.device | str, seconds: float = 0.0) -> None:
        self._device = torch.device(device)
        self._began = time.perf_counter() - seconds
        self._paused: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        now = time.perf_counter() if self._paused is None else self._paused
        return now - self._began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stand still inside the block."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._paused = time.perf_counter()
        yield
        self._began += time.perf_counter() - self._paused
        self._paused = None
