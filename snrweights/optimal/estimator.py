"""The optimal loss at every noise level in one pass over the data."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snrweights.optimal.controls import controls, regressed
from snrweights.optimal.curve import OptimalLossCurve
from snrweights.optimal.draws import pair_sums
from snrweights.optimal.pairs import dense_sums
from snrweights.optimal.reference import ReferenceSet
from snrweights.optimal.small_noise import SMALL_NOISE, importance, pair_bound
from snrweights.optimal.sources import as_tensor
from snrweights.optimal.work import Progress, Work
from snrweights.seeds import generator
from snrweights.version import __version__

# Confused draws from which on the one pass is taken. Its 95 % intervals held in 86 to 92 % of replications at 30 to 100
# confused of 200 draws, those of importance sampling in 93 to 97 %, three to six times as narrow; beyond half the draws
# that turns round. Taking the narrower of both holds less often than either.
_ENOUGH = {"importance": 100, "bound": 30}
_LEAST = 30
_RANK = 64  # of the linear denoiser among the control variates


def optimal_loss(
    data: Any,
    sigmas: Tensor | Sequence[float],
    *,
    draws: int = 512,
    chunk: int = 1024,
    seed: int = 0,
    labels: Tensor | Sequence[int] | str | None = None,
    flips: bool = False,
    device: torch.device | str = "cpu",
    small_noise: str = "importance",
    compile: bool = False,
    workers: int = 0,
    state: str | os.PathLike[str] | None = None,
    rank: int = 0,
    world: int = 1,
    reduce: Callable[[Tensor], Tensor] | None = None,
    progress: bool = True,
) -> OptimalLossCurve:
    """Return J(sigma) = E tr Cov(x0 | x0 + sigma eps) of the data set itself: the loss of its ideal denoiser.

    In x0 units, summed over dimensions; exact over the full reference set, with all levels in one pass. For a draw of
    a source g and noise eps, ``½ Σ_n W_n ||x_n - x_g||²`` has the mean J, with W the posterior over the points given
    x_g + s eps; it is averaged over ±eps and regressed on two control variates of known mean.

    Distances between uint8 points, and their products with noise on a grid of 2^-11, are exact integers
    (``snrweights.optimal.exact``); those of floats are rounded, and near pairs done again.

    Costs 2 draws N D multiplications (3 of uint8), and where a level is too clean for that (fewer than 100 draws are
    confused between points), N² D / 2 more, once, and some 5 draws N D for each such level. The data are read once for
    their mean and fingerprint and once for the draws, in order. Memory O(draws chunk + chunk D) beside the data and the
    draws, and N numbers for each level that is too clean. The result is a function of the seed; the size of the chunks
    and the number of processes change it by rounding alone.

    Data that are not a tensor or an array are decoded once, into a file of one number (bytes of images, as they are)
    after the other, and read from there: in the folder ``state``, or a temporary file.

    Args:
        data: (N, ...) as the model sees it, floating; or uint8, read as u / 127.5 - 1. float64 is computed in float64.
            A tensor, a numpy array or memmap, a ``torch`` Dataset or anything to iterate over, of tensors; or, with the
            defaults of ``snrweights.integrations.reference_data.load_reference``, a ``datasets`` data set with a
            column ``image``, or the path of a folder of images or a file of latents.
        sigmas: (L,) noise levels sigma / alpha, positive, in any order.
        draws: antithetic pairs.
        chunk: points at a time.
        seed: of sources and noise.
        labels: (N,) integers: the denoiser knows the label, so that only points of the same label are confused. Of a
            ``datasets`` data set or a path also the name of a column.
        flips: the data are augmented by mirror images, data (N, C, H, W). Of any other finite augmentation put every
            copy into the data.
        device: where to compute.
        small_noise: for levels at which few draws are confused. ``importance``: mid-point importance sampling, below
            100 and half the draws, always below 30. ``bound``: below 30, the upper bound (1/4N) Σ d e^{-d/8s²} over
            ordered pairs. The curve's ``how`` says which.
        compile: fuse the kernels of a pair with ``torch.compile``; worth its half minute from some 10^9 numbers on.
        workers: processes that decode a data set.
        state: a folder that keeps what is computed so far, every 20 seconds, so that the same call goes on from there
            and ends with the same bits as one that was not interrupted.
        rank: of this process; all processes have the same arguments but this.
        world: number of processes that share the work.
        reduce: returns the sum of a tensor over the processes, such as
            ``snrweights.integrations.accelerate.SumOverProcesses``; called up to three times, at the ends of stages.
        progress: show it on a terminal, on stderr.

    Raises:
        FileNotFoundError: no data at the path.
        TypeError: data that are neither floating nor uint8, or no data.
        ValueError: sigmas that are not positive, fewer than 8 draws, a wrong shape; unknown ``small_noise``; a
            ``state`` of other data, levels, draws, seed, small_noise, processes or version; several processes without
            ``reduce``.

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
    if bool((levels.diff() == 0).any()):
        raise ValueError(f"`sigmas` must be different noise levels, got {sigmas}.")
    if draws < 8:
        raise ValueError(f"`draws` must be at least 8, got {draws}.")
    if chunk < 1:
        raise ValueError(f"`chunk` must be at least 1, got {chunk}.")
    if small_noise not in SMALL_NOISE:
        raise ValueError(f"Unknown `small_noise` {small_noise!r}; choose one of {list(SMALL_NOISE)}.")
    if not 0 <= rank < world:
        raise ValueError(f"`rank` must be in [0, world), got {rank} with `world` {world}.")
    if world > 1 and reduce is None:
        raise ValueError(f"`reduce` must sum over the {world} processes, got None.")
    folder, report = None if state is None else Path(state), Progress(progress)
    data, labels = _resolved(data, labels)
    tensor = as_tensor(data, workers=workers, folder=folder, report=report)
    reference = ReferenceSet(tensor, None if labels is None else torch.as_tensor(labels), flips, device, chunk)
    made = {**reference.provenance(), "draws": draws, "seed": seed, "version": __version__}
    exact = {name: value for name, value in made.items() if name not in ("variance", "second_moment")}  # of the data
    asked = {"chunk": chunk, "sigmas": levels.tolist(), "small_noise": small_noise}
    work = Work(folder, {**exact, **asked}, rank, world, reduce, report)

    stream = generator(seed, 0)
    positions = torch.randint(reference.size, (draws,), generator=stream).sort().values
    sources = reference.rows(positions)
    noise = torch.randn(draws, reference.dim, dtype=torch.float64, generator=stream).to(sources)
    inv = levels.flip(0).reciprocal().to(sources.device)  # increasing
    dense = torch.compile(dense_sums, dynamic=True) if compile else dense_sums
    axes = reference.near_principal_axes(_RANK, seed)
    sums, within = pair_sums(reference, positions, noise, inv, axes, work, dense)

    variances, turn = torch.linalg.eigh(within)
    by_control = controls(sources, noise, 1 / inv, reference.variance, axes @ turn, variances)
    values = regressed(sums.values(), by_control).flip(0).cpu()
    value, stderr = values.mean(1), values.std(1) / draws**0.5
    confused = sums.confused().flip(0).cpu()
    rare = confused < max(_LEAST, min(_ENOUGH[small_noise], draws // 2))
    if bool(rare.any()):
        bound = pair_bound(reference, levels[rare], work)
        if small_noise == "importance":
            value[rare], stderr[rare] = importance(reference, bound, draws, seed, work)
        else:
            value[rare], stderr[rare] = bound.value, 0.0
    how = tuple(small_noise if flag else "pairs" for flag in rare.tolist())
    return OptimalLossCurve(levels, value, stderr, how, confused, made)


def _resolved(data: Any, labels: Any) -> tuple[Any, Any]:
    """Return data and labels, of a path or a ``datasets`` data set what ``load_reference`` makes of it."""
    if isinstance(data, (str, os.PathLike)) or hasattr(data, "column_names"):
        from snrweights.integrations.reference_data import load_reference

        data, column = load_reference(data, labels=labels if isinstance(labels, str) else None)
        return data, column if isinstance(labels, str) else labels
    if isinstance(labels, str):
        raise ValueError(f"`labels` {labels!r} names a column, and `data` has none: {type(data).__name__}.")
    return data, labels
