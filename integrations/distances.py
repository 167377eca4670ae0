"""Distances between two sets of features: Fréchet and kernel."""

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
    first, second = _checked(first, second)
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


def kernel_distance(
    first: Tensor, second: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return mean and standard error over subsets of the unbiased MMD² with the kernel (x·y / d + 1)³.

    On Inception features this is the Kernel Inception Distance. Unlike the Fréchet distance it is not biased by the
    number of samples, and can be negative.

    Args:
        first: (n, d).
        second: (n, d).
        subsets: how many random subsets, drawn without replacement within each.
        subset_size: samples of each; at most n / 2, so that subsets differ.
        seed: of the subsets.

    Raises:
        ValueError: shapes that differ, fewer than two samples, values that are not finite, fewer than two subsets.

    Source: Binkowski et al. 2018, arXiv 1801.01401.

    Example:
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> kernel_distance(x, x + 2, subsets=2)[0] > 1
        True
    """
    first, second = _checked(first, second)
    if subsets < 2:
        raise ValueError(f"`subsets` must be >= 2, got {subsets}.")
    size = min(subset_size, max(2, len(first) // 2))
    generator = torch.Generator().manual_seed(seed)

    def pick(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=generator)[:size]]

    values = torch.stack([_unbiased_mmd(pick(first), pick(second)) for _ in range(subsets)])
    return float(values.mean()), float(values.std() / subsets**0.5)


def _unbiased_mmd(x: Tensor, y: Tensor) -> Tensor:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    n = len(x)
    within = sum((k.sum() - k.trace()) / (n * (n - 1)) for k in (kernel(x, x), kernel(y, y)))
    return within - 2 * kernel(x, y).mean()


def _checked(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    if first.ndim != 2 or first.shape != second.shape or len(first) < 2:
        raise ValueError(
            "`first` and `second` must both have shape (n, d) with n >= 2, got "
            f"{tuple(first.shape)} and {tuple(second.shape)}."
        )
    first, second = first.double(), second.double()
    if not bool((first.isfinite() & second.isfinite()).all()):
        raise ValueError("`first` or `second` has features that are not finite.")
    return first, second
