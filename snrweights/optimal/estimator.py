"""The optimal loss at every noise level in one pass over the data."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from snrweights.optimal.controls import controls, regressed
from snrweights.optimal.curve import OptimalLossCurve
from snrweights.optimal.pairs import Dense, Draws, dense_sums, draws_of, level_sums
from snrweights.optimal.reference import ReferenceSet
from snrweights.optimal.small_noise import SMALL_NOISE, importance, pair_bound
from snrweights.seeds import generator
from snrweights.version import __version__

_CONFUSED = 0.9  # a draw is confused where the source has less than this share of the posterior
_ENOUGH = 30  # confused draws, below which the standard error is not to be trusted
_RANK = 64  # of the linear denoiser among the control variates


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


def optimal_loss(
    data: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    draws: int = 512,
    chunk: int = 1024,
    seed: int = 0,
    labels: Tensor | None = None,
    flips: bool = False,
    device: torch.device | str = "cpu",
    small_noise: str = "importance",
    compile: bool = False,
    progress: bool = True,
) -> OptimalLossCurve:
    """Return J(sigma) = E tr Cov(x0 | x0 + sigma eps) of the data set itself: the loss of its ideal denoiser.

    In x0 units, summed over dimensions; exact over the full reference set, with all levels in one pass. For a draw of
    a source g and noise eps, ``½ Σ_n W_n ||x_n - x_g||²`` has the mean J, with W the posterior over the points given
    x_g + s eps; it is averaged over ±eps and regressed on two control variates of known mean.

    Costs 2 draws N D multiplications, and where a level is too clean for that (fewer than 30 draws are confused
    between points), N² D / 2 more, once. Memory O(draws chunk + chunk D) beside the data and the draws. The result is
    a function of the seed; the size of the chunks changes it by rounding alone.

    Args:
        data: (N, ...) as the model sees it, floating; or uint8, read as u / 127.5 - 1. float64 is computed in float64.
        sigmas: (L,) noise levels sigma / alpha, positive, in any order.
        draws: antithetic pairs.
        chunk: points at a time.
        seed: of sources and noise.
        labels: (N,) integers: the denoiser knows the label, so that only points of the same label are confused.
        flips: the data are augmented by mirror images, data (N, C, H, W).
        device: where to compute.
        small_noise: for levels with fewer than 30 confused draws. ``importance``: mid-point importance sampling.
            ``bound``: the upper bound (1/4N) Σ d e^{-d/8s²} over ordered pairs. The curve's ``how`` says which.
        compile: fuse the kernels of a pair with ``torch.compile``; worth its half minute from some 10^9 numbers on.
        progress: show it on a terminal.

    Raises:
        TypeError: data that are neither floating nor uint8.
        ValueError: sigmas that are not positive, fewer than 8 draws, a wrong shape; unknown ``small_noise``.

    Source: Xu et al. 2025, arXiv 2506.13763, for the quantity; the estimator is this project's.

    Example:
        >>> corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
        >>> curve = optimal_loss(corners, [0.5, 1.0], draws=4096)
        >>> [round(value, 2) for value in curve.value.tolist()]  # exactly 0.2058 and 1.3488
        [0.2..., 1.3...]
    """
    levels = torch.as_tensor(sigmas, dtype=torch.float64).sort().values
    if levels.ndim != 1 or not len(levels) or not bool(((levels > 0) & levels.isfinite()).all()):
        raise ValueError(f"`sigmas` must be positive noise levels (L,), got {sigmas}.")
    if draws < 8:
        raise ValueError(f"`draws` must be at least 8, got {draws}.")
    if chunk < 1:
        raise ValueError(f"`chunk` must be at least 1, got {chunk}.")
    if small_noise not in SMALL_NOISE:
        raise ValueError(f"Unknown `small_noise` {small_noise!r}; choose one of {list(SMALL_NOISE)}.")
    reference = ReferenceSet(data, labels, flips, device, chunk)
    report = _terminal if progress and sys.stderr.isatty() else _silent

    stream = generator(seed, 0)
    positions = torch.randint(reference.size, (draws,), generator=stream).sort().values
    sources = reference.rows(positions)
    noise = torch.randn(draws, reference.dim, dtype=torch.float64, generator=stream).to(sources)
    inv = levels.flip(0).reciprocal().to(sources.device)  # increasing
    dense = torch.compile(dense_sums, dynamic=True) if compile else dense_sums
    sums = pair_sums(reference, positions, noise, inv, report, dense)

    axes, variances = reference.principal_axes(_RANK, seed)
    by_control = controls(sources, noise, 1 / inv, reference.variance, axes, variances)
    values = regressed(sums.values(), by_control).flip(0).cpu()
    value, stderr = values.mean(1), values.std(1) / draws**0.5
    confused = sums.confused().flip(0).cpu()
    how = ["pairs"] * len(levels)
    rare = confused < _ENOUGH
    if bool(rare.any()):
        bound = pair_bound(reference, levels[rare], report)
        if small_noise == "importance":
            value[rare], stderr[rare] = importance(reference, bound, draws, seed, report)
        else:
            value[rare], stderr[rare] = bound.value, 0.0
        how = [small_noise if flag else "pairs" for flag in rare.tolist()]
    made = {**reference.provenance(), "draws": draws, "seed": seed, "version": __version__}
    return OptimalLossCurve(levels, value, stderr, tuple(how), confused, made)


def pair_sums(
    reference: ReferenceSet,
    positions: Tensor,
    noise: Tensor,
    inv: Tensor,
    report: Callable[[str, float], None],
    dense: Dense = dense_sums,
) -> PairSums:
    """Return the sums over the whole reference set, of draws from the positions (M,), at levels ``inv`` (L,)."""
    sums = PairSums.zeros(len(inv), len(noise), noise.device)
    own = reference.group_of(positions)
    for number, group in enumerate(reference.groups):
        drawn = (own == number).nonzero().squeeze(1)
        if not len(drawn):
            continue
        member = drawn.to(noise.device)
        draws = draws_of(reference.points(positions[drawn]), noise[member])
        for at, points in reference.chunks_of_points(group):
            sums.add(points, draws, inv, member, dense)
            report("draws", at.stop / reference.size)
    report("draws", 1.0)
    return sums


def _silent(what: str, share: float) -> None:
    pass


def _terminal(what: str, share: float) -> None:
    end = "\n" if share >= 1 else ""
    print(f"\roptimal loss, {what}: {share:4.0%}", end=end, file=sys.stderr, flush=True)
