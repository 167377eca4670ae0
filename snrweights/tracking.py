"""Where on the noise axis the loss is: moments of the per-sample loss in bins of log-SNR."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from snrweights.schedules import exact_dtype

_COUNT, _SUM, _SQUARES, _NONFINITE = range(4)


@dataclass(frozen=True)
class LossStatistics:
    """The loss per log-SNR bin; NaN where a bin is empty.

    Attributes:
        edges: (bins + 1,) log-SNR; the outermost bins also hold what lies beyond, infinities included.
        count: (bins,) finite losses seen.
        mean: (bins,) their mean.
        variance: (bins,) their variance, divided by the count.
        nonfinite: (bins,) losses that were NaN or infinite: counted, not averaged in.
    """

    edges: Tensor
    count: Tensor
    mean: Tensor
    variance: Tensor
    nonfinite: Tensor


class LossVarianceTracker:
    """Mean and variance of the **unweighted** per-sample loss over log-SNR, in float64, on the loss's device.

    ``update`` neither synchronises with the host nor allocates anything that stays.

    Args:
        bins: number of bins of equal width.
        low: log-SNR of the lowest edge.
        high: log-SNR of the highest edge.

    Raises:
        ValueError: no bins, or an empty range.

    Example:
        >>> tracker = LossVarianceTracker(bins=2, low=-1, high=1)
        >>> tracker.update(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([-0.5, -0.5, 0.5]))
        >>> tracker.compute().mean
        tensor([2., 5.], dtype=torch.float64)
    """

    def __init__(self, bins: int = 40, low: float = -16.0, high: float = 16.0) -> None:
        if bins < 1:
            raise ValueError(f"`bins` must be >= 1, got {bins}.")
        if not low < high:
            raise ValueError(f"`low` must be below `high`, got {low} and {high}.")
        self.edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
        self._moments = torch.zeros(4, bins, dtype=torch.float64)

    def __repr__(self) -> str:
        return f"LossVarianceTracker(bins={len(self.edges) - 1}, low={self.edges[0]:g}, high={self.edges[-1]:g})"

    @torch.no_grad()
    def update(self, loss: Tensor, log_snr: Tensor) -> None:
        """Add a batch.

        Args:
            loss: (B,) unweighted losses, one per sample.
            log_snr: (B,) of the samples.

        Raises:
            ValueError: the shapes are not both (B,).
        """
        if loss.ndim != 1 or loss.shape != log_snr.shape:
            raise ValueError(
                f"`loss` and `log_snr` must both have shape (B,), got {tuple(loss.shape)} and {tuple(log_snr.shape)}."
            )
        if self._moments.device != loss.device:
            self._moments = self._moments.to(loss.device, exact_dtype(loss.device))
            self.edges = self.edges.to(loss.device, exact_dtype(loss.device))
        loss, log_snr = loss.to(self.edges.dtype), log_snr.to(self.edges)
        valid = loss.isfinite() & ~log_snr.isnan()
        value = torch.where(valid, loss, 0.0)
        batch = torch.stack((valid.to(value), value, value * value, (~valid).to(value)))
        self._moments.index_add_(1, torch.bucketize(log_snr, self.edges[1:-1]), batch)

    def compute(self) -> LossStatistics:
        """Return the statistics so far, on the CPU."""
        moments = self._moments.to("cpu", torch.float64)
        count = moments[_COUNT]
        mean = moments[_SUM] / count
        variance = (moments[_SQUARES] / count - mean**2).clamp(min=0)
        edges = self.edges.to("cpu", torch.float64)
        return LossStatistics(edges, count.long(), mean, variance, moments[_NONFINITE].long())

    def reset(self) -> None:
        """Forget what was seen."""
        self._moments.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """Return edges and moment sums."""
        return {"edges": self.edges.cpu().clone(), "moments": self._moments.cpu().clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a state.

        Raises:
            ValueError: the state is not one of a tracker, or has other bins.
        """
        if set(state) != {"edges", "moments"} or state["moments"].shape != (4, len(state["edges"]) - 1):
            raise ValueError(f"Not the state of a LossVarianceTracker: it has {sorted(state)}.")
        edges = self.edges.cpu()
        if not torch.equal(state["edges"].to(edges), edges):
            raise ValueError(f"The state has other bins: {_describe(state['edges'])}, this tracker {_describe(edges)}.")
        self._moments = state["moments"].to(self._moments)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state as safetensors, aside and then renamed, so that ``path`` is never half-written."""
        path = Path(path)
        aside = path.with_name(path.name + ".tmp")
        save_file(self.state_dict(), aside)
        os.replace(aside, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LossVarianceTracker:
        """Read a tracker from a file that ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a tracker's file.
        """
        try:
            state = load_file(path)
            tracker = cls()
            tracker.edges = state["edges"]
            tracker._moments = torch.zeros(4, len(state["edges"]) - 1, dtype=torch.float64)
            tracker.load_state_dict(state)
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"`path` {os.fspath(path)!r} is not a tracker's file: {error}.") from None
        return tracker


def _describe(edges: Tensor) -> str:
    return f"{len(edges) - 1} from {edges[0]:g} to {edges[-1]:g}"
