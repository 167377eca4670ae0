"""Distances between uint8 points and their products with noise, as exact integers.

With z = u - 128 in int8, and noise on a grid, eps = 2^-11 (128 hi + lo) with hi and lo in int8, three products of int8
matrices, of x_g, hi and lo with the points, give ||x_n - x_g||² and eps·(x_n - x_g) without any rounding. Nothing is
lost in the differences of large numbers, so that near pairs need no second look. The sums are whole numbers in float64,
under 2^53 for every D that fits into a memory.

A Gaussian rounded to the grid has the variance 1 + 2^-22 / 12, and the same mean, by symmetry.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

_PIXEL = 1 / 127.5  # the data are u / 127.5 - 1
GRID = 2.0**-11
_LARGEST = 2**14 - 1  # of eps in steps of the grid, where hi = lo = 127: 8 standard deviations


class Arithmetic(NamedTuple):
    """A way to multiply matrices of int8 exactly.

    Attributes:
        prepared: a factor (m, D), int8, as ``times`` takes it; zeros may be added below and to the right.
        columns: so many at a time keep every partial sum exact; a product of two int8 is at most 2^14.
        times: of prepared factors (m, D) and (D, n), their product.
    """

    prepared: Callable[[Tensor], Tensor]
    columns: int
    times: Callable[[Tensor, Tensor], Tensor]

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """Return left @ right.T (m, n), whole numbers in float64, of prepared factors (m, D) and (n, D)."""
        total = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
        for a, b in zip(left.split(self.columns, 1), right.split(self.columns, 1), strict=True):
            total += self.times(a, b.T)
        return total


def _padded(z: Tensor) -> Tensor:
    """Return z (m, D) with zeros up to multiples of 8, and over 16 rows: ``torch._int_mm`` asks for them on CUDA."""
    wanted = (max(24, -8 * (-len(z) // 8)), -8 * (-z.shape[1] // 8))
    if wanted == tuple(z.shape):
        return z
    padded = z.new_zeros(wanted)
    padded[: len(z), : z.shape[1]] = z
    return padded


INT8 = Arithmetic(_padded, 2**17 - 8, torch._int_mm)  # sums under 2^31 in int32
FLOAT32 = Arithmetic(Tensor.float, 2**10, torch.mm)  # sums of whole numbers up to 2^24, in any order; in tf32 too


@cache
def fastest(kind: str) -> Arithmetic:
    """Return the faster arithmetic on a device type; on a CPU it is tried, once per process.

    With VNNI instructions that is int8. Without them ``torch._int_mm`` is many times slower than float32.

    Args:
        kind: ``device.type``.
    """
    if kind == "cuda":
        return INT8
    if kind != "cpu":
        return FLOAT32
    return min((FLOAT32, INT8), key=_seconds)


def _seconds(arithmetic: Arithmetic) -> float:
    factor = arithmetic.prepared(torch.ones(128, 512, dtype=torch.int8, device="cpu"))
    times = []
    for _ in range(4):  # the first is the warm-up
        start = time.perf_counter()
        arithmetic.product(factor, factor)
        times.append(time.perf_counter() - start)
    return min(times)


def on_grid(noise: Tensor) -> Tensor:
    """Return noise rounded to the grid, in whole steps of 2^-11, int32; 8 standard deviations at most."""
    return (noise / GRID).round().clamp(-_LARGEST, _LARGEST).to(torch.int32)


class PixelDraws:
    """Sources x_g, uint8, and noise eps of M draws, (M, D) each, with what every chunk of points needs of them.

    Args:
        points: the sources, pixels u that stand for u / 127.5 - 1.
        noise: eps, which is rounded to the grid; None where only distances are wanted.
        arithmetic: None takes the fastest of the device.
    """

    def __init__(self, points: Tensor, noise: Tensor | None = None, arithmetic: Arithmetic | None = None) -> None:
        self.arithmetic = arithmetic or fastest(points.device.type)
        self.size = len(points)
        z = _centred(points)
        steps = z[:0].int() if noise is None else on_grid(noise)
        factors = [z, (steps >> 7).to(torch.int8), (steps & 127).to(torch.int8)]
        self.stacked = self.arithmetic.prepared(torch.cat(factors))
        self.squares = _squares(z)
        self.along = (steps * z[: len(steps)]).sum(1).double()

    def distances(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return d (M, n) and e (M, n), float32, and the number of points at distance 0 (M,), of rows (n, D), uint8.

        The whole numbers are exact; to float32 they are rounded once.
        """
        z = _centred(rows)
        products = self.arithmetic.product(self.stacked, self.arithmetic.prepared(z))[:, : len(rows)]
        inner, high, low = products[: self.size], products[self.size :], products[2 * self.size :]
        d = inner.mul_(-2).add_(_squares(z)).add_(self.squares[:, None])
        e = high[: len(self.along)].mul_(128).add_(low[: len(self.along)]).sub_(self.along[:, None])
        zeros = (d == 0).sum(1)
        return d.mul_(_PIXEL**2).float(), e.mul_(_PIXEL * GRID).float(), zeros


def _centred(points: Tensor) -> Tensor:
    """Return u - 128, int8: the sign bit of a byte turned over."""
    return (points ^ 128).view(torch.int8)


def _squares(z: Tensor) -> Tensor:
    """Return ||z||² of rows, int8: (n,), whole numbers in float64."""
    parts = [torch.linalg.vecdot(part, part) for part in z.float().split(FLOAT32.columns, 1)]
    return torch.stack(parts).sum(0, dtype=torch.float64)
