"""Control variates: functions of a draw whose mean is known to be zero, and the regression on them."""

from __future__ import annotations

import torch
from torch import Tensor


def controls(
    sources: Tensor, noise: Tensor, sigmas: Tensor, variance: float, axes: Tensor, variances: Tensor
) -> Tensor:
    """Return two control variates (L, M, 2), float64: the source's square, and the residual of a linear denoiser.

    ``c0 = ||x_g||² - A``, A = E||x_g||². ``c1 = ||K(x) - x_g||² - E[...]``, averaged over ±eps, for the linear denoiser
    with gain k_i = lam_i / (lam_i + s²) along the axes and 0 beyond them:
    ``c1 = c0 + Σ_i ((1 - k_i)² - 1)(a_i² - lam_i) + s² k_i² (b_i² - 1)``, a and b the source and eps along the axes.

    Args:
        sources: (M, D), centred.
        noise: (M, D).
        sigmas: (L,) float64.
        variance: A.
        axes: (D, r), orthonormal columns.
        variances: (r,) lam, of the data along the axes.
    """
    c0 = sources.double().square().sum(1) - variance
    a = (sources.double() @ axes).square() - variances
    b = (noise.double() @ axes).square() - 1
    gain = variances / (variances + sigmas[:, None] ** 2)
    c1 = c0 + ((1 - gain) ** 2 - 1) @ a.T + (sigmas[:, None] * gain) ** 2 @ b.T
    return torch.stack([c0.expand_as(c1), c1], dim=-1)


def regressed(values: Tensor, controls: Tensor) -> Tensor:
    """Return values (L, M) less what the controls (L, M, C) explain; their mean keeps its expectation.

    The coefficients for a draw come from all the *other* draws, so that they are independent of its controls, whose
    mean is zero: no bias, at any number of draws. Leaving one out of a linear regression with intercept has the closed
    form beta_{-m} = beta - G⁺ z_m r_m / (1 - h_m).
    """
    spread = controls.std(1, keepdim=True)
    level = controls.abs().amax((1, 2), keepdim=True)
    scaled = torch.where(spread > 1e-10 * level, controls / spread, 0.0)  # a control that is constant but for rounding
    design = torch.cat([torch.ones_like(scaled[..., :1]), scaled], dim=-1)
    inverse = torch.linalg.pinv(design.mT @ design, rtol=1e-10, hermitian=True)
    beta = (inverse @ (design.mT @ values[..., None])).squeeze(-1)
    residual = values - (design @ beta[..., None]).squeeze(-1)
    solved = design @ inverse
    leverage = (solved * design).sum(-1)
    # a draw that alone determines a coefficient has leverage 1 and no regression without it
    shift = torch.where(leverage < 1 - 1e-8, residual / (1 - leverage), 0.0)
    without = beta[:, None] - solved * shift[..., None]
    return values - (without[..., 1:] * scaled).sum(-1)
