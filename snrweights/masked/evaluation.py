"""The negative ELBO of a model of masked tokens, measured with little variance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from snrweights.masked.draws import check_tokens, mask_tokens
from snrweights.masked.losses import token_mean
from snrweights.schedules import exact_dtype
from snrweights.seeds import generator as seeded


class NegativeELBO(NamedTuple):
    """What ``negative_elbo`` measured.

    Example:
        >>> NegativeELBO(nats=8 * math.log(2), error=0.1, length=4).bits_per_token
        2.0
    """

    nats: float
    """Mean over the sequences, nats per sequence."""
    error: float
    """Standard error of that mean, NaN for a single sequence."""
    length: int
    """Tokens in a sequence."""

    @property
    def bits_per_token(self) -> float:
        """Bits per token: ``nats / (length ln 2)``."""
        return self.nats / (self.length * math.log(2))


@torch.no_grad()
def negative_elbo(
    predict: Callable[[Tensor], Tensor],
    tokens: Tensor,
    mask_id: int,
    *,
    draws: int = 1,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
) -> NegativeELBO:
    """Measure the negative ELBO of a model: the same for every schedule, and whatever weight it was trained with.

    ``L E[token_mean]`` over counts of masked tokens uniform on 1..L, at random places: no 1 / r in it, so nothing that
    a rare draw could make large. The counts are stratified, within the draws of a sequence and over all sequences.

    Args:
        predict: function from masked tokens (b, L) to logits (b, L, K), the model in evaluation mode; called on the
            batches in order, all of them once for each draw. A model that is given the time too can take it from the
            number of tokens masked.
        tokens: (N, L) integers.
        mask_id: what stands for a masked token.
        draws: masks for each sequence, >= 1.
        batch_size: sequences given to ``predict`` at once; default: all.
        generator: of the random numbers; default: seeded from torch's global one.

    Returns:
        The mean over the sequences in nats, with its standard error from the spread of the sequences: of the data set
        that they come from, and on the large side, since stratified draws vary less than independent ones.

    Raises:
        ValueError: draws or a batch size below 1, or shapes that do not go together.
        TypeError: tokens that are not integers.

    Source: derived in ``elbo_from_token_mean``; the ELBO: Shi et al. 2024 (MD4), arXiv 2406.04329.

    Example:
        >>> uniform = lambda masked: torch.zeros(*masked.shape, 4)
        >>> result = negative_elbo(uniform, torch.tensor([[0, 1, 2], [3, 3, 0]]), mask_id=4)
        >>> round(result.nats, 4), round(result.bits_per_token, 4)  # 3 ln 4, 2 bits
        (4.1589, 2.0)
    """
    check_tokens(tokens)
    for name, value in (("draws", draws), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be >= 1, got {value}.")
    number, length = tokens.shape
    if generator is None:
        generator = seeded(int(torch.randint(2**62, ())), device=tokens.device)
    total = torch.zeros(number, dtype=exact_dtype(tokens.device), device=tokens.device)
    for draw in range(draws):
        times = _times(number, draw, draws, generator).to(tokens.device)
        means = []
        for batch, t in zip(tokens.split(batch_size or number), times.split(batch_size or number), strict=True):
            masked, mask = mask_tokens(batch, t, "linear", mask_id, counts="exact", generator=generator)
            means.append(token_mean(predict(masked), batch, mask))
        total += torch.cat(means)
    nats = total * (length / draws)
    error = nats.std() / math.sqrt(number) if number > 1 else math.nan
    return NegativeELBO(float(nats.mean()), float(error), length)


def _times(number: int, draw: int, draws: int, generator: torch.Generator) -> Tensor:
    """Return one time per sequence in the stratum of a draw, stratified over the sequences in random order."""
    device = generator.device
    jitter = torch.rand(number, generator=generator, device=device, dtype=exact_dtype(device))
    places = torch.randperm(number, generator=generator, device=device) + jitter
    return (draw + places / number) / draws
