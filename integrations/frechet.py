"""Fréchet distance between two sets of features."""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return ``||m1 - m2||² + tr(C1 + C2 - 2 (C1 C2)^½)`` of the Gaussians fitted to two sets of features.

    ``tr (C1 C2)^½`` is the nuclear norm of ``X Yᵀ / (n - 1)`` with centred X and Y, so that no d x d root is taken.
    The distance is biased upwards for few samples: compare at equal counts only, which is enforced.

    Args:
        first: (n, d).
        second: (n, d).

    Raises:
        ValueError: shapes that differ, fewer than two samples, or values that are not finite.

    Source: Dowson & Landau 1982; as a measure of samples Heusel et al. 2017, arXiv 1706.08500.

    Example:
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> round(frechet_distance(x, x + 2), 6)  # three dimensions, each shifted by 2
        12.0
    """
    if first.ndim != 2 or first.shape != second.shape or len(first) < 2:
        raise ValueError(
            "`first` and `second` must both have shape (n, d) with n >= 2, got "
            f"{tuple(first.shape)} and {tuple(second.shape)}."
        )
    first, second = first.double(), second.double()
    if not bool((first.isfinite() & second.isfinite()).all()):
        raise ValueError("`first` or `second` has features that are not finite.")
    mean1, mean2 = first.mean(0), second.mean(0)
    x, y = first - mean1, second - mean2
    degrees = len(x) - 1
    # the smaller of the two products with the same non-zero singular values
    if x.shape[1] < len(x):
        root1, root2 = (torch.linalg.qr(z, mode="r").R for z in (x, y))
        cross = torch.linalg.matrix_norm(root1 @ root2.T, ord="nuc") / degrees
    else:
        cross = torch.linalg.matrix_norm(x @ y.T, ord="nuc") / degrees
    traces = (x.square().sum() + y.square().sum()) / degrees
    return float((mean1 - mean2).square().sum() + traces - 2 * cross)
