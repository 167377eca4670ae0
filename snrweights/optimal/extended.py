"""The optimal loss at every noise level, inside the curve's range and beyond it, on any device without waiting."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from snrweights.optimal.curve import OptimalLossCurve, _monotone_cubic
from snrweights.predictions import LIMIT, log_error_ratio
from snrweights.schedules import exact_dtype


class ExtendedCurve:
    """``curve`` as a function of log-SNR, mean over dimensions, for every log-SNR.

    Inside the range of levels it is ``curve.at``. Beyond the largest level J is its limit, the variance of the data;
    beyond the smallest it is 0, which it tends to and which no J is below.

    Args:
        curve: of the data that the model is trained on.
        prediction_type: the target whose mean squared error it is.
        sigma_data: for ``edm``.

    Example:
        >>> levels = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
        >>> made = {"dim": 4, "variance": 20.0}
        >>> extended = ExtendedCurve(OptimalLossCurve(levels, levels**2, 0 * levels, ("pairs",) * 3, levels, made))
        >>> extended(-2 * torch.tensor([0.5, 2.0, 9.0]).log())
        tensor([0., 1., 5.], dtype=torch.float64)
    """

    def __init__(
        self, curve: OptimalLossCurve, prediction_type: str = "sample", sigma_data: float | None = None
    ) -> None:
        log_dim = math.log(curve.made["dim"])
        table = torch.stack((curve.sigmas.double().log(), curve._rising().double().log() - log_dim))
        self._tables = {table.device: table}
        self._limit = math.log(curve.made["variance"]) - log_dim
        self._prediction_type, self._sigma_data = prediction_type, sigma_data

    def __call__(self, log_snr: Tensor) -> Tensor:
        """Return the optimal loss at ``log_snr``, any shape, infinities included."""
        return self.log(log_snr).exp()

    def log(self, log_snr: Tensor) -> Tensor:
        """Return its logarithm; -inf where it is 0."""
        x, y = self._on(log_snr.device)
        log_snr = log_snr.to(x.dtype).clamp(-LIMIT, LIMIT)
        at = -log_snr / 2
        slack = 1e-12
        value = _monotone_cubic(x, y, torch.minimum(torch.maximum(at, x[0]), x[-1]))
        value = torch.where(at < x[0] - slack, -math.inf, torch.where(at > x[-1] + slack, self._limit, value))
        return value + log_error_ratio(self._prediction_type, log_snr, self._sigma_data)

    def _on(self, device: torch.device) -> Tensor:
        if device not in self._tables:  # copied once: a copy from the host waits for the device
            self._tables[device] = next(iter(self._tables.values())).to(device, exact_dtype(device))
        return self._tables[device]
