"""The one number that ``auto`` needs of the data."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def data_variance(data: Tensor | Iterable[Tensor]) -> float:
    """Return the mean over dimensions of the data's variance, in one pass, float64.

    ``mean_i Var[x_i]`` over the dimensions i of a sample, of the data as the network sees it: images in [-1, 1], or
    scaled latents. It is the trace of the covariance divided by the dimension.

    Args:
        data: (N, ...), or batches (B, ...) of it.

    Raises:
        TypeError: batches that are no tensors.
        ValueError: fewer than two samples, batches of different shapes, values that are not finite, or no variance.

    Example:
        >>> data_variance(torch.tensor([[0.0, 0.0], [2.0, 4.0]]))
        2.5
    """
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for batch in data.split(1024) if isinstance(data, Tensor) else data:
        if not isinstance(batch, Tensor):
            raise TypeError(f"`data` must be a tensor or give tensors, got {type(batch).__name__}.")
        batch = batch.detach().to("cpu", torch.float64)
        if count and batch.shape[1:] != mean.shape:
            raise ValueError(f"Batches of `data` differ in shape: {tuple(mean.shape)} and {tuple(batch.shape[1:])}.")
        n = len(batch)
        if n == 0:
            continue
        own_mean = batch.mean(0)
        own_squares = (batch - own_mean).square().sum(0)
        if count == 0:
            count, mean, squares = n, own_mean, own_squares
            continue
        step = own_mean - mean  # Chan's update
        mean = mean + step * n / (count + n)
        squares = squares + own_squares + step.square() * count * n / (count + n)
        count += n
    if count < 2:
        raise ValueError(f"`data` must have two samples at least, got {count}.")
    variance = float((squares / count).mean())
    if not 0 < variance < float("inf"):
        raise ValueError(f"`data` must be finite and vary, but its mean variance is {variance}.")
    return variance
