"""Where on the noise axis the loss is: moments of the per-sample loss in bins of log-SNR."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from snrweights.densities import Density
from snrweights.predictions import LIMIT, check_prediction_type, log_error_ratio
from snrweights.schedules import exact_dtype
from snrweights.statistics import LossStatistics
from snrweights.tracker_state import ROWS, check_state, not_a_file, read_state, write_state

_COUNT, _SUM, _SQUARES, _NONFINITE, _GRADIENTS, _GRADIENT_SQUARES = range(len(ROWS))
_MOST_SNAPSHOTS = 256

Reduce = Callable[[Tensor], Tensor]


class LossVarianceTracker:
    """Mean, variance and second moment of the **unweighted** per-sample loss over log-SNR, on the loss's device.

    ``update`` neither synchronises with the host nor allocates anything that stays. Each process counts its own
    batches until ``sync()``, the only collective, and a process may have made fewer updates than another by then.
    Sums are kept in float64, in the order of the updates and of the ``sync`` between them: a run that is saved goes
    on to the same bits as one that is resumed from there.

    Args:
        bins: number of bins.
        low: log-SNR of the lowest edge.
        high: log-SNR of the highest edge.
        edges: (bins + 1,) log-SNRs of all edges, in place of ``bins``, ``low``, ``high`` and ``density``.
        density: give bins of equal mass under this density in place of equal width.
        unit: the target in whose mean squared error losses are counted; those of other targets are converted
            exactly, and a negative one, which no mean squared error is, is counted with those that are not finite.
            None takes any finite loss as it is given.
        sigma_data: for the ``edm`` target.
        decay: factor on all moments at each update, so that old losses fade. A process without samples in a batch
            makes an update with none, ``torch.empty(0)``, where the others' fade: two processes are then exactly one.
        window: forget what is further back than this many updates, at most twice as many; with ``reduce`` at the next
            ``sync`` after them. Not with ``decay``.
        snapshot_every: keep the moments at every so many updates, for a heat map; with ``reduce`` those of all
            processes, from the next ``sync`` on, and of more than 256 between two of them the first 256.
        reduce: sums a tensor over the processes, called by ``sync`` on all of them; None on a single one.

    Raises:
        ValueError: no bins, an empty range, or a bad option.

    Example:
        >>> tracker = LossVarianceTracker(bins=2, low=-1, high=1)
        >>> tracker.update(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([-0.5, -0.5, 0.5]))
        >>> tracker.compute().mean
        tensor([2., 5.], dtype=torch.float64)
    """

    updates: int
    snapshots: list[tuple[int, Tensor]]
    _synced: int  # updates at the last sync
    _window_start: int  # and where the window began
    _total: Tensor  # of all processes, up to the last sync
    _pending: Tensor  # of this one since then
    _before: Tensor  # what will leave the window next
    _marks: list[Tensor]  # what was pending at the updates for which a snapshot is due

    def __init__(
        self,
        bins: int = 40,
        low: float = -16.0,
        high: float = 16.0,
        *,
        edges: Tensor | None = None,
        density: Density | None = None,
        unit: str | None = None,
        sigma_data: float | None = None,
        decay: float | None = None,
        window: int | None = None,
        snapshot_every: int | None = None,
        reduce: Reduce | None = None,
    ) -> None:
        if bins < 1:
            raise ValueError(f"`bins` must be >= 1, got {bins}.")
        if not low < high:
            raise ValueError(f"`low` must be below `high`, got {low} and {high}.")
        if decay is not None and not 0 < decay < 1:
            raise ValueError(f"`decay` must lie in (0, 1), got {decay}.")
        if decay is not None and window is not None:
            raise ValueError(f"Give `decay` or `window`, not both: got {decay} and {window}.")
        for name, value in (("window", window), ("snapshot_every", snapshot_every)):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be >= 1, got {value}.")
        self.edges = _edges(bins, low, high, density) if edges is None else check_edges(edges)
        self.unit = None if unit is None else check_prediction_type(unit)
        self.sigma_data = sigma_data
        self.decay, self.window, self.snapshot_every = decay, window, snapshot_every
        self.reduce = reduce
        self.reset()

    def __repr__(self) -> str:
        return f"LossVarianceTracker({_describe(self.edges)}, unit={self.unit!r})"

    @torch.inference_mode(False)  # whoever reads it in inference mode: it is counted into outside
    def _zeros(self) -> Tensor:
        return torch.zeros(len(ROWS), len(self.edges) - 1, dtype=self.edges.dtype, device=self.edges.device)

    @torch.no_grad()
    def update(
        self,
        loss: Tensor,
        log_snr: Tensor,
        *,
        prediction_type: str | None = None,
        gradient_square: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            loss: (B,) unweighted losses, one per sample: mean squared errors, if they are to be converted.
            log_snr: (B,) of the samples.
            prediction_type: the target of the loss, if that is not the tracker's unit.
            gradient_square: (B,) squared norms of the losses' gradients at the output.

        Raises:
            ValueError: the shapes are not all (B,), or a target is named where the tracker has no unit.
        """
        if loss.ndim != 1 or loss.shape != log_snr.shape:
            raise ValueError(
                f"`loss` and `log_snr` must both have shape (B,), got {tuple(loss.shape)} and {tuple(log_snr.shape)}."
            )
        if gradient_square is not None and gradient_square.shape != loss.shape:
            raise ValueError(
                f"`gradient_square` must have shape {tuple(loss.shape)}, got {tuple(gradient_square.shape)}."
            )
        if self.edges.device != loss.device:
            self._move(loss.device)
        loss, log_snr = loss.to(self.edges.dtype), log_snr.to(self.edges).contiguous()
        if prediction_type is not None:
            loss = loss * self._factor(prediction_type, log_snr)
        valid = loss.isfinite() & ~log_snr.isnan()
        if self.unit is not None:
            valid &= loss >= 0
        value = torch.where(valid, loss, 0.0)
        rows = [valid.to(value), value, value * value, (~valid).to(value)]
        if gradient_square is not None:
            known = gradient_square.isfinite() & (gradient_square >= 0) & ~log_snr.isnan()
            rows += [known.to(value), torch.where(known, gradient_square.to(value), 0.0)]
        if self.decay is not None:
            self._pending *= self.decay
        place = torch.bucketize(log_snr, self.edges[1:-1])
        self._pending[: len(rows)].index_add_(1, place, torch.stack(rows))
        self.updates += 1
        if self.window is not None and self.reduce is None and self.updates % self.window == 0:
            self.sync()
        if self.snapshot_every is not None and self.updates % self.snapshot_every == 0:
            if self.reduce is None:
                self._keep(self.updates, self._moments())
            elif len(self._marks) < _MOST_SNAPSHOTS:
                self._marks.append(self._pending.clone())

    @torch.inference_mode(False)
    def _move(self, device: torch.device) -> None:
        dtype = exact_dtype(device)
        self.edges = self.edges.to(device, dtype)
        self._total, self._pending, self._before = (
            moments.to(device, dtype) for moments in (self._total, self._pending, self._before)
        )
        self._marks = [moments.to(device, dtype) for moments in self._marks]
        self.snapshots = [(step, moments.to(device, dtype)) for step, moments in self.snapshots]

    def _factor(self, prediction_type: str, log_snr: Tensor) -> Tensor:
        if self.unit is None:
            raise ValueError(
                f"`prediction_type` {prediction_type!r} was given to a tracker without a unit; make it with `unit=`."
            )
        finite = log_snr.clamp(-LIMIT, LIMIT)
        to, of = (log_error_ratio(target, finite, self.sigma_data) for target in (self.unit, prediction_type))
        return (to - of).exp()

    def snapshot(self, step: int) -> None:
        """Keep the moments as they are now under a step: with ``reduce`` of all processes, a collective like ``sync``.

        Of more than 256 snapshots every second is dropped, but for the first and the last two.
        """
        if self.reduce is not None:
            self.sync()
        self._keep(step, self._moments())

    def _keep(self, step: int, moments: Tensor) -> None:
        self.snapshots.append((step, moments))
        if len(self.snapshots) > _MOST_SNAPSHOTS:
            del self.snapshots[1:-2:2]  # not the last two, between which `since` counts

    def _moments(self) -> Tensor:
        return self._before + self._faded(self.updates) + self._pending

    def _faded(self, updates: int) -> Tensor:
        """What all processes had seen at the last ``sync``, after so many updates."""
        return self._total if self.decay is None else self._total * self.decay ** (updates - self._synced)

    def sync(self) -> None:
        """Add what all processes have seen since the last time; a collective, to be called on every one of them.

        All have the same statistics, snapshots and ``updates`` afterwards: their mean number, rounded up.
        """
        pending, marks, updates = self._pending, self._marks, self.updates
        if self.reduce is not None:
            pending, marks, updates = self._summed(self.reduce)
        for step, moments in list(self._marked(marks, updates)):
            self._keep(step, moments)
        self._total = self._faded(updates) + pending
        self._pending, self._marks = self._zeros(), []
        self.updates = self._synced = updates
        if self.window is not None and updates - self._window_start >= self.window:
            self._before, self._total, self._window_start = self._total, self._zeros(), updates

    def _summed(self, reduce: Reduce) -> tuple[Tensor, list[Tensor], int]:
        """Sum over the processes, in one tensor that has the same shape on each of them whatever it has seen."""
        head = self._zeros()
        head[0, 0], head[1, 0] = self.updates - self._synced, 1
        slots = 0 if self.snapshot_every is None else _MOST_SNAPSHOTS
        # what a process has not come to: it has seen no more until then than it has now
        missing = [self._pending] * (slots - len(self._marks))
        head, pending, *marks = reduce(torch.stack([head, self._pending, *self._marks, *missing]))
        made, processes = head[:2, 0].tolist()
        return pending, marks, self._synced + math.ceil(made / processes)

    def _marked(self, marks: list[Tensor], updates: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the snapshots since the last ``sync`` up to so many updates, from what was pending at each."""
        every = self.snapshot_every or 1
        for step, mark in zip(range((self._synced // every + 1) * every, updates + 1, every), marks, strict=False):
            yield step, self._before + self._faded(step) + mark

    def compute(self, device: torch.device | str | None = "cpu") -> LossStatistics:
        """Return the statistics: of all processes up to the last ``sync``, and of this one since.

        Args:
            device: of what is returned; None: where the moments are, without waiting for it.
        """
        return self._statistics(self._moments(), device)

    def report(self) -> LossStatistics:
        """Return the statistics of all processes up to now: ``sync``, a collective, and ``compute``."""
        self.sync()
        return self.compute()

    def since(self, step: int) -> LossStatistics:
        """Return the statistics of what came after the last snapshot at or before ``step``, or of everything.

        Raises:
            ValueError: the tracker forgets, with ``decay`` or ``window``.
        """
        if self.decay is not None or self.window is not None:
            forgets = f"decay {self.decay} and window {self.window}"
            raise ValueError(f"`since` needs a tracker that forgets nothing, got {forgets}.")
        earlier = [moments for at, moments in self._all_snapshots() if at <= step]
        return self._statistics(self._moments() - earlier[-1] if earlier else self._moments())

    def history(self) -> list[tuple[int, LossStatistics]]:
        """Return the snapshots, as steps with statistics up to them: whose, is as for ``compute``."""
        return [(step, self._statistics(moments)) for step, moments in self._all_snapshots()]

    def _all_snapshots(self) -> list[tuple[int, Tensor]]:
        return [*self.snapshots, *self._marked(self._marks, self.updates)]

    def _statistics(self, moments: Tensor, device: torch.device | str | None = "cpu") -> LossStatistics:
        device = moments.device if device is None else torch.device(device)
        moments = moments.to(device, exact_dtype(device))
        count = moments[_COUNT]
        mean = moments[_SUM] / count
        variance = (moments[_SQUARES] / count - mean**2).clamp(min=0)
        fading = self.decay is not None
        return LossStatistics(
            edges=self.edges.to(moments),
            count=count if fading else count.long(),
            mean=mean,
            variance=variance,
            nonfinite=moments[_NONFINITE] if fading else moments[_NONFINITE].long(),
            gradient_square=moments[_GRADIENT_SQUARES] / moments[_GRADIENTS],
            unit=self.unit,
        )

    def reset(self) -> None:
        """Forget what was seen."""
        self._total, self._pending, self._before = (self._zeros() for _ in range(3))
        self.snapshots, self._marks = [], []
        self.updates = self._synced = self._window_start = 0

    def state_dict(self) -> dict[str, Tensor]:
        """Return edges, moments and snapshots up to the last ``sync``; on a single process: all."""
        if self.reduce is None:
            self.sync()
        state = {"edges": self.edges, "moments": self._total, "moments_before": self._before}
        state["updates"] = torch.tensor([self._synced, self._window_start])
        if self.snapshots:
            state["snapshot_steps"] = torch.tensor([step for step, _ in self.snapshots])
            state["snapshots"] = torch.stack([moments for _, moments in self.snapshots])
        return {name: value.detach().cpu().clone() for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a state, on every process.

        Raises:
            ValueError: the state is not one of a tracker, is damaged, or has other bins.
        """
        check_state(state)
        edges = self.edges.cpu()
        if not _same_edges(state["edges"], edges):
            raise ValueError(
                f"The state has other bins: {_describe(state['edges'])}; this tracker has {_describe(edges)}."
            )
        self.reset()
        names = ("moments", "moments_before")
        self._total, self._before = (state[name].to(self._total, copy=True) for name in names)
        self._synced, self._window_start = state["updates"].tolist()
        self.updates = self._synced
        if "snapshots" in state:
            steps, snapshots = state["snapshot_steps"].tolist(), state["snapshots"].to(self._total)
            self.snapshots = list(zip(steps, snapshots, strict=True))

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("unit", "sigma_data", "decay", "window", "snapshot_every")}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write state and options as safetensors, aside and then renamed, so that ``path`` is never half-written."""
        write_state(path, self.state_dict(), self._options())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LossVarianceTracker:
        """Read a tracker from a file that ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a tracker's file, or damaged.
        """
        state, options = read_state(path)
        try:
            return cls._of(state, options)
        except (TypeError, ValueError) as error:  # options that this version does not know, or that are damaged
            raise not_a_file(path, error) from None

    @classmethod
    def merge(cls, trackers: Sequence[LossVarianceTracker]) -> LossVarianceTracker:
        """Return one tracker of what several have seen, as of the processes of a run that saved one each.

        Each counts as ``state_dict`` has it. Snapshots are kept at the steps that all have.

        Raises:
            ValueError: there are none, or they have not the same bins and options.

        Example:
            >>> trackers = [LossVarianceTracker(bins=1), LossVarianceTracker(bins=1)]
            >>> for tracker in trackers:
            ...     tracker.update(torch.ones(3), torch.zeros(3))
            >>> LossVarianceTracker.merge(trackers).compute().count
            tensor([6])
        """
        if not trackers:
            raise ValueError("`trackers` is empty.")
        first, states = trackers[0], [tracker.state_dict() for tracker in trackers]
        for tracker, state in zip(trackers, states, strict=True):
            if not _same_edges(state["edges"], states[0]["edges"]) or tracker._options() != first._options():
                raise ValueError(
                    f"Only trackers with the same bins and options can be merged, got {first} with {first._options()} "
                    f"and {tracker} with {tracker._options()}."
                )
        merged = {"edges": states[0]["edges"]}
        merged["updates"] = torch.stack([state["updates"] for state in states]).amax(0)
        for name in ("moments", "moments_before"):
            merged[name] = torch.stack([state[name] for state in states]).sum(0)
        snapshots = [dict(tracker.snapshots) for tracker in trackers]
        steps = [step for step in snapshots[0] if all(step in others for others in snapshots)]
        if steps:
            merged["snapshot_steps"] = torch.tensor(steps)
            merged["snapshots"] = torch.stack(
                [torch.stack([others[step].cpu() for others in snapshots]).sum(0) for step in steps]
            )
        return cls._of(merged, first._options())

    @classmethod
    def _of(cls, state: dict[str, Tensor], options: dict[str, Any]) -> LossVarianceTracker:
        tracker = cls(edges=state["edges"], **options)
        tracker.load_state_dict(state)
        return tracker


def check_edges(edges: Tensor) -> Tensor:
    """Return ``edges`` (bins + 1,) in float64, or raise a ValueError where they do not rise."""
    if edges.ndim != 1 or len(edges) < 2 or not bool((edges.diff() > 0).all()):
        raise ValueError(f"`edges` must be (bins + 1,) and rise, got {edges.tolist()}.")
    return edges.to(exact_dtype(edges.device))


def _edges(bins: int, low: float, high: float, density: Density | None) -> Tensor:
    if density is None:
        return torch.linspace(low, high, bins + 1, dtype=torch.float64)
    u = torch.arange(1, bins, dtype=torch.float64) / bins
    inner = density.icdf(u)
    edges = torch.cat((torch.tensor([low], dtype=torch.float64), inner, torch.tensor([high], dtype=torch.float64)))
    if not bool((edges.diff() > 0).all()):
        raise ValueError(f"{bins} bins of equal mass under {density} do not fit between {low} and {high}.")
    return edges


def _same_edges(these: Tensor, others: Tensor) -> bool:
    dtype = torch.float32 if torch.float32 in (these.dtype, others.dtype) else torch.float64
    return torch.equal(these.to(dtype), others.to(dtype))


def _describe(edges: Tensor) -> str:
    text, widths = f"{len(edges) - 1} bins from {edges[0]:g} to {edges[-1]:g}", edges.diff()
    equal = torch.allclose(widths, widths[0], rtol=1e-3)
    return text if equal else f"{text}, of unequal widths with the middle edge at {edges[len(edges) // 2]:.4g}"
