"""What a tracker saw, per bin of log-SNR: moments, both terms of the total variance, tables."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

COLUMNS = ("low", "high", "count", "mean", "variance", "second_moment", "gradient_square", "nonfinite")


@dataclass(frozen=True)
class LossStatistics:
    """The loss per log-SNR bin; NaN where a bin is empty.

    Attributes:
        edges: (bins + 1,) log-SNR; the outermost bins also hold what lies beyond, infinities included.
        count: (bins,) losses seen; with decay, the sum of what is left of them.
        mean: (bins,) their mean.
        variance: (bins,) their variance, divided by the count.
        nonfinite: (bins,) losses that were NaN or infinite, or negative in a unit: counted, not averaged in.
        gradient_square: (bins,) mean squared norm of the loss's gradient at the output; NaN where it was not given.
        unit: the target whose mean squared error the loss is; None if it is as it was given.
    """

    edges: Tensor
    count: Tensor
    mean: Tensor
    variance: Tensor
    nonfinite: Tensor
    gradient_square: Tensor
    unit: str | None = None

    @property
    def second_moment(self) -> Tensor:
        """E[L²] per bin."""
        return self.variance + self.mean**2

    def total_variance(self) -> tuple[float, float]:
        """Return both terms of Var[L] = E[Var[L | bin]] + Var[E[L | bin]]; NaN where no losses were seen.

        Example:
            >>> import torch
            >>> from snrweights import LossVarianceTracker
            >>> tracker = LossVarianceTracker(bins=2, low=-1, high=1)
            >>> tracker.update(torch.tensor([1.0, 3.0, 6.0]), torch.tensor([-0.5, -0.5, 0.5]))
            >>> within, between = tracker.compute().total_variance()
            >>> round(within, 6), round(between, 6)
            (0.666667, 3.555556)
        """
        seen = self.count > 0
        if not bool(seen.any()):
            return math.nan, math.nan
        share = self.count[seen].double() / self.count[seen].sum()
        mean = self.mean[seen]
        within = (share * self.variance[seen]).sum()
        between = (share * (mean - (share * mean).sum()) ** 2).sum()
        return float(within), float(between)

    @property
    def centres(self) -> Tensor:
        """(bins,) log-SNR in the middle of each bin."""
        return (self.edges[1:] + self.edges[:-1]) / 2

    def times(self, weight: Tensor) -> LossStatistics:
        """Return the statistics of the loss times a weight (bins,) that is constant within each bin.

        Example:
            >>> from snrweights import LossVarianceTracker
            >>> tracker = LossVarianceTracker(bins=1)
            >>> tracker.update(torch.tensor([1.0, 3.0]), torch.zeros(2))
            >>> doubled = tracker.compute().times(torch.tensor([2.0]))
            >>> doubled.mean.item(), doubled.variance.item()
            (4.0, 4.0)
        """
        square = weight**2
        return replace(
            self,
            mean=weight * self.mean,
            variance=square * self.variance,
            gradient_square=square * self.gradient_square,
        )

    def rows(self) -> list[dict[str, Any]]:
        """Return one dictionary a bin, with the names in ``COLUMNS``; None for NaN."""
        columns: dict[str, list[float]] = {"low": self.edges[:-1].tolist(), "high": self.edges[1:].tolist()}
        columns |= {name: getattr(self, name).tolist() for name in COLUMNS[2:]}
        clean = {name: [None if math.isnan(v) else v for v in values] for name, values in columns.items()}
        return [dict(zip(COLUMNS, row, strict=True)) for row in zip(*(clean[name] for name in COLUMNS), strict=True)]

    def as_dict(self) -> dict[str, Any]:
        """Return bins, unit and both terms of the variance as plain values, for JSON; None for NaN."""
        within, between = (None if math.isnan(term) else term for term in self.total_variance())
        return {"unit": self.unit, "variance_within": within, "variance_between": between, "bins": self.rows()}

    def to_json(self) -> str:
        """Return ``as_dict`` as JSON."""
        return json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n"

    def to_csv(self) -> str:
        """Return the bins as comma-separated values with a head."""
        file = io.StringIO()
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows())
        return file.getvalue()

    def __str__(self) -> str:
        """The bins that are not empty as an aligned table, and the terms of the variance."""
        shown = ("count", "mean", "variance")
        head = f"{'log-SNR':>16}" + "".join(f"{name:>12}" for name in shown)
        lines = [
            f"{row['low']:7.2f} to{row['high']:6.2f}" + "".join(f"{row[name]:12.5g}" for name in shown)
            for row in self.rows()
            if row["count"]
        ]
        bad = int(self.nonfinite.sum())
        last = [f"{bad} losses were not finite{'' if self.unit is None else ', or negative'}"] if bad else []
        if not lines:
            return "\n".join(["no losses seen", *last])
        within, between = self.total_variance()
        total = within + between
        share = f" ({100 * between / total:.0f} % of it between noise levels)" if total > 0 else ""
        return "\n".join([head, *lines, f"variance {total:.5g}{share}", *last])

    def scalars(self, prefix: str = "loss_by_noise") -> dict[str, float]:
        """Return numbers for a logger: mean and standard deviation per bin that is not empty, and the variances.

        Example:
            >>> import torch
            >>> from snrweights import LossVarianceTracker
            >>> tracker = LossVarianceTracker(bins=1, low=-1, high=1)
            >>> tracker.update(torch.ones(2), torch.zeros(2))
            >>> tracker.compute().scalars()["loss_by_noise/mean_at_0.0"]
            1.0
        """
        values: dict[str, float] = {}
        centres = self.centres.tolist()
        digits = next((d for d in range(1, 17) if len({f"{at:.{d}f}" for at in centres}) == len(centres)), 17)
        for centre, row in zip(centres, self.rows(), strict=True):
            if row["count"]:
                values[f"{prefix}/mean_at_{centre:.{digits}f}"] = row["mean"]
                values[f"{prefix}/std_at_{centre:.{digits}f}"] = math.sqrt(row["variance"])
        if values:
            values[f"{prefix}/variance_within"], values[f"{prefix}/variance_between"] = self.total_variance()
        return values


def mean_between(history: Sequence[tuple[int, LossStatistics]]) -> Tensor:
    """Return the mean loss per bin between each snapshot and the one before, (bins, snapshots - 1); NaN where none was.

    Args:
        history: at least two snapshots of a tracker, ``tracker.history()``.

    Raises:
        ValueError: fewer than two snapshots.

    Example:
        >>> from snrweights import LossVarianceTracker
        >>> tracker = LossVarianceTracker(bins=1, snapshot_every=1)
        >>> for loss in (2.0, 1.0, 0.5):
        ...     tracker.update(torch.tensor([loss]), torch.zeros(1))
        >>> mean_between(tracker.history())
        tensor([[1.0000, 0.5000]], dtype=torch.float64)
    """
    if len(history) < 2:
        raise ValueError(f"A heat map needs two snapshots at least, got {len(history)}: track with `snapshot_every=`.")
    counts = torch.stack([statistics.count.double() for _, statistics in history], 1)
    sums = torch.stack([torch.where(s.count > 0, s.mean * s.count, 0.0) for _, s in history], 1)
    count = counts.diff(dim=1)
    return torch.where(count > 0, sums.diff(dim=1) / count, torch.nan)
