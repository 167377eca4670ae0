"""Distances of draws to points, and the sums of kernels over them: everything that is done once per pair.

For a draw x_g + s eps and a point x_n: d = ||x_n - x_g||² and e = eps·(x_n - x_g) do not depend on the noise level s.
With inv = 1/s the kernel of the point, in units of the source's own, is k = exp(inv e - inv² d / 2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from snrweights.optimal.exact import PixelDraws

# A logit is wrong by (error of d) / (2 s²), and a pair counts while d / (8 s²) is under 20: to keep logits within 1e-3,
# pairs nearer than 20 / 1e-3 times the rounding of d are done again by explicit difference.
_NEAR = 20 / 1e-3
_ROUNDING = 4.0  # of d at most, in machine epsilons of ||x_n||² + ||x_g||²; 3.4 measured in float32
_NUMBERS_AT_ONCE = 2**22
_NEGLIGIBLE = 60.0  # e^-60 of the source's own kernel
_TILE = 2**18  # pairs at a time: what stays in the cache

Sums = tuple[Tensor, Tensor]
Dense = Callable[[Tensor, Tensor, Tensor], Sums]


class Draws(Protocol):
    """Sources x_g and noise eps of M draws, with what every chunk of points needs of them."""

    def distances(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return d (M, n), e (M, n) and the number of points at distance 0 (M,), of rows (n, D).

        e is (0, n) without noise.
        """


def draws_of(points: Tensor, noise: Tensor | None = None) -> Draws:
    """Return draws of sources ``points`` (M, D): pixels in exact integers, floats by products and a second look.

    Args:
        points: of a reference set, as ``ReferenceSet.points`` has them, uint8 or floating; later rows likewise.
        noise: eps (M, D), or None where only distances are wanted; pixels have it rounded to a grid of 2^-11.
    """
    return PixelDraws(points, noise) if points.dtype == torch.uint8 else FloatDraws(points, noise)


class FloatDraws:
    """Draws of floating data. Two matrix products; near pairs, the source itself among them, again in float64.

    Args:
        sources: (M, D).
        noise: eps (M, D), or None.
    """

    def __init__(self, sources: Tensor, noise: Tensor | None = None) -> None:
        self.sources, self.noise = sources, sources[:0] if noise is None else noise
        self.stacked = torch.cat([sources, self.noise])
        self.squares = sources.square().sum(1)
        self.along = (self.noise * sources[: len(self.noise)]).sum(1)

    def distances(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return d (M, n), e (M, n) and the number of points at distance 0 (M,), of rows (n, D)."""
        with full_precision():
            products = self.stacked @ rows.T
        inner, e = products[: len(self.sources)], products[len(self.sources) :]
        row_squares = torch.linalg.vecdot(rows, rows)
        d = inner.mul_(-2).add_(row_squares).add_(self.squares[:, None])
        e -= self.along[:, None]
        near = d < _NEAR * _ROUNDING * torch.finfo(d.dtype).eps * (row_squares.max() + self.squares[:, None])
        zeros = torch.zeros(len(d), dtype=torch.int64, device=d.device)
        for m, n in zip(*(i.split(max(1, _NUMBERS_AT_ONCE // rows.shape[1])) for i in near.nonzero().T), strict=True):
            difference = rows[n].double() - self.sources[m].double()
            exact = difference.square().sum(1)
            d[m, n] = exact.to(d.dtype)
            if len(e):
                e[m, n] = (difference * self.noise[m].double()).sum(1).to(e.dtype)
            zeros.index_add_(0, m, (exact == 0).long())
        return d, e, zeros


@contextmanager
def full_precision() -> Iterator[None]:
    """Forbid tf32 and bf16 in products of float32, whatever the training script allows, and allow them again after."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    kept = [backend.fp32_precision for backend in backends]
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # they were set by backend, which leaves this one alone
        precision = "highest"
    try:
        torch.set_float32_matmul_precision("highest")  # of every backend too
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for backend, before in zip(backends, kept, strict=True):
            backend.fp32_precision = before


def dense_sums(d: Tensor, e: Tensor, inv: Tensor) -> Sums:
    """Return Σ_n k and Σ_n k d, each (2, M) for +eps and -eps, of d and e (M, n) at one level (0-d inv)."""
    near = d * (-0.5 * inv * inv)
    step = e * inv
    plus, minus = torch.exp(near + step), torch.exp(near - step)
    return torch.stack([plus.sum(1), minus.sum(1)]), torch.stack([(plus * d).sum(1), (minus * d).sum(1)])


def level_sums(d: Tensor, e: Tensor, inv: Tensor, dense: Dense = dense_sums) -> Sums:
    """Return Σ_n k and Σ_n k d (2, L, M), float64, at levels ``inv`` (L,) in increasing order.

    A pair whose kernel is negligible at a level, inv |e| - inv² d / 2 < -60, is negligible at every smaller sigma, so
    the pairs of a tile are a list that only gets shorter from level to level.
    """
    total = [torch.zeros(2, len(inv), len(d), dtype=torch.float64, device=d.device) for _ in range(2)]
    for start in range(0, len(d), step := max(1, _TILE // d.shape[1])):
        for out, tile in zip(
            total, _tile_sums(d[start : start + step], e[start : start + step], inv, dense), strict=True
        ):
            out[:, :, start : start + step] = tile
    return total[0], total[1]


def _tile_sums(d: Tensor, e: Tensor, inv: Tensor, dense: Dense) -> Sums:
    size = e.abs()
    reach = (size + (size * size + 2 * _NEGLIGIBLE * d).sqrt()) / d  # the largest inv at which the pair counts
    reach = torch.where(d > 0, reach, torch.inf)
    sums = [torch.zeros(2, len(inv), len(d), dtype=torch.float64, device=d.device) for _ in range(2)]
    row: Tensor | None = None
    for level, here in enumerate(inv.to(d.dtype)):
        counts = reach >= here
        count = int(counts.sum())
        if count == 0:
            break
        if 4 * count < d.numel():
            kept = counts.nonzero(as_tuple=True)
            row = kept[0] if row is None else row[kept]
            d, e, reach = d[kept], e[kept], reach[kept]
        if row is None:
            sums[0][:, level], sums[1][:, level] = dense(d, e, here)
            continue
        near, step = d * (-0.5 * here * here), e * here
        for sign, kernel in enumerate((torch.exp(near + step), torch.exp(near - step))):
            sums[0][sign, level].index_add_(0, row, kernel.double())
            sums[1][sign, level].index_add_(0, row, (kernel * d).double())
    return sums[0], sums[1]
