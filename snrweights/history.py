"""The last few losses of every noise level."""

from __future__ import annotations

import torch
from torch import Tensor

from snrweights.schedules import exact_dtype
from snrweights.statistics import LossStatistics
from snrweights.tracking import Reduce, check_edges


class LossHistory:
    """The last ``length`` losses in each bin of log-SNR; counts nothing of a bin until it has as many.

    With ``reduce`` each process keeps its own last losses, and ``sync`` adds their moments.

    Args:
        edges: (bins + 1,) log-SNR; the outermost bins also hold what lies beyond.
        length: losses kept per bin.
        reduce: sums a tensor over the processes, called by ``sync`` on all of them.

    Raises:
        ValueError: edges that do not rise, or a length below 1.

    Source: Nichol & Dhariwal 2021 (arXiv 2102.09672), section 3.3.

    Example:
        >>> history = LossHistory(torch.tensor([-9.0, 0.0, 9.0]), length=2)
        >>> history.update(torch.tensor([1.0, 2.0, 3.0, 4.0, 4.0]), torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0]))
        >>> history.sync()
        >>> history.compute().mean
        tensor([2.5000, 4.0000], dtype=torch.float64)
    """

    @torch.inference_mode(False)  # whoever makes or moves it in inference mode: it is written into outside
    def __init__(self, edges: Tensor, length: int = 10, *, reduce: Reduce | None = None) -> None:
        if length < 1:
            raise ValueError(f"`length` must be >= 1, got {length}.")
        self.edges = check_edges(edges)
        self.length = length
        self.reduce = reduce
        bins = len(edges) - 1
        # one more bin takes what does not count
        self._losses = torch.zeros(bins + 1, length, dtype=self.edges.dtype, device=edges.device)
        self._seen = torch.zeros(bins + 1, dtype=torch.int64, device=edges.device)
        self._moments = torch.zeros(6, bins, dtype=self.edges.dtype, device=edges.device)

    @torch.no_grad()
    def update(self, loss: Tensor, log_snr: Tensor, *, gradient_square: Tensor | None = None) -> None:
        """Add a batch of losses (B,) at ``log_snr`` (B,); of more than ``length`` in a bin the last ones stay."""
        del gradient_square
        if loss.ndim != 1 or loss.shape != log_snr.shape:
            raise ValueError(
                f"`loss` and `log_snr` must both have shape (B,), got {tuple(loss.shape)} and {tuple(log_snr.shape)}."
            )
        self._move(loss.device)
        bins, length = len(self.edges) - 1, self.length
        valid = loss.isfinite() & ~log_snr.isnan()
        place = torch.bucketize(log_snr.to(self.edges).contiguous(), self.edges[1:-1])
        place, order = torch.where(valid, place, bins).sort(stable=True)
        first, after = torch.searchsorted(place, place), torch.searchsorted(place, place, right=True)
        rank = torch.arange(len(place), device=place.device) - first
        slot = (self._seen.index_select(0, place) + rank) % length
        stays = rank >= after - first - length
        self._losses[torch.where(stays, place, bins), slot] = loss.to(self.edges)[order]
        self._seen.index_add_(0, place, torch.ones_like(place))

    @torch.inference_mode(False)
    def _move(self, device: torch.device) -> None:
        if self.edges.device != device:
            dtype = exact_dtype(device)
            self.edges, self._losses, self._moments = (
                x.to(device, dtype) for x in (self.edges, self._losses, self._moments)
            )
            self._seen = self._seen.to(device)

    def sync(self) -> None:
        """Take the moments of what is kept, summed over all processes; a collective."""
        kept, seen = self._losses[:-1], self._seen[:-1]  # zeros where there is no loss yet
        full, process = seen >= self.length, torch.ones_like(seen)
        bad = torch.zeros_like(seen)
        bad[0] = self._seen[-1]
        rows = (seen.clamp(max=self.length), kept.sum(1), kept.square().sum(1), full, process, bad)
        moments = torch.stack([row.to(kept) for row in rows])
        self._moments = moments if self.reduce is None else self.reduce(moments)

    def compute(self, device: torch.device | str | None = "cpu") -> LossStatistics:
        """Return the statistics as of the last ``sync``; losses that were not finite are all in the first bin."""
        device = self._moments.device if device is None else torch.device(device)
        count, total, squares, full, processes, bad = self._moments.to(device, exact_dtype(device))
        count = torch.where((full == processes) & (processes > 0), count, 0.0)
        mean = total / count
        return LossStatistics(
            edges=self.edges.to(count),
            count=count.long(),
            mean=mean,
            variance=(squares / count - mean**2).clamp(min=0),
            nonfinite=bad.long(),
            gradient_square=torch.full_like(mean, torch.nan),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Return what this process keeps, and the moments of all."""
        state = {"edges": self.edges, "losses": self._losses, "seen": self._seen, "moments": self._moments}
        return {name: value.detach().cpu().clone() for name, value in state.items()}

    @torch.inference_mode(False)
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a state.

        Raises:
            ValueError: it is damaged, or of other bins or another length.
        """
        own = self.state_dict()
        if set(state) != set(own):
            raise ValueError(f"Not the state of a LossHistory: it has {sorted(state)}, not {sorted(own)}.")
        for name, value in own.items():
            kept = state[name]
            if (
                kept.shape != value.shape
                or not bool(kept.isfinite().all())
                or (name == "seen" and bool((kept < 0).any()))
            ):
                raise ValueError(
                    f"The state of the LossHistory is damaged or another's: {name!r} has shape {tuple(kept.shape)}, "
                    f"not {tuple(value.shape)}, or values that are not finite, or counts below 0."
                )
        if not torch.equal(state["edges"].to(own["edges"]), own["edges"]):
            raise ValueError(f"The state has other bins: {state['edges'].tolist()}; this one {own['edges'].tolist()}.")
        self._losses = state["losses"].to(self._losses, copy=True)
        self._moments = state["moments"].to(self._moments)
        self._seen = state["seen"].to(self._seen, copy=True)
