"""The loss of masked diffusion, and what the mean over tokens that most scripts log says of the ELBO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from snrweights.masked.counts import count_factor
from snrweights.masked.draws import Counts, check_tokens
from snrweights.masked.schedules import MaskedSchedule
from snrweights.masked.weights import MaskedWeighting, check_times, masked_factor

Reduction = Literal["mean", "none"]
_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"mean": torch.mean, "none": lambda loss: loss}
_IGNORED = -100  # a target of cross entropy


def token_sum(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Return the sum of the masked tokens' cross entropies of each sequence, in nats, 0 where none is masked.

    In float32 at least. Tokens and logits at places that are not masked do not matter.

    Args:
        logits: (B, L, K).
        tokens: (B, L) integers, below K where masked.
        mask: (B, L) bool, True = masked.

    Returns:
        (B,).

    Raises:
        ValueError: shapes that do not go together.
        TypeError: tokens that are not integers, or a mask that is not bool.

    Example:
        >>> token_sum(torch.zeros(1, 3, 4), torch.tensor([[0, 1, 2]]), torch.tensor([[True, False, True]]))  # 2 ln 4
        tensor([2.7726])
    """
    check_tokens(tokens)
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        wanted = f"{(*tokens.shape, 'K')}".replace("'", "")
        raise ValueError(f"`logits` must have shape {wanted} for these `tokens`, got {tuple(logits.shape)}.")
    if mask.dtype != torch.bool:
        raise TypeError(f"`mask` must be bool, True where a token is masked, got {mask.dtype}.")
    if mask.shape != tokens.shape:
        raise ValueError(f"`mask` must have the shape of `tokens`, {tuple(tokens.shape)}, got {tuple(mask.shape)}.")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    targets = tokens.long().masked_fill(~mask, _IGNORED).flatten()
    losses = functional.cross_entropy(wide, targets, ignore_index=_IGNORED, reduction="none")
    return losses.unflatten(0, tokens.shape).sum(1)


