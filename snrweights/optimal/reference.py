"""The reference set: data as rows, centred, by label and with mirror images, read in chunks without a copy of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from snrweights.seeds import generator

_POWER_ITERATIONS = 3


class ReferenceSet:
    """The points that a denoiser of the data would have to tell apart, as rows of ``dim`` numbers.

    A position in [0, size) is one point. Points of one label have neighbouring positions, a *group*; without labels
    there is one group. Rows are centred on the mean of their group, which changes no distance inside it.

    Args:
        data: (N, ...) floating, or uint8, which is read as u / 127.5 - 1.
        labels: (N,) integers, or None.
        flips: whether the mirror image of each point, data.flip(-1), is a point too.
        device: where the rows come to.
        chunk: rows at a time.

    Raises:
        TypeError: data of another dtype.
        ValueError: fewer than two points, labels of another shape, flips of data without width, values not finite.
    """

    def __init__(
        self, data: Tensor, labels: Tensor | None, flips: bool, device: torch.device | str, chunk: int
    ) -> None:
        if not (data.is_floating_point() or data.dtype == torch.uint8):
            raise TypeError(f"`data` must be floating or uint8, got {data.dtype}.")
        if data.ndim < 2 or len(data) < 2:
            raise ValueError(f"`data` must be (N, ...) with N >= 2, got {tuple(data.shape)}.")
        if flips and data.ndim != 4:
            raise ValueError(f"`flips` needs `data` (N, C, H, W), got {tuple(data.shape)}.")
        if labels is not None and labels.shape != (len(data),):
            raise ValueError(f"`labels` must be ({len(data)},), one per point, got {tuple(labels.shape)}.")
        self._data, self.flips, self.device, self.chunk = data, flips, torch.device(device), chunk
        self.dtype = torch.float64 if data.dtype == torch.float64 else torch.float32
        self.size, self.dim = len(data) * (1 + flips), data[0].numel()
        self._order: Tensor | None = None
        self.groups = [range(self.size)]
        if labels is not None:
            labels = labels.repeat(1 + flips).cpu()
            self._order = labels.argsort(stable=True)
            ends = labels.unique(return_counts=True)[1].cumsum(0).tolist()
            self.groups = [range(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        self._means = torch.zeros(len(self.groups), self.dim, dtype=torch.float64, device=self.device)
        for i, group in enumerate(self.groups):
            sums = [rows.sum(0, dtype=torch.float64) for _, rows in self.chunks(group)]  # not yet centred
            self._means[i] = torch.stack(sums).sum(0) / len(group)
        if not bool(self._means.isfinite().all()):
            raise ValueError("`data` holds values that are not finite.")
        squares = sum(float(rows.double().square().sum()) for group in self.groups for _, rows in self.chunks(group))
        self.variance: float = squares / self.size

    def chunks(self, group: range) -> Iterator[tuple[range, Tensor]]:
        """Yield (positions, rows) of a group, ``chunk`` at a time."""
        return self._in_chunks(group, self.rows)

    def chunks_of_points(self, group: range) -> Iterator[tuple[range, Tensor]]:
        """Yield (positions, points) of a group, ``chunk`` at a time."""
        return self._in_chunks(group, self.points)

    def _in_chunks(self, group: range, read: Callable[[Tensor], Tensor]) -> Iterator[tuple[range, Tensor]]:
        for start in range(group.start, group.stop, self.chunk):
            positions = range(start, min(start + self.chunk, group.stop))
            yield positions, read(torch.arange(positions.start, positions.stop))

    def rows(self, positions: Tensor) -> Tensor:
        """Return the centred rows (B, dim) at positions (B,)."""
        stored = self._stored(positions)
        rows = stored / 127.5 - 1 if stored.dtype == torch.uint8 else stored.to(self.dtype)
        return rows.sub_(self._means[self.group_of(positions)].to(self.dtype))

    def points(self, positions: Tensor) -> Tensor:
        """Return what distances are computed from (B, dim): uint8 as it is stored, for exact ones; else the rows."""
        return self._stored(positions) if self._data.dtype == torch.uint8 else self.rows(positions)

    def _stored(self, positions: Tensor) -> Tensor:
        """Return a copy of the data at positions (B,), flat (B, dim), in their own dtype."""
        index = positions if self._order is None else self._order[positions]
        mirrored = index >= len(self._data)
        images = self._data[(index % len(self._data)).to(self._data.device)].to(self.device)
        if self.flips:
            mirrored = mirrored.to(self.device)
            images[mirrored] = images[mirrored].flip(-1)
        return images.flatten(1)

    def group_of(self, positions: Tensor) -> Tensor:
        """Return the numbers of the groups that positions belong to."""
        return torch.bucketize(positions, torch.tensor([group.stop for group in self.groups]), right=True)

    def principal_axes(self, rank: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return orthonormal columns (dim, rank) near the principal axes, and the data's exact variance along each.

        Subspace iteration, so that the axes are those of the covariance only approximately beyond the first; nothing
        that is built on them depends on it, since the variances are those of the columns that are returned.
        """
        rank = min(rank, self.dim)
        axes = torch.randn(self.dim, rank, dtype=torch.float64, generator=generator(seed, 1)).to(self.device)
        for _ in range(_POWER_ITERATIONS):
            axes = torch.linalg.qr(self._covariance_times(torch.linalg.qr(axes)[0]))[0]
        within = axes.T @ self._covariance_times(axes)
        variances, turn = torch.linalg.eigh((within + within.T) / 2)
        return axes @ turn, variances

    def _covariance_times(self, axes: Tensor) -> Tensor:
        product = torch.zeros_like(axes)
        for group in self.groups:
            for _, rows in self.chunks(group):
                product += (rows.T @ (rows @ axes.to(self.dtype))).double()
        return product / self.size

    def provenance(self) -> dict[str, Any]:
        """Return what identifies the set: a SHA-256 of the data and labels, sizes and scale."""
        digest = hashlib.sha256(str((self._data.dtype, tuple(self._data.shape))).encode())
        for part in self._data.split(self.chunk):
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        if self._order is not None:
            digest.update(self._order.numpy().tobytes())
        return {
            "data": digest.hexdigest(),
            "points": self.size,
            "dim": self.dim,
            "variance": self.variance,
            "groups": len(self.groups),
            "flips": self.flips,
        }
