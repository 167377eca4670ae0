"""Uniform numbers for a whole optimizer step: independent, antithetic or stratified over its batches and processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from snrweights.schedules import exact_dtype
from snrweights.seeds import generator

Draws = Literal["independent", "antithetic", "stratified"]

_STREAM = 116  # of random numbers, beside the seed: apart from those of a training script


def _independent(count: int, stream: torch.Generator) -> Tensor:
    return torch.rand(count, generator=stream, dtype=exact_dtype(stream.device), device=stream.device)


def _antithetic(count: int, stream: torch.Generator) -> Tensor:
    half = _independent((count + 1) // 2, stream)
    return torch.cat((half, 1 - half))[:count]


def _stratified(count: int, stream: torch.Generator) -> Tensor:
    jitter = _independent(count, stream)
    return (torch.arange(count, dtype=jitter.dtype, device=jitter.device) + jitter) / count


DRAWS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "independent": _independent,
    "antithetic": _antithetic,
    "stratified": _stratified,
}


def uniforms(
    batch_size: int,
    draws: Draws = "stratified",
    *,
    seed: int = 0,
    index: int = 0,
    rank: int = 0,
    world_size: int = 1,
    accumulation: int = 1,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return this process's share of the uniform numbers of one optimizer step, a function of (seed, index).

    The step's ``n = batch_size * world_size * accumulation`` numbers are drawn together, in random order, and every
    process and micro-batch takes its slice. ``antithetic``: pairs (u, 1 - u). ``stratified``: one number in each of n
    intervals of length 1 / n. Each number is uniform on [0, 1] by itself in either case, so that whatever quantile
    function it is put through keeps its density exactly.

    Args:
        batch_size: numbers wanted, the same on every process.
        draws: ``"independent"``, ``"antithetic"`` or ``"stratified"``.
        seed: the same on every process.
        index: number of the micro-batch since training began; the step is ``index // accumulation``.
        rank: of this process.
        world_size: number of processes.
        accumulation: micro-batches in an optimizer step.
        device: where the numbers are drawn and stay; their stream differs between kinds of device.

    Returns:
        (batch_size,) in [0, 1], float64 where the device has it.

    Raises:
        ValueError: unknown draws, a count below 1, a negative seed or index, or a rank outside the processes.

    Source: antithetic and evenly spaced timesteps: Kingma et al. 2021 (arXiv 2107.00630).

    Example:
        >>> u = uniforms(4, "stratified", seed=1)
        >>> (4 * u).floor().sort().values.tolist()
        [0.0, 1.0, 2.0, 3.0]
    """
    if draws not in DRAWS:
        raise ValueError(f"`draws` must be one of {list(DRAWS)}, got {draws!r}.")
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("world_size", world_size, 1),
        ("accumulation", accumulation, 1),
        ("seed", seed, 0),
        ("index", index, 0),
    ):
        if value < least:
            raise ValueError(f"`{name}` must be >= {least}, got {value}.")
    if not 0 <= rank < world_size:
        raise ValueError(f"`rank` must be in [0, {world_size}), got {rank}.")
    step, micro_batch = divmod(index, accumulation)
    stream = generator(seed, _STREAM, step, device=device)
    count = batch_size * world_size * accumulation
    u = DRAWS[draws](count, stream)[torch.randperm(count, generator=stream, device=device)]
    first = (micro_batch * world_size + rank) * batch_size
    return u[first : first + batch_size]
