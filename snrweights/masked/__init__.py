"""Weights for masked diffusion of discrete tokens.

Tokens are masked with probability 1 - alpha(t), a model predicts the masked ones, and the negative ELBO is
``∫ -alpha' / (1 - alpha) E[sum of the masked tokens' cross entropies] dt``. A weight w(t) multiplies its integrand.

>>> import torch
>>> tokens, t = torch.randint(0, 27, (8, 32)), draw_times(8)
>>> masked, mask = mask_tokens(tokens, t, "cosine", mask_id=27)
>>> logits = torch.zeros(8, 32, 27)  # a model of `masked`
>>> loss = masked_loss(logits, tokens, mask, t, "cosine", "sigmoid", bias=2.0)

Source: Shi & Titsias 2025, arXiv 2511.19664; Shi et al. 2024 (MD4), arXiv 2406.04329; Sahoo et al. 2024 (MDLM),
arXiv 2406.07524.
"""

from snrweights.masked.counts import count_factor
from snrweights.masked.draws import draw_times, mask_tokens
from snrweights.masked.evaluation import NegativeELBO, negative_elbo
from snrweights.masked.losses import elbo_from_token_mean, masked_loss, token_mean, token_sum
from snrweights.masked.schedules import (
    CosineSchedule,
    LinearSchedule,
    MaskedSchedule,
    PolynomialSchedule,
    get_masked_schedule,
)
from snrweights.masked.weights import (
    MaskedWeighting,
    get_masked_weighting,
    is_monotone,
    list_masked_weightings,
    masked_factor,
    masked_weight,
    negative_mass,
    register_masked_weighting,
)

__all__ = [
    "CosineSchedule",
    "LinearSchedule",
    "MaskedSchedule",
    "MaskedWeighting",
    "NegativeELBO",
    "PolynomialSchedule",
    "count_factor",
    "draw_times",
    "elbo_from_token_mean",
    "get_masked_schedule",
    "get_masked_weighting",
    "is_monotone",
    "list_masked_weightings",
    "mask_tokens",
    "masked_factor",
    "masked_loss",
    "masked_weight",
    "negative_elbo",
    "negative_mass",
    "register_masked_weighting",
    "token_mean",
    "token_sum",
]
