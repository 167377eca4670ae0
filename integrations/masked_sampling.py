"""Samplers of masked diffusion: from masked tokens to tokens, some at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from snrweights.schedules import exact_dtype

Predict = Callable[[Tensor], Tensor]


def ancestral(
    predict: Predict,
    tokens: Tensor,
    mask_id: int,
    schedule: Any,
    steps: int,
    *,
    generators: Sequence[torch.Generator],
    temperature: float = 1.0,
) -> Tensor:
    """Reveal tokens by the reverse process, at times from 1 to 0 in equal steps.

    From t to s < t a masked token is revealed with probability (alpha_s - alpha_t) / (1 - alpha_t), independently, and
    drawn from what the model says at t. This is done by one uniform number for each token, which is revealed once
    alpha exceeds it; steps that reveal none need no prediction. With an exact model the samples are exact where every
    step reveals at most one token, so in the limit of many steps.

    Args:
        predict: from tokens (B, L) to logits (B, L, K).
        tokens: (B, L), ``mask_id`` where masked; the others stay.
        mask_id: stands for a masked token; not in [0, K).
        schedule: with ``alpha``, as ``snrweights.masked`` has it.
        steps: how many, at least 1.
        generators: one for each row, on the CPU; a row does not depend on the others.
        temperature: divides the logits; 0: the likeliest token.

    Returns:
        (B, L), none masked.

    Source: Shi et al. 2024, arXiv 2406.04329; Sahoo et al. 2024, arXiv 2406.07524.

    Example:
        >>> from snrweights.masked import LinearSchedule
        >>> logits = torch.tensor([0.0, 30.0, 0.0]).expand(1, 4, 3)  # a model that is sure of token 1
        >>> ancestral(lambda x: logits, torch.full((1, 4), 3), 3, LinearSchedule(), 8, generators=[torch.Generator()])
        tensor([[1, 1, 1, 1]])
    """
    kept = _kept(schedule, steps, temperature, tokens, generators)
    when, which = _uniform(generators, 2, tokens)
    for alpha in kept:
        due = (tokens == mask_id) & (when < alpha)
        if bool(due.any()):
            tokens = tokens.masked_scatter(due, _draw(predict(tokens)[due], which[due], temperature))
    return tokens


def by_confidence(
    predict: Predict,
    tokens: Tensor,
    mask_id: int,
    schedule: Any,
    steps: int,
    *,
    generators: Sequence[torch.Generator],
    temperature: float = 1.0,
    choice_temperature: float = 4.5,
) -> Tensor:
    """Reveal in each step the tokens that the model is surest of, as MaskGIT does.

    At each step all masked tokens are drawn; those with the least ``ln p + choice_temperature (1 - i / steps) g``, with
    g from Gumbel's distribution and step number i from 1, are masked again. Of the n that were masked at first
    ``n (1 - alpha_s)``, rounded, stay masked at time s. At both temperatures 0 nothing is random. These are not samples
    of the model's distribution at any number of steps.

    Why not diffusers' ``AmusedScheduler``, which does the like: where tokens are equally sure (the empty margin of
    digits, to all digits of float32) it reveals more than its schedule says, all of them at worst; it draws for a batch
    at once, so that an image depends on those beside it; and it has two schedules of its own.

    Args:
        predict: from tokens (B, L) to logits (B, L, K).
        tokens: (B, L), ``mask_id`` where masked; the others stay.
        mask_id: stands for a masked token; not in [0, K).
        schedule: with ``alpha``, as ``snrweights.masked`` has it.
        steps: how many, at least 1.
        generators: one for each row, on the CPU; a row does not depend on the others.
        temperature: divides the logits; 0: the likeliest token.
        choice_temperature: of the noise on the confidence, at first; 0: none.

    Returns:
        (B, L), none masked.

    Source: Chang et al. 2022, arXiv 2202.04200.

    Example:
        >>> from snrweights.masked import CosineSchedule
        >>> logits = torch.tensor([0.0, 30.0, 0.0]).expand(1, 4, 3)  # a model that is sure of token 1
        >>> by_confidence(
        ...     lambda x: logits, torch.full((1, 4), 3), 3, CosineSchedule(), 2, generators=[torch.Generator()]
        ... )
        tensor([[1, 1, 1, 1]])
    """
    if choice_temperature < 0:
        raise ValueError(f"`choice_temperature` must be >= 0, got {choice_temperature}.")
    kept = _kept(schedule, steps, temperature, tokens, generators)
    at_first = (tokens == mask_id).sum(1)
    for step, alpha in enumerate(kept, 1):
        masked = tokens == mask_id
        left = (at_first * (1 - alpha)).round()
        if bool((masked.sum(1) == left).all()):
            continue
        which, noise = _uniform(generators, 2, tokens)
        logits = predict(tokens)
        drawn = _draw(logits, which, temperature)
        sure = logits.to(noise.dtype).log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
        if choice_temperature:
            sure = sure - choice_temperature * (1 - step / steps) * torch.log(-torch.log(noise))
        least_first = sure.masked_fill(~masked, torch.inf).argsort(dim=1, stable=True).argsort(1)
        tokens = torch.where(masked & (least_first >= left[:, None]), drawn, tokens)
    return tokens


SAMPLERS: dict[str, Callable[..., Tensor]] = {"ancestral": ancestral, "confidence": by_confidence}


def _kept(
    schedule: Any, steps: int, temperature: float, tokens: Tensor, generators: Sequence[torch.Generator]
) -> list[float]:
    """Return alpha after each step, the last of which keeps all; refuse what cannot be sampled."""
    if steps < 1:
        raise ValueError(f"`steps` must be >= 1, got {steps}.")
    if temperature < 0:
        raise ValueError(f"`temperature` must be >= 0, got {temperature}.")
    if len(generators) != len(tokens):
        raise ValueError(f"`generators` must be one for each of {len(tokens)} rows, got {len(generators)}.")
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    alphas: list[float] = schedule.alpha(times)[1:-1].tolist()
    return [*alphas, 1.0]


def _uniform(generators: Sequence[torch.Generator], count: int, tokens: Tensor) -> Tensor:
    """Return uniform numbers (count, B, L) in (0, 1), each row's from its own generator."""
    dtype = exact_dtype(tokens.device)
    drawn = torch.stack([torch.rand((count, tokens.shape[1]), generator=one, dtype=dtype) for one in generators], 1)
    return drawn.clamp(min=torch.finfo(dtype).tiny).to(tokens.device)


def _draw(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Return the token (...) of logits (..., K) whose part of the distribution a uniform number falls in."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits.to(uniform.dtype) / temperature).softmax(-1).cumsum(-1)
    below = cumulative <= uniform[..., None] * cumulative[..., -1:]
    return below.sum(-1).clamp(max=logits.shape[-1] - 1)
