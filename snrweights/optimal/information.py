"""What a noisy point tells of the point it was made from, in nats: the area under the optimal loss."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from snrweights.optimal.curve import OptimalLossCurve

_REACH = 40.0  # of log-SNR below, where what is left is e^-40 of it
_STEP = 0.5
_NODES, _WEIGHTS = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(16))


def information(curve: OptimalLossCurve, log_snr: float) -> tuple[float, float]:
    """Return I(x0; z) at a log-SNR in nats, and its standard error: ½ ∫ J exp(l) dl over l up to ``log_snr``.

    J exp(l) is the optimal loss of epsilon, summed over dimensions. With labels it is I(x0; z | label). Below the
    curve's levels J is continued as in ``OptimalLossCurve.log_value``, towards the variance of the data. Errors of the
    levels are taken as one, since they share their draws, and those of interpolation are added to them.

    Source: the derivative dI / dSNR = J / 2 is Guo, Shamai & Verdú 2005, arXiv cs/0412108.

    Example:
        >>> levels = torch.logspace(-2, 2, 401, dtype=torch.float64)
        >>> gaussian = levels**2 / (1 + levels**2)  # of N(0, 1), where I = ½ ln(1 + SNR)
        >>> curve = OptimalLossCurve(levels, gaussian, 0 * levels, ("pairs",) * 401, levels, {"variance": 1.0})
        >>> round(information(curve, 0.0)[0], 5), round(float(np.log(2)) / 2, 5)
        (0.34657, 0.34657)
    """
    edges = torch.arange(round(_REACH / _STEP) + 1, dtype=torch.float64) * _STEP + (log_snr - _REACH)
    at = (edges[:-1, None] + _STEP / 2 * (_NODES + 1)).flatten()
    pieces = (_STEP / 4 * _WEIGHTS).repeat(len(edges) - 1) * (curve.log_value(at) + at).exp()
    return float(pieces.sum()), float((pieces * _relative_error(curve, at)).sum())


def _relative_error(curve: OptimalLossCurve, log_snr: Tensor) -> Tensor:
    """Return the error of J relative to it, shape of ``log_snr``; beyond the levels that of the last."""
    sigmas = (-log_snr / 2).exp().clamp(curve.sigmas[0], curve.sigmas[-1])
    error = torch.hypot(curve.stderr_at(sigmas), curve.interpolation_error_at(sigmas))
    return error / curve.at(sigmas).clamp_min(torch.finfo(torch.float64).tiny)