def token_mean(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over each sequence's masked tokens of their cross entropies, in nats, 0 where none is masked.

    Its expectation at a uniform mask ratio is a multiple of the negative ELBO: see ``elbo_from_token_mean``. Arguments
    and errors as for ``token_sum``.

    Example:
        >>> token_mean(torch.zeros(1, 3, 4), torch.tensor([[0, 1, 2]]), torch.tensor([[True, False, True]]))  # ln 4
        tensor([1.3863])
    """
    return token_sum(logits, tokens, mask) / mask.sum(1).clamp(min=1)


def elbo_from_token_mean(mean: Tensor | float, length: int, *, counts: Counts = "independent") -> Tensor | float:
    """Return the negative ELBO in nats per sequence from the expected ``token_mean`` at a uniform mask ratio.

    With C_n the expected *sum* over n masked tokens at random places, the negative ELBO is ``sum_n C_n / n``, because
    ``∫ (1/r) binomial(L, n) r^n (1 - r)^(L - n) dr = 1/n``. Independent masks at uniform r mask n = 0..L tokens with
    probability 1 / (L + 1) each: the mean's expectation is ELBO / (L + 1), the factor L + 1. Exact counts, uniform on
    1..L, leave n = 0 out: the factor is L. It is L too for the sum divided by r L with independent masks, that is for
    ``masked_loss(..., "linear", "elbo") / L``.

    It holds for the mean over each sequence first, then over sequences. A mean over all masked tokens of a batch at
    once is another objective: for large batches ``E[sum] / E[number]``, which is the weight ``sigmoid`` with bias 0
    (``simple`` on the linear schedule) divided by L / 2.

    Args:
        mean: of ``token_mean`` over many draws, nats per token.
        length: L, tokens in a sequence, >= 1.
        counts: how they were masked: ``"independent"`` or ``"exact"``, as for ``mask_tokens``.

    Raises:
        ValueError: unknown counts, or a length below 1.

    Source: derived here; the ELBO: Shi et al. 2024 (MD4), arXiv 2406.04329.

    Example:
        >>> elbo_from_token_mean(0.5, 7), elbo_from_token_mean(0.5, 8, counts="exact")
        (4.0, 4.0)
    """
    factors = {"independent": length + 1, "exact": length}
    if counts not in factors:
        raise ValueError(f"`counts` must be one of {list(factors)}, got {counts!r}.")
    if length < 1:
        raise ValueError(f"`length` must be >= 1, got {length}.")
    return mean * factors[counts]


def masked_loss(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor,
    t: Tensor,
    schedule: str | MaskedSchedule,
    method: str | MaskedWeighting = "elbo",
    *,
    counts: Counts = "independent",
    reduction: Reduction = "mean",
    **hp: Any,
) -> Tensor:
    """Return ``w(t) * -alpha'(t) / (1 - alpha(t)) * (sum of the masked tokens' cross entropies)``, in nats.

    With t uniform on [0, 1] and ``elbo`` its expectation is the negative ELBO. A sequence with nothing masked has loss
    0 whatever its t. With ``counts="exact"`` the factor is ``count_factor``: the same expectation for masks of exact
    counts. Values on a device other than the CPU are not looked at, and nothing waits for it.

    Args:
        logits: (B, L, K) of the tokens given the masked tokens.
        tokens: (B, L) integers, the clean tokens, below K where masked.
        mask: (B, L) bool, True = masked.
        t: (B,) times at which the tokens were masked, uniform on [0, 1].
        schedule: by which they were masked: a name or a ``MaskedSchedule``.
        method: a name of ``list_masked_weightings()`` or a ``MaskedWeighting``.
        counts: how ``mask_tokens`` masked them.
        reduction: ``"mean"`` over the batch or ``"none"``.
        **hp: hyperparameters of the method.

    Returns:
        A scalar, or (B,) without reduction: nats per sequence.

    Raises:
        ValueError: an unknown name, shapes that do not go together, or on the CPU a t outside [0, 1].
        TypeError: tokens that are not integers, a mask that is not bool, a t that is not floating point.

    Source: Shi & Titsias 2025, arXiv 2511.19664; Shi et al. 2024 (MD4), arXiv 2406.04329.

    Example:
        >>> tokens, mask, t = torch.tensor([[0, 1, 2]]), torch.tensor([[True, False, True]]), torch.tensor([0.5])
        >>> masked_loss(torch.zeros(1, 3, 3), tokens, mask, t, "linear", "elbo")  # 2 ln 3 / t
        tensor(4.3944)
    """
    if reduction not in _REDUCTIONS:
        raise ValueError(f"Unknown reduction {reduction!r}; choose one of {list(_REDUCTIONS)}.")
    if counts not in _FACTORS:
        raise ValueError(f"`counts` must be one of {list(_FACTORS)}, got {counts!r}.")
    total = token_sum(logits, tokens, mask)
    if check_times(t).shape != total.shape:
        raise ValueError(f"`t` must have one time per sequence, shape {tuple(total.shape)}, got {tuple(t.shape)}.")
    factor = _FACTORS[counts](mask, t, schedule, method, **hp).to(total.device, total.dtype)
    # an infinite factor on nothing is nothing, and in the gradient too
    return _REDUCTIONS[reduction](factor.masked_fill(~mask.any(1), 0) * total)


def _at_time(mask: Tensor, t: Tensor, schedule: Any, method: Any, **hp: Any) -> Tensor:
    del mask
    return masked_factor(t, schedule, method, **hp)


def _by_count(mask: Tensor, t: Tensor, schedule: Any, method: Any, **hp: Any) -> Tensor:
    del t
    return count_factor(mask.shape[1], schedule, method, device=mask.device, **hp)[mask.sum(1) - 1]


_FACTORS: dict[str, Callable[..., Tensor]] = {"independent": _at_time, "exact": _by_count}
