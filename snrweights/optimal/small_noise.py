"""Levels at which confusion is a rare event: a rigorous bound, and importance sampling between near points.

The sum over ordered pairs ``B_gn = d e^{-d/8s²}`` bounds J <= (1/4N) Σ B. Sampling a pair by its share of Σ B and a
point x ~ N(mid-point, s² I) gives J = (1/2N) Σ B E[h] with h = √(p_g p_n) / Σ_i p_i <= 1/2, p_i the density of point i.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from snrweights.optimal.pairs import Draws, draws_of, level_sums
from snrweights.optimal.reference import ReferenceSet
from snrweights.optimal.work import Work
from snrweights.seeds import generator

SMALL_NOISE = ("importance", "bound")
_Tile = tuple[range, range]


@dataclass(frozen=True)
class PairBound:
    """Σ_n d e^{-d/8s²} of every point.

    Attributes:
        sigmas: (L,).
        rows: (L, N) the sums, the one thing here that grows with both.
    """

    sigmas: Tensor
    rows: Tensor

    @property
    def value(self) -> Tensor:
        """(1/4N) Σ d e^{-d/8s²} over ordered pairs (L,): J is no more."""
        return self.rows.mean(1) / 4


def pair_bound(reference: ReferenceSet, sigmas: Tensor, work: Work) -> PairBound:
    """Return the bound and its sums at ``sigmas`` (L,), increasing, from all pairs of the reference set."""
    rows = torch.zeros(len(sigmas), reference.size, dtype=torch.float64)
    left: tuple[range, Draws] | None = None  # of the last tile

    def add(tile: _Tile) -> None:
        nonlocal left
        own, other = tile
        if left is None or left[0] != own:
            left = own, draws_of(reference.points(own))
        by_left, by_right = _bound_sums(left[1].distances(reference.points(other))[0], sigmas)
        rows[:, own.start : own.stop] += by_left.cpu()
        if other != own:  # the tile beyond the diagonal, by symmetry
            rows[:, other.start : other.stop] += by_right.cpu()

    tiles = [
        (own, other)
        for number, own in reference.chunks()
        for _, other in reference.chunks(range(own.start, reference.groups[number].stop))
    ]
    return PairBound(sigmas, work.sums("pairs", tiles, [rows], add)[0])


def _bound_sums(d: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ d e^{-d/8s²} of d (M, n) over n, (L, M), and over M, (L, n); few pairs are near enough to count."""
    by_row, by_column = (torch.zeros(len(sigmas), size, dtype=torch.float64, device=d.device) for size in d.shape)
    nearest = float(torch.where(d > 0, d, torch.inf).min())
    row, column = (d < _reach(sigmas[-1], nearest)).nonzero(as_tuple=True)
    d = d[row, column].double()
    for level in range(len(sigmas) - 1, -1, -1):
        near = d < _reach(sigmas[level], nearest)
        d, row, column = d[near], row[near], column[near]
        terms = _bound_terms(d, float(sigmas[level]))
        by_row[level].index_add_(0, row, terms)
        by_column[level].index_add_(0, column, terms)
    return by_row, by_column


def _reach(sigma: Tensor, nearest: float) -> float:
    """Return the d at which e^{-d/8s²} leaves float64, or is e^-60 of that of the nearest pair."""
    return 8 * float(sigma) ** 2 * min(745.0, nearest / (8 * float(sigma) ** 2) + 60)


def _bound_terms(d: Tensor, sigma: float) -> Tensor:
    return d * torch.exp(-d / (8 * sigma**2))


def importance(reference: ReferenceSet, bound: PairBound, draws: int, seed: int, work: Work) -> tuple[Tensor, Tensor]:
    """Return J (L,) and its standard error at the levels of the bound, ``draws`` antithetic pairs for each.

    The sum of all Σ B = 0 in float64 (distances beyond 77 s) gives J = 0.
    """
    value, stderr = torch.zeros(2, len(bound.sigmas), dtype=torch.float64)

    def add(level: int) -> None:
        stream = generator(seed, 2, level)
        share = _share_of_middle(reference, bound.rows[level], float(bound.sigmas[level]), draws, stream)
        factor = 2 * float(bound.value[level])
        value[level], stderr[level] = factor * share.mean(), factor * share.std() / draws**0.5

    levels = [level for level, row in enumerate(bound.rows) if float(row.sum()) > 0]
    summed = work.sums("near pairs", levels, [value, stderr], add)
    return summed[0], summed[1]


