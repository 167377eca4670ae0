"""The forward process, once: how x0 and noise mix, what a model is asked for, and how x0 comes back out of its answer.

All functions take log-SNR with one value per sample, (B,) or anything that broadcasts against (B, ...) from the left,
and work for every schedule: ``x = alpha x0 + sigma eps`` with alpha and sigma of the coordinates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from snrweights.predictions import check_prediction_type, log_error_ratio
from snrweights.schedules import Coordinates


def alpha_sigma(log_snr: Tensor, coords: Coordinates = "vp") -> tuple[Tensor, Tensor]:
    """Return (alpha, sigma) of the coordinates at ``log_snr``, any shape; exact at infinite log-SNR.

    vp: alpha² = sigmoid(log_snr), sigma² = sigmoid(-log_snr). flow: alpha = sigmoid(log_snr / 2) = 1 - sigma.
    ve: alpha = 1, sigma = exp(-log_snr / 2).

    Raises:
        ValueError: unknown coordinates.

    Example:
        >>> alpha_sigma(torch.zeros(1), "flow")
        (tensor([0.5000]), tensor([0.5000]))
    """
    if coords not in _ALPHA_SIGMA:
        raise ValueError(f"Unknown coords {coords!r}; choose one of {list(_ALPHA_SIGMA)}.")
    return _ALPHA_SIGMA[coords](log_snr)


_ALPHA_SIGMA: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "vp": lambda log_snr: (torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()),
    "ve": lambda log_snr: (torch.ones_like(log_snr), torch.exp(-log_snr / 2)),
    "flow": lambda log_snr: (torch.sigmoid(log_snr / 2), torch.sigmoid(-log_snr / 2)),
}


def add_noise(x0: Tensor, noise: Tensor, log_snr: Tensor, coords: Coordinates = "vp") -> Tensor:
    """Return ``alpha x0 + sigma noise``, shape of ``x0`` (B, ...) and its dtype, if the noise has it; ``log_snr`` (B,).

    Example:
        >>> add_noise(torch.ones(1, 2), torch.zeros(1, 2), torch.zeros(1), "flow")
        tensor([[0.5000, 0.5000]])
    """
    alpha, sigma = (_like(value, x0) for value in alpha_sigma(log_snr, coords))
    return alpha * x0 + sigma * noise


def target(
    prediction_type: str,
    x0: Tensor,
    noise: Tensor,
    log_snr: Tensor,
    sigma_data: float | None = None,
) -> Tensor:
    """Return what a model of ``prediction_type`` is asked for, shape of ``x0``.

    sample: x0. epsilon: eps. v_prediction: alpha eps - sigma x0 with the VP alpha and sigma. flow_prediction: eps - x0.
    edm: (x0 - c_skip x) / c_out with x = x0 + sigma_hat eps, finite at every noise level.

    Raises:
        ValueError: unknown prediction type, or edm without sigma_data.

    Example:
        >>> target("flow_prediction", torch.ones(1, 2), torch.zeros(1, 2), torch.zeros(1))
        tensor([[-1., -1.]])
    """
    on_x0, on_noise = target_coefficients(prediction_type, log_snr, sigma_data)
    return _like(on_x0, x0) * x0 + _like(on_noise, x0) * noise


def target_coefficients(
    prediction_type: str, log_snr: Tensor, sigma_data: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return (a, b) of ``target = a x0 + b noise``, both of the shape of ``log_snr``.

    Example:
        >>> target_coefficients("flow_prediction", torch.zeros(1))
        (tensor([-1.]), tensor([1.]))
    """
    check_prediction_type(prediction_type)
    return _TARGETS[prediction_type](log_snr, _check_sigma_data(prediction_type, sigma_data))


