"""The ideal denoiser of a data set, at the noisy points of some draws: the posterior mean over all points."""

from __future__ import annotations

import torch
from torch import Tensor

from snrweights.optimal.pairs import Draws, draws_of, full_precision
from snrweights.optimal.reference import ReferenceSet

_NEGLIGIBLE = 1e-12  # of the posterior


def ideal_offsets(reference: ReferenceSet, positions: Tensor, noise: Tensor, inv: Tensor, kernels: Tensor) -> Tensor:
    """Return E[x0 | x_g ± s eps] - x_g, (2, L, M, D) in the dtype of ``noise``, over the whole reference set.

    Costs up to 4 L M N D multiplications, and a memory of 2 L M D numbers.

    Args:
        reference: the points.
        positions: (M,) of the sources x_g.
        noise: (M, D) eps; for uint8 data on their grid.
        inv: (L,) 1 / s.
        kernels: (2, L, M) Σ k of these draws, ``PairSums.kernels``.
    """
    found = torch.zeros(2, len(inv), *noise.shape, dtype=noise.dtype, device=noise.device)
    own = reference.group_of(positions)
    draws: tuple[int, Tensor, Draws] | None = None
    for number, chunk in reference.chunks():
        if draws is None or draws[0] != number:
            drawn = (own == number).nonzero().squeeze(1)
            draws = number, drawn.to(noise.device), draws_of(reference.points(positions[drawn]), noise[drawn])
        _, member, seen = draws
        if not len(member):
            continue
        points = reference.points(chunk)
        rows = reference.rows_of(points, chunk).to(noise)
        d, e, _ = seen.distances(points)
        d, e = d.double(), e.double()
        for level, here in enumerate(inv):
            for sign in (0, 1):
                logits = (1 - 2 * sign) * here * e - here**2 / 2 * d
                share = torch.exp(logits - kernels[sign, level, member].log()[:, None])
                if bool((share > _NEGLIGIBLE).any()):
                    with full_precision():
                        found[sign, level, member] += share.to(rows) @ rows
    return found - reference.rows(positions).to(noise)
