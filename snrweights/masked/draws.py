"""Random times and random masks for the training of masked diffusion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from snrweights.masked.schedules import MaskedSchedule, get_masked_schedule
from snrweights.masked.weights import check_times
from snrweights.schedules import exact_dtype
from snrweights.seeds import generator as seeded
from snrweights.uniforms import DRAWS, Draws

Counts = Literal["independent", "exact"]

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_MARGIN = 2.0**-24  # 1 - 2**-24 is the largest float32 below 1


def draw_times(
    batch_size: int,
    *,
    draws: Draws = "antithetic",
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw times, each uniform on (0, 1) by itself.

    ``antithetic``: pairs (u, 1 - u), i and i + ceil(B / 2) of the batch. ``stratified``: the i-th between i / B and
    (i + 1) / B. Processes that are to share one set of strata take ``snrweights.uniforms.uniforms``, clamped likewise.

    Args:
        batch_size: B >= 1.
        draws: ``"antithetic"``, ``"stratified"`` or ``"independent"``.
        generator: of the random numbers; default: seeded from torch's global one.
        device: of the result; default: the generator's, or the CPU.

    Returns:
        (B,) float32, between 2**-24 and 1 - 2**-24: rounded to 0 or 1, a time could have an infinite weight.

    Raises:
        ValueError: unknown draws, or a batch size below 1.

    Source: antithetic and evenly spaced times: Kingma et al. 2021, arXiv 2107.00630.

    Example:
        >>> t = draw_times(4, generator=torch.Generator().manual_seed(0))
        >>> t[:2] + t[2:]
        tensor([1., 1.])
    """
    if draws not in DRAWS:
        raise ValueError(f"`draws` must be one of {list(DRAWS)}, got {draws!r}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be >= 1, got {batch_size}.")
    if generator is None:
        generator = seeded(int(torch.randint(2**62, ())), device=device or "cpu")
    u = DRAWS[draws](batch_size, generator)
    return u.clamp(_MARGIN, 1 - _MARGIN).to(device or generator.device, torch.float32)


def mask_tokens(
    tokens: Tensor,
    t: Tensor,
    schedule: str | MaskedSchedule,
    mask_id: int,
    *,
    counts: Counts = "independent",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Mask tokens at time t: each by itself with probability 1 - alpha(t), or exactly ceil((1 - alpha(t)) L) of them.

    The loss must be told which: ``masked_loss(..., counts=...)``. Padding can be kept out of independent masks:
    ``mask &= valid; masked = tokens.where(~mask, mask_id)``.

    Args:
        tokens: (B, L) integers.
        t: (B,) times in [0, 1].
        schedule: a name or a ``MaskedSchedule``.
        mask_id: what stands for a masked token.
        counts: ``"independent"`` masks, or ``"exact"`` counts of at least 1 at random places.
        generator: of the random numbers, on any device; default: torch's global one of the tokens' device.

    Returns:
        The tokens with the masked ones replaced, (B, L), and the mask, (B, L) bool, True = masked.

    Raises:
        ValueError: an unknown name, shapes that do not go together, or a t outside [0, 1] (looked at on the CPU alone).
        TypeError: tokens or a mask_id that are not integers, or a t that is not floating point.

    Source: Austin et al. 2021 (D3PM, absorbing), arXiv 2107.03006; Sahoo et al. 2024 (MDLM), arXiv 2406.07524.

    Example:
        >>> tokens, t = torch.arange(8).reshape(2, 4), torch.tensor([0.5, 1.0])
        >>> masked, mask = mask_tokens(tokens, t, "linear", mask_id=99, counts="exact")
        >>> mask.sum(1), masked[1]
        (tensor([2, 4]), tensor([99, 99, 99, 99]))
    """
    if counts not in _MASKS:
        raise ValueError(f"`counts` must be one of {list(_MASKS)}, got {counts!r}.")
    check_tokens(tokens)
    if not isinstance(mask_id, int) or isinstance(mask_id, bool):
        raise TypeError(f"`mask_id` must be an integer, got {mask_id!r}.")
    if check_times(t).shape != tokens.shape[:1]:
        raise ValueError(f"`t` must have one time per sequence, shape {tuple(tokens.shape[:1])}, got {tuple(t.shape)}.")
    device = tokens.device if generator is None else generator.device
    noise = torch.rand(tokens.shape, generator=generator, dtype=exact_dtype(device), device=device).to(tokens.device)
    ratio = get_masked_schedule(schedule).masked(t).to(tokens.device)
    mask = _MASKS[counts](noise, ratio[:, None])
    return tokens.masked_fill(mask, mask_id), mask


def _independent(noise: Tensor, ratio: Tensor) -> Tensor:
    return noise < ratio


def _exact(noise: Tensor, ratio: Tensor) -> Tensor:
    length = noise.shape[1]
    ranks = noise.argsort(1).argsort(1)  # equal numbers have different ranks
    return ranks < (ratio * length).ceil().clamp(min=1)


_MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"independent": _independent, "exact": _exact}


def check_tokens(tokens: Tensor) -> None:
    """Raise unless ``tokens`` are integers of shape (B, L), B and L at least 1."""
    if not isinstance(tokens, Tensor) or tokens.dtype not in _INTEGERS:
        got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"`tokens` must be a tensor of integers, got {got}.")
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError(f"`tokens` must have shape (B, L) with B and L >= 1, got {tuple(tokens.shape)}.")
