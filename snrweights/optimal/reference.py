"""The reference set: data as rows, centred, by label and with mirror images, read in chunks without a copy of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from snrweights.seeds import generator

_POWER_ITERATIONS = 3
_POINTS_FOR_AXES = 1024


class ReferenceSet:
    """The points that a denoiser of the data would have to tell apart, as rows of ``dim`` numbers.

    A position in [0, size) is one point. Points of one label have neighbouring positions, a *group*; without labels
    there is one group. Rows are centred on the mean of their group, which changes no distance inside it. Making the set
    reads the data once, in their own order: for the means, the variance and the fingerprint.

    Args:
        data: (N, ...) floating, or uint8, which is read as u / 127.5 - 1.
        labels: (N,) integers, or None.
        flips: whether the mirror image of each point, data.flip(-1), is a point too.
        device: where the rows come to.
        chunk: rows at a time.

    Attributes:
        size: number of points.
        dim: numbers of a point.
        groups: of positions.
        variance: mean of ||row||².
        second_moment: mean of ||x||², of the points as they are, not centred.
        dtype: of the rows.

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
        if labels is not None and labels.is_floating_point():
            raise TypeError(f"`labels` must be integers, got {labels.dtype}.")
        self._data, self.flips, self.device, self.chunk = data.detach(), flips, torch.device(device), chunk
        self.dtype = torch.float64 if data.dtype == torch.float64 else torch.float32
        self.size, self.dim = len(data) * (1 + flips), data[0].numel()
        self._order: Tensor | None = None
        self.groups = [range(self.size)]
        own = torch.zeros(len(data), dtype=torch.int64)
        if labels is not None:
            own = labels.cpu().unique(return_inverse=True)[1]
            self._order = own.repeat(1 + flips).argsort(stable=True)
            ends = (own.bincount() * (1 + flips)).cumsum(0).tolist()
            self.groups = [range(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        self._measure(own)

    def _measure(self, own: Tensor) -> None:
        """Read the data once: means of the groups (points belong to ``own``, (N,)), variance, fingerprint.

        Sums of x - shift and (x - shift)², of bytes exact whatever the chunks; ||x - mean||² follows from them.
        """
        bytes_ = self._data.dtype == torch.uint8
        shift = torch.full((1, self.dim), 128.0).double() if bytes_ else self._data[:1].double().flatten(1).cpu()
        shift = self._with_mirror_image(shift)
        sums = torch.zeros(len(self.groups), self.dim, dtype=torch.float64)
        squares = torch.zeros((), dtype=torch.float64)
        digest = hashlib.sha256(str((self._data.dtype, tuple(self._data.shape))).encode())
        for part, numbers in zip(self._data.split(self.chunk), own.split(self.chunk), strict=True):
            part = part.cpu().contiguous()
            digest.update(part.view(torch.uint8).numpy().data)
            rows = part.flatten(1).double() - shift
            sums.index_add_(0, numbers, rows)
            squares += rows.square().sum()
        if self._order is not None:
            digest.update(own.numpy().data)
        count = own.bincount()[:, None]
        mean = self._with_mirror_image(sums / count)
        squares = squares - 2 * (mean * sums).sum() + (count * mean.square()).sum()
        if not bool(squares.isfinite()):
            raise ValueError("`data` holds values that are not finite.")
        if not float(squares) > 0:
            raise ValueError("`data` holds points that are all equal: there is nothing to tell apart.")
        self._fingerprint = digest.hexdigest()
        scale = 127.5 if bytes_ else 1.0
        self.variance: float = float(squares) / len(own) / scale**2
        means = (mean + shift) / scale - (1.0 if bytes_ else 0.0)
        self.second_moment: float = self.variance + float((count / len(own) * means.square()).sum())
        self._means = means.to(self.device)

    def _with_mirror_image(self, rows: Tensor) -> Tensor:
        """Return the mean of rows and their mirror images, if those are points too."""
        if not self.flips:
            return rows
        images = rows.unflatten(1, self._data.shape[1:])
        return ((images + images.flip(-1)) / 2).flatten(1)

    def chunks(self, group: range | None = None) -> Iterator[tuple[int, range]]:
        """Yield (number of the group, positions), ``chunk`` positions at a time, of a part of one group or of all."""
        for number, whole in enumerate(self.groups) if group is None else [(self._number(group), group)]:
            for start in range(whole.start, whole.stop, self.chunk):
                yield number, range(start, min(start + self.chunk, whole.stop))

    def _number(self, group: range) -> int:
        return int(self.group_of(torch.tensor([group.start])))

    def points(self, positions: range | Tensor) -> Tensor:
        """Return what distances are computed from (B, dim): uint8 as it is stored, for exact ones; else the rows."""
        return self._stored(positions) if self._data.dtype == torch.uint8 else self.rows(positions)

    def _stored(self, positions: range | Tensor) -> Tensor:
        """Return a copy of the data at positions (B,), flat (B, dim), in their own dtype."""
        positions = torch.arange(positions.start, positions.stop) if isinstance(positions, range) else positions
        index = self._numbers(positions)
        images = self._data[(index % len(self._data)).to(self._data.device)].to(self.device)
        if self.flips:
            mirrored = (index >= len(self._data)).to(self.device)
            images[mirrored] = images[mirrored].flip(-1)
        return images.flatten(1)

    def _numbers(self, positions: Tensor) -> Tensor:
        """Return where positions (B,) are in the data, mirror images coming after all of them."""
        return positions if self._order is None else self._order[positions]

    def numbers(self, positions: Tensor) -> Tensor:
        """Return which of the data (B,) the points at positions (B,) are, or are mirror images of."""
        return self._numbers(positions) % len(self._data)

    def images(self, positions: Tensor) -> Tensor:
        """Return the points (B, ...) at positions (B,) as a model sees them, floating, not centred."""
        stored = self._stored(positions).unflatten(1, self._data.shape[1:])
        return stored / 127.5 - 1 if stored.dtype == torch.uint8 else stored.to(self.dtype)

    def rows(self, positions: range | Tensor) -> Tensor:
        """Return the centred rows (B, dim) at positions (B,)."""
        return self._centred(self._stored(positions), positions)

    def rows_of(self, points: Tensor, positions: range | Tensor) -> Tensor:
        """Return the centred rows of what ``points`` returned for the positions."""
        return self._centred(points, positions) if points.dtype == torch.uint8 else points

    def _centred(self, stored: Tensor, positions: range | Tensor) -> Tensor:
        rows = stored / 127.5 - 1 if stored.dtype == torch.uint8 else stored.to(self.dtype)
        inside = torch.tensor([positions.start]) if isinstance(positions, range) else positions  # a range: one group
        return rows.sub_(self._means[self.group_of(inside)].to(self.dtype))

    def group_of(self, positions: Tensor) -> Tensor:
        """Return the numbers of the groups that positions belong to."""
        return torch.bucketize(positions, torch.tensor([group.stop for group in self.groups]), right=True)

    def near_principal_axes(self, rank: int, seed: int) -> Tensor:
        """Return orthonormal columns (dim, rank), float64, near the principal axes of some 1024 of the points.

        Nothing that is built on them depends on how near they are, if it takes the data's own variance along them.
        """
        stream = generator(seed, 1)
        axes = torch.randn(self.dim, min(rank, self.dim), dtype=torch.float64, generator=stream).to(self.device)
        some = torch.randint(self.size, (_POINTS_FOR_AXES,), generator=stream).sort().values
        some = some if self.size > _POINTS_FOR_AXES else torch.arange(self.size)
        rows = torch.cat([self.rows(part) for part in some.split(self.chunk)])
        for _ in range(_POWER_ITERATIONS):
            axes = torch.linalg.qr((rows.T @ (rows @ torch.linalg.qr(axes)[0].to(rows))).double())[0]
        return axes

    def provenance(self) -> dict[str, Any]:
        """Return what identifies the set: a SHA-256 of the data and labels, sizes and scale."""
        return {
            "data": self._fingerprint,
            "points": self.size,
            "dim": self.dim,
            "variance": self.variance,
            "second_moment": self.second_moment,
            "groups": len(self.groups),
            "flips": self.flips,
            "scale": "u / 127.5 - 1" if self._data.dtype == torch.uint8 else "as given",
        }