def _share_of_middle(
    reference: ReferenceSet, rows: Tensor, sigma: float, draws: int, stream: torch.Generator
) -> Tensor:
    """Return h (draws,), averaged over ±eps, of pairs drawn by their share of Σ B."""
    positions = torch.searchsorted(
        rows.cumsum(0), torch.rand(draws, dtype=torch.float64, generator=stream) * rows.sum()
    ).clamp_max(reference.size - 1)
    positions = positions.sort().values
    own = reference.group_of(positions)
    uniform = torch.rand(draws, dtype=torch.float64, generator=stream)
    noise = torch.randn(draws, reference.dim, dtype=torch.float64, generator=stream)
    h = torch.zeros(draws, dtype=torch.float64)
    for number, group in enumerate(reference.groups):
        drawn = (own == number).nonzero().squeeze(1)
        if len(drawn):
            partners = _partners(reference, group, positions[drawn], uniform[drawn], sigma)
            first, second = reference.rows(positions[drawn]), reference.rows(partners)
            h[drawn] = _h(reference, group, first, second, noise[drawn].to(first), sigma).cpu()
    return h


def _partners(reference: ReferenceSet, group: range, positions: Tensor, uniform: Tensor, sigma: float) -> Tensor:
    """Return positions n (M,) drawn with probability ∝ d e^{-d/8s²} of their distance to those at ``positions``.

    First a chunk by its sum, then a point in it, so that no more than (M, chunk) distances are there at a time.
    """
    first, chunks = reference.points(positions), [chunk for _, chunk in reference.chunks(group)]
    draws = draws_of(first)
    sums = torch.stack([_near(reference, chunk, draws, sigma).sum(1) for chunk in chunks], dim=1)
    number, uniform = _drawn(sums, uniform.to(sums))
    partners = torch.empty_like(positions)
    for each, chunk in enumerate(chunks):
        chosen = (number == each).nonzero().squeeze(1)
        if len(chosen):
            terms = _near(reference, chunk, draws_of(first[chosen]), sigma)
            partners[chosen.cpu()] = chunk.start + _drawn(terms, uniform[chosen])[0].cpu()
    return partners


def _near(reference: ReferenceSet, chunk: range, draws: Draws, sigma: float) -> Tensor:
    return _bound_terms(draws.distances(reference.points(chunk))[0].double(), sigma)


def _drawn(shares: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Return the column (M,) that each uniform number draws from its row of shares (M, n), and what is left of it.

    What is left, its place inside the column's share, is uniform again.
    """
    sums = shares.cumsum(1)
    wanted = uniform[:, None] * sums[:, -1:]
    column = torch.searchsorted(sums, wanted, right=True).clamp_max(shares.shape[1] - 1)
    share = shares.gather(1, column)
    left = ((wanted - sums.gather(1, column) + share) / share).clamp(0, 1)
    return column.squeeze(1), left.squeeze(1)


def _h(reference: ReferenceSet, group: range, first: Tensor, second: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Return √(p_g p_n) / Σ p at the mid-points ± s eps (M,), averaged over the signs.

    Of g and n the nearer to x serves as the source: its kernel is 1 and the other's is exp(-|eps·(x_n - x_g)| / s).
    """
    across = second - first
    along = (noise.double() * across.double()).sum(1)
    total = torch.zeros(len(first), dtype=torch.float64, device=first.device)
    inv = torch.tensor([1 / sigma], dtype=torch.float64, device=first.device)
    for sign in (1, -1):
        towards = (sign * along > 0)[:, None]  # x is nearer to the second
        source = torch.where(towards, second, first)
        offset = torch.where(towards, -across, across) / (2 * sigma) + sign * noise
        draws = draws_of(source, offset)
        kernels = torch.zeros_like(total)
        for _, positions in reference.chunks(group):
            d, e, _ = draws.distances(reference.rows(positions))
            kernels += level_sums(d, e, inv)[0][0, 0]
        total += torch.exp(-along.abs() / (2 * sigma)) / kernels
    return total / 2
