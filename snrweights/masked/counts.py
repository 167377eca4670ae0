"""The factor on sequences with an exact count of masked tokens that gives the objective of independent masks."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from snrweights.masked.schedules import Level, MaskedSchedule, get_masked_schedule
from snrweights.masked.weights import MaskedWeighting, get_masked_weighting
from snrweights.schedules import exact_dtype

_REACH = 80.0  # in log-SNR to either side of the peak; there the slowest tail, exp(-l / 2), is e**-40
_STEP = 0.04


def count_factor(
    length: int,
    schedule: str | MaskedSchedule,
    method: str | MaskedWeighting,
    *,
    device: torch.device | str = "cpu",
    **hp: Any,
) -> Tensor:
    """Return the factor on the sum of cross entropies of a sequence with n = 1..L masked tokens at random places.

    The objective of independent masks is ``sum_n c_n C_n``, with C_n the expected sum over n masked tokens and
    ``c_n = ∫ w (1/r) binomial(L, n) r^n (1 - r)^(L - n) dr = E[w(r)] / n`` for r ~ Beta(n, L - n + 1): 1 / n for
    ``elbo``, 1 / (L + 1) for ``sigmoid`` with bias 0. ``mask_tokens(..., counts="exact")`` at uniform t masks n with
    probability ``P_n = T(n / L) - T((n - 1) / L)``, T the time of a mask ratio. The factor is c_n / P_n: on the linear
    schedule L / n for ``elbo``. Computed once for its arguments, and kept.

    Args:
        length: L >= 1.
        schedule: a name or a ``MaskedSchedule``.
        method: a name of ``list_masked_weightings()`` or a ``MaskedWeighting``.
        device: of the result.
        **hp: hyperparameters of the method.

    Returns:
        (L,) for n = 1..L, float64 (float32 on a device without it); to be read, not changed.

    Raises:
        ValueError: a length below 1, an unknown name or hyperparameter.

    Source: derived here; the ELBO: Shi et al. 2024 (MD4), arXiv 2406.04329.

    Example:
        >>> count_factor(4, "linear", "elbo")
        tensor([4.0000, 2.0000, 1.3333, 1.0000], dtype=torch.float64)
    """
    if length < 1:
        raise ValueError(f"`length` must be >= 1, got {length}.")
    schedule, weighting = get_masked_schedule(schedule), get_masked_weighting(method, **hp)
    return _table(length, schedule, weighting, torch.device(device))


@functools.lru_cache(maxsize=64)
def _table(length: int, schedule: MaskedSchedule, weighting: MaskedWeighting, device: torch.device) -> Tensor:
    n = torch.arange(1, length + 1, dtype=torch.float64)
    times = schedule.time(1 - torch.arange(length + 1, dtype=torch.float64) / length)
    factor = _mean_weight(n, length + 1 - n, schedule, weighting) / n / times.diff()
    return factor.to(device, exact_dtype(device))


def _mean_weight(a: Tensor, b: Tensor, schedule: MaskedSchedule, weighting: MaskedWeighting) -> Tensor:
    """Return E[w(r)] for r ~ Beta(a, b), by the trapezoidal rule over l, denser about the peak of the density."""
    width = (1 / a + 1 / b).sqrt()[:, None]
    x = torch.arange(-1, 1, _STEP / math.asinh(_REACH / float(width.min())), dtype=torch.float64)
    stretched = torch.asinh(_REACH / width) * x
    level = Level.of_log_snr((b / a).log()[:, None] + width * stretched.sinh())
    # the density over l has one power of each more than that over r
    log_mass = a[:, None] * level.log_masked + b[:, None] * level.log_kept + stretched.cosh().log()
    log_weight = weighting.weight(level, schedule).log(level)
    return torch.exp((log_mass + log_weight).logsumexp(1) - log_mass.logsumexp(1))
