"""What draws of a source and noise see of all points: one pass over the data for all noise levels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from snrweights.optimal.pairs import Dense, Draws, dense_sums, draws_of, level_sums
from snrweights.optimal.reference import ReferenceSet
from snrweights.optimal.work import Work

_CONFUSED = 0.9  # a draw is confused where the source has less than this share of the posterior


@dataclass
class PairSums:
    """Sums over the points that have been added, for M draws at L levels and both signs of the noise; all additive.

    Attributes:
        kernels: (2, L, M) Z = Σ k.
        distances: (2, L, M) Σ k d.
        twins: (M,) points at distance 0 from the source, itself included.
    """

    kernels: Tensor
    distances: Tensor
    twins: Tensor

    @classmethod
    def zeros(cls, levels: int, draws: int, device: torch.device) -> PairSums:
        """Return the sums over no points."""
        empty = torch.zeros(2, levels, draws, dtype=torch.float64, device=device)
        return cls(empty, empty.clone(), torch.zeros(draws, dtype=torch.int64, device=device))

    def add(self, points: Tensor, draws: Draws, inv: Tensor, numbers: Tensor, dense: Dense = dense_sums) -> None:
        """Add points (n, D) as seen by some draws, their numbers (M',), at levels ``inv`` = 1 / sigma, increasing."""
        d, e, twins = draws.distances(points)
        kernels, weighted = level_sums(d, e, inv, dense)
        self.kernels[:, :, numbers] += kernels
        self.distances[:, :, numbers] += weighted
        self.twins[numbers] += twins

    def merge(self, other: PairSums) -> None:
        """Add the sums over other points of the same draws."""
        self.kernels += other.kernels
        self.distances += other.distances
        self.twins += other.twins

    def values(self) -> Tensor:
        """Return ½ Σ W d of every draw (L, M), averaged over both signs: unbiased for J."""
        return (self.distances / self.kernels).mean(0) / 2

    def confused(self) -> Tensor:
        """Return how many draws (L,) leave the source and its twins less than 0.9 of the posterior, at either sign."""
        return (self.twins / self.kernels < _CONFUSED).any(0).sum(1)


def pair_sums(
    reference: ReferenceSet,
    positions: Tensor,
    noise: Tensor,
    inv: Tensor,
    axes: Tensor,
    work: Work,
    dense: Dense = dense_sums,
) -> tuple[PairSums, Tensor]:
    """Return the sums over the whole reference set, and its covariance in the basis of some columns.

    Args:
        reference: the points.
        positions: (M,) of the sources.
        noise: (M, D).
        inv: (L,) 1 / sigma, increasing.
        axes: (D, r) the columns: the second result is axes' Cov axes (r, r), float64.
        work: shares, saves and sums.
        dense: a compiled ``dense_sums``.
    """
    sums = PairSums.zeros(len(inv), len(noise), noise.device)
    within = torch.zeros(axes.shape[1], axes.shape[1], dtype=torch.float64, device=noise.device)
    own = reference.group_of(positions)
    columns = axes.to(noise)
    current: tuple[int, Tensor, Draws] | None = None  # group, numbers of the draws from it, draws

    def add(step: tuple[int, range]) -> None:
        nonlocal current
        number, chunk = step
        points = reference.points(chunk)
        along = (reference.rows_of(points, chunk) @ columns).double()
        within.add_(along.T @ along)
        if current is None or current[0] != number:
            drawn = (own == number).nonzero().squeeze(1)
            member = drawn.to(noise.device)
            current = number, member, draws_of(reference.points(positions[drawn]), noise[member])
        _, member, draws = current
        if len(member):
            sums.add(points, draws, inv, member, dense)

    parts = [sums.kernels, sums.distances, sums.twins, within]
    *summed, within = work.sums("draws", list(reference.chunks()), parts, add)
    return PairSums(*summed), within / reference.size
