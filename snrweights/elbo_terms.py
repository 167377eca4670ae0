"""The two ends of the ELBO: what the last noise leaves to the prior, and what the decoder of 8-bit values costs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from snrweights.schedules import Coordinates

_VALUES = 256
_STEP_OF_VALUES = 2 / 255  # of u / 127.5 - 1
_NODES = torch.linspace(-9, 9, 361, dtype=torch.float64)  # the trapezoids of a Gaussian integral


def prior_kl_of_points(second_moment: float, dim: int, log_snr: float, coords: Coordinates = "vp") -> float:
    """Return the mean over points x of KL(q(z | x) || p(z)) at the noisy end, in nats.

    The prior is what a sampler begins with: N(0, I) in variance-preserving coordinates, N(0, sigma² I) in the others.
    In vp ``½ [r / (1 + r) (E||x||² - dim) + dim ln(1 + r)]``, in ve and flow ``½ r E||x||²``, with r = exp(log_snr):
    0 at r = 0. Less I(x; z) it is the KL of the marginals.

    Args:
        second_moment: E||x||².
        dim: numbers of a point.
        log_snr: of the noisy end; may be -inf.
        coords: of the forward process.

    Raises:
        ValueError: unknown coordinates.

    Example:
        >>> prior_kl_of_points(2.0, 2, -2.0, "ve") == math.exp(-2.0), prior_kl_of_points(2.0, 2, -math.inf)
        (True, 0.0)
    """
    if coords not in ("vp", "ve", "flow"):
        raise ValueError(f"Unknown coords {coords!r}; choose one of ['vp', 've', 'flow'].")
    snr = math.exp(log_snr)
    if coords != "vp":
        return snr * second_moment / 2
    return (snr / (1 + snr) * (second_moment - dim) + dim * math.log1p(snr)) / 2


def decoder_nats(pixels: Tensor, log_snr: float) -> float:
    """Return the mean over points of -ln p(x | z) in nats, for 8-bit values decoded from z at the clean end.

    p(x | z) is the product over dimensions of p(v | z_i) ∝ exp(-(z_i / alpha - v)² / (2 sigma_hat²)) over the 256
    values v = u / 127.5 - 1: a discretised Gaussian that knows neither the model nor the data. The mean over the noise
    is by quadrature over the histogram of the values, without draws.

    Args:
        pixels: (N, ...) uint8.
        log_snr: of the clean end.

    Raises:
        TypeError: values of another type.

    Source: Kingma et al. 2021, arXiv 2107.00630, for the decoder.

    Example:
        >>> pixels = torch.zeros(3, 2, dtype=torch.uint8)
        >>> decoder_nats(pixels, 20.0) < 1e-9, decoder_nats(pixels, -30.0) / math.log(256)  # of two dimensions
        (True, 1.99999...)
    """
    if pixels.dtype != torch.uint8:
        raise TypeError(f"`pixels` must be uint8, got {pixels.dtype}.")
    share = pixels.flatten().to("cpu", torch.int64).bincount(minlength=_VALUES).double() / pixels.numel()
    share = (share + share.flip(0))[: _VALUES // 2]  # the values are symmetric
    density = torch.exp(-(_NODES**2) / 2)
    density /= density.sum()
    steps = _STEP_OF_VALUES * math.exp(log_snr / 2)  # between values, in standard deviations of the noise
    mean = 0.0
    for value in share.nonzero().squeeze(1).tolist():
        off = steps * (torch.arange(_VALUES, dtype=torch.float64) - value)[:, None]
        mean += float(share[value]) * float(torch.logsumexp(_NODES * off - off**2 / 2, 0) @ density)
    return mean * pixels[0].numel()
