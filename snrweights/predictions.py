"""The one conversion table between prediction types.

For one prediction expressed as every target y, ``||y - y_hat||² = R_y ||x0 - x0_hat||²``, so that the weights of one
and the same gradient field obey ``w_y R_y = w_x0``:

=================  ==========================  =====================================
target             definition                  R_y
=================  ==========================  =====================================
sample             x0                          1
epsilon            eps                         SNR
v_prediction       alpha eps - sigma x0        1 + SNR  (alpha² + sigma² = 1)
flow_prediction    eps - x0                    (1 + √SNR)²
edm                (x0 - c_skip x) / c_out     1 / c_out² = SNR + 1 / sigma_data²
=================  ==========================  =====================================

``v_prediction`` is the velocity of variance-preserving coordinates, also where the loop noises otherwise; the velocity
of a straight flow is ``flow_prediction``. ``edm`` is the raw network F of Karras 2022 (arXiv 2206.00364).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Every weight is asymptotically a power of SNR. At log-SNR = ±LIMIT its logarithm is either a constant or beyond what
# exp() can hold, so that evaluating there gives the limits 0, constant or inf, the constant to 1e-12.
LIMIT = 2.0**12


def softplus(x: Tensor) -> Tensor:
    """Return ln(1 + e^x) without the cut-off of torch's own (which is off by 2e-9 at its threshold)."""
    return torch.logaddexp(x, torch.zeros_like(x))


def _edm(log_snr: Tensor, sigma_data: float | None) -> Tensor:
    if sigma_data is None:
        raise ValueError(
            "`prediction_type='edm'` needs the schedule's `sigma_data`, got None; use EDMSchedule(sigma_data=...)."
        )
    return torch.logaddexp(log_snr, torch.full_like(log_snr, -2 * math.log(sigma_data)))


_LOG_ERROR_RATIO: dict[str, Callable[[Tensor, float | None], Tensor]] = {
    "epsilon": lambda log_snr, sigma_data: log_snr,
    "sample": lambda log_snr, sigma_data: torch.zeros_like(log_snr),
    "v_prediction": lambda log_snr, sigma_data: softplus(log_snr),
    "flow_prediction": lambda log_snr, sigma_data: 2 * softplus(log_snr / 2),
    "edm": _edm,
}

PREDICTION_TYPES = tuple(_LOG_ERROR_RATIO)


def check_prediction_type(prediction_type: str | None) -> str:
    """Return ``prediction_type``, or raise a ValueError that lists the choices."""
    if prediction_type in _LOG_ERROR_RATIO:
        return prediction_type
    choices = list(PREDICTION_TYPES)
    if prediction_type is None:
        raise ValueError(f"`prediction_type` is not stated by the schedule and must be given; choose one of {choices}.")
    raise ValueError(f"Unknown prediction_type {prediction_type!r}; choose one of {choices}.")


def log_error_ratio(prediction_type: str, log_snr: Tensor, sigma_data: float | None = None) -> Tensor:
    """Return ``ln R_y``, with ``R_y = ||y - y_hat||² / ||x0 - x0_hat||²``, for the table above.

    Args:
        prediction_type: the target y.
        log_snr: any shape; finite, so clamp infinities to ±LIMIT first.
        sigma_data: standard deviation of the data, for ``"edm"`` only.

    Raises:
        ValueError: unknown target, or ``"edm"`` without sigma_data.

    Example:
        >>> log_error_ratio("v_prediction", torch.zeros(1)).exp()
        tensor([2.])
    """
    return _LOG_ERROR_RATIO[check_prediction_type(prediction_type)](log_snr, sigma_data)


def convert_log_weight(
    log_weight: Tensor, log_snr: Tensor, source: str, target: str, sigma_data: float | None = None
) -> Tensor:
    """Turn the log-weight of the MSE of target ``source`` into that of ``target``: same gradient field.

    ``ln w_target = ln w_source + ln R_source - ln R_target``; shapes of ``log_weight`` and ``log_snr`` (finite) agree.

    Example:
        >>> l = torch.tensor([0.0])
        >>> convert_log_weight(torch.zeros(1), l, "epsilon", "v_prediction").exp()
        tensor([0.5000])
    """
    ratio = log_error_ratio(source, log_snr, sigma_data) - log_error_ratio(target, log_snr, sigma_data)
    return log_weight + ratio
