"""Random numbers as functions of keys: a seed, a step, a stream."""

from __future__ import annotations

import numpy as np
import torch


def generator(*keys: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator whose stream is a function of the keys (seed, step, ...), each non-negative.

    Example:
        >>> torch.equal(torch.rand(2, generator=generator(1, 2)), torch.rand(2, generator=generator(1, 2)))
        True
    """
    return torch.Generator(device).manual_seed(seed_of(*keys))


def seed_of(*keys: int) -> int:
    """Hash keys into a seed for torch.

    Example:
        >>> seed_of(1) == seed_of(1, 0)
        False
    """
    # SeedSequence pads with zeros: without the count (1,) and (1, 0) would be one stream
    return int(np.random.SeedSequence((len(keys), *keys)).generate_state(1, np.uint64)[0])