def to_x0(
    prediction: Tensor,
    x: Tensor,
    log_snr: Tensor,
    prediction_type: str,
    coords: Coordinates = "vp",
    sigma_data: float | None = None,
) -> Tensor:
    """Return the x0 that a prediction amounts to: x0 such that ``target`` and ``add_noise`` give it and ``x``.

    Solves ``prediction = a x0 + b eps`` and ``x = alpha x0 + sigma eps``: x0 = (sigma p - b x) / (sigma a - b alpha).

    Args:
        prediction: the model's output, (B, ...).
        x: the noisy input in the given coordinates, same shape.
        log_snr: (B,).
        prediction_type: of the model.
        coords: of ``x``.
        sigma_data: for edm.

    Example:
        >>> x0, noise, log_snr = torch.ones(1, 2), torch.zeros(1, 2), torch.zeros(1)
        >>> x = add_noise(x0, noise, log_snr)
        >>> to_x0(target("v_prediction", x0, noise, log_snr), x, log_snr, "v_prediction")
        tensor([[1., 1.]])
    """
    a, b = target_coefficients(prediction_type, log_snr, sigma_data)
    alpha, sigma = alpha_sigma(log_snr, coords)
    denominator = sigma * a - b * alpha
    return _like(sigma / denominator, x) * prediction - _like(b / denominator, x) * x


def _check_sigma_data(prediction_type: str, sigma_data: float | None) -> float:
    if prediction_type == "edm" and sigma_data is None:
        log_error_ratio("edm", torch.zeros(()), None)  # raises
    return sigma_data or 1.0


def _v(log_snr: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    alpha, sigma = alpha_sigma(log_snr, "vp")
    return -sigma, alpha


def _edm(log_snr: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """F = (x0 - c_skip (x0 + s eps)) / c_out = (s x0 - sd² eps) / (sd √(s² + sd²)), without dividing by s."""
    s = torch.exp(-log_snr / 2)
    root = torch.sqrt(s**2 + sigma_data**2)
    return s / (sigma_data * root), -sigma_data / root


_TARGETS: dict[str, Callable[[Tensor, float], tuple[Tensor, Tensor]]] = {
    "sample": lambda log_snr, sigma_data: (torch.ones_like(log_snr), torch.zeros_like(log_snr)),
    "epsilon": lambda log_snr, sigma_data: (torch.zeros_like(log_snr), torch.ones_like(log_snr)),
    "v_prediction": _v,
    "flow_prediction": lambda log_snr, sigma_data: (-torch.ones_like(log_snr), torch.ones_like(log_snr)),
    "edm": _edm,
}


def _like(value: Tensor, x: Tensor) -> Tensor:
    return value.to(x).reshape(value.shape + (1,) * (x.ndim - value.ndim))


class EDMPreconditioned(nn.Module):
    """A network F in EDM's preconditioning: takes x = x0 + sigma eps and sigma, returns F(c_in x, c_noise).

    c_in = 1 / √(sigma² + sigma_data²), c_noise = ln(sigma) / 4. The output is F itself, the ``edm`` target;
    ``denoise`` gives c_skip x + c_out F.

    Args:
        model: called as ``model(sample, timestep, *args, return_dict=False, **kwargs)``, like diffusers' UNets.
        sigma_data: standard deviation of the data.

    Source: Karras 2022, arXiv 2206.00364, Table 1.

    Example:
        >>> class Zero(nn.Module):
        ...     def forward(self, x, t, return_dict):
        ...         return (0 * x,)
        >>> EDMPreconditioned(Zero(), 0.5).denoise(torch.ones(1, 1, 1, 1), torch.tensor([0.5])).item()  # c_skip
        0.5
    """

    def __init__(self, model: nn.Module, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.model, self.sigma_data = model, sigma_data

    def forward(self, x: Tensor, sigma: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return F, shape of ``x`` (B, ...); ``sigma`` (B,)."""
        c_in = torch.rsqrt(sigma**2 + self.sigma_data**2)
        return self.model(_like(c_in, x) * x, torch.log(sigma) / 4, *args, return_dict=False, **kwargs)[0]

    def denoise(self, x: Tensor, sigma: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the estimate of x0, shape of ``x`` (B, ...); ``sigma`` (B,)."""
        prediction = self(x, sigma, *args, **kwargs)
        return to_x0(prediction, x, -2 * torch.log(sigma), "edm", "ve", self.sigma_data)
