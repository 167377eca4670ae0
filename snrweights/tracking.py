"""Where on the noise axis the loss is: moments of the per-sample loss in bins of log-SNR."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from snrweights.densities import Density
from snrweights.predictions import LIMIT, check_prediction_type, log_error_ratio
from snrweights.schedules import exact_dtype
from snrweights.statistics import LossStatistics

_ROWS = ("count", "sum", "squares", "nonfinite", "gradients", "gradient_squares")
_COUNT, _SUM, _SQUARES, _NONFINITE, _GRADIENTS, _GRADIENT_SQUARES = range(len(_ROWS))
_MOST_SNAPSHOTS = 256

Reduce = Callable[[Tensor], Tensor]


class LossVarianceTracker:
    """Mean, variance and second moment of the **unweighted** per-sample loss over log-SNR, on the loss's device.

    ``update`` neither synchronises with the host nor allocates anything that stays. Each process counts its own
    batches until ``sync()``, the only collective.

    Args:
        bins: number of bins.
        low: log-SNR of the lowest edge.
        high: log-SNR of the highest edge.
        edges: (bins + 1,) log-SNRs of all edges, in place of ``bins``, ``low``, ``high`` and ``density``.
        density: give bins of equal mass under this density in place of equal width.
        unit: the target in whose mean squared error losses are counted; those of other targets are converted
            exactly. None counts them as they are given.
        sigma_data: for the ``edm`` target.
        decay: factor on all moments at each update, so that old losses fade.
        window: forget what is further back than this many updates, at most twice as many; with ``reduce`` at the next
            ``sync`` after them. Not with ``decay``.
        snapshot_every: keep the moments at every so many updates, for a heat map.
        reduce: sums a tensor over the processes, called by ``sync`` on all of them; None on a single one.

    Raises:
        ValueError: no bins, an empty range, or a bad option.

    Example:
        >>> tracker = LossVarianceTracker(bins=2, low=-1, high=1)
        >>> tracker.update(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([-0.5, -0.5, 0.5]))
        >>> tracker.compute().mean
        tensor([2., 5.], dtype=torch.float64)
    """

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
        self.updates = self._window_start = 0
        self.snapshots: list[tuple[int, Tensor]] = []
        self._total, self._pending, self._before = (self._zeros() for _ in range(3))

    def __repr__(self) -> str:
        return f"LossVarianceTracker({_describe(self.edges)}, unit={self.unit!r})"

    def _zeros(self) -> Tensor:
        return torch.zeros(len(_ROWS), len(self.edges) - 1, dtype=self.edges.dtype, device=self.edges.device)

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
        value = torch.where(valid, loss, 0.0)
        rows = [valid.to(value), value, value * value, (~valid).to(value)]
        if gradient_square is not None:
            known = gradient_square.isfinite() & ~log_snr.isnan()
            rows += [known.to(value), torch.where(known, gradient_square.to(value), 0.0)]
        if self.decay is not None:
            self._total *= self.decay
            self._pending *= self.decay
        place = torch.bucketize(log_snr, self.edges[1:-1])
        self._pending[: len(rows)].index_add_(1, place, torch.stack(rows))
        self.updates += 1
        if self.window is not None and self.reduce is None and self.updates % self.window == 0:
            self.sync()
        if self.snapshot_every is not None and self.updates % self.snapshot_every == 0:
            self.snapshot(self.updates)

    def _move(self, device: torch.device) -> None:
        dtype = exact_dtype(device)
        self.edges = self.edges.to(device, dtype)
        self._total, self._pending, self._before = (
            moments.to(device, dtype) for moments in (self._total, self._pending, self._before)
        )

    def _factor(self, prediction_type: str, log_snr: Tensor) -> Tensor:
        if self.unit is None:
            raise ValueError(
                f"`prediction_type` {prediction_type!r} was given to a tracker without a unit; make it with `unit=`."
            )
        finite = log_snr.clamp(-LIMIT, LIMIT)
        to, of = (log_error_ratio(target, finite, self.sigma_data) for target in (self.unit, prediction_type))
        return (to - of).exp()

    def snapshot(self, step: int) -> None:
        """Keep this process's moments as they are now, under a step; of very many every second is dropped."""
        self.snapshots.append((step, self._moments().clone()))
        if len(self.snapshots) > _MOST_SNAPSHOTS:
            del self.snapshots[::2]

    def _moments(self) -> Tensor:
        return self._before + self._total + self._pending

    def sync(self) -> None:
        """Add what all processes have seen since the last time; a collective, to be called on every one of them."""
        pending = self._pending if self.reduce is None else self.reduce(self._pending)
        self._total = self._total + pending
        self._pending = self._zeros()
        if self.window is not None and self.updates - self._window_start >= self.window:
            self._before, self._total, self._window_start = self._total, self._zeros(), self.updates

    def compute(self, device: torch.device | str | None = "cpu") -> LossStatistics:
        """Return the statistics: of all processes up to the last ``sync``, and of this one since.

        Args:
            device: of what is returned; None: where the moments are, without waiting for it.
        """
        return self._statistics(self._moments(), device)

    def history(self) -> list[tuple[int, LossStatistics]]:
        """Return the snapshots, as steps with statistics up to them."""
        return [(step, self._statistics(moments)) for step, moments in self.snapshots]

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
        self.snapshots, self.updates, self._window_start = [], 0, 0

    def state_dict(self) -> dict[str, Tensor]:
        """Return edges and moments up to the last ``sync`` (on a single process: all), and the snapshots."""
        if self.reduce is None:
            self.sync()
        state = {"edges": self.edges, "moments": self._total, "moments_before": self._before}
        state["updates"] = torch.tensor([self.updates, self._window_start])
        if self.snapshots:
            state["snapshot_steps"] = torch.tensor([step for step, _ in self.snapshots])
            state["snapshots"] = torch.stack([moments for _, moments in self.snapshots])
        return {name: value.detach().cpu().clone() for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a state, on every process.

        Raises:
            ValueError: the state is not one of a tracker, is damaged, or has other bins.
        """
        _check_state(state)
        edges = self.edges.cpu()
        if not torch.equal(state["edges"].to(edges), edges):
            raise ValueError(
                f"The state has other bins: {_describe(state['edges'])}; this tracker has {_describe(edges)}."
            )
        self._total = state["moments"].to(self._total, copy=True)
        self._before = state["moments_before"].to(self._total)
        self._pending = self._zeros()
        self.updates, self._window_start = state["updates"].tolist()
        steps = state.get("snapshot_steps", torch.zeros(0)).tolist()
        kept = zip(steps, state.get("snapshots", []), strict=True)
        self.snapshots = [(int(step), moments.to(self._total)) for step, moments in kept]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state as safetensors, aside and then renamed, so that ``path`` is never half-written."""
        path = Path(path)
        aside = path.with_name(path.name + ".tmp")
        save_file(self.state_dict(), aside, metadata={"unit": self.unit or ""})
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
            _check_state(state)
            tracker = cls(unit=_unit_in(path))
            tracker.edges = state["edges"]
            tracker._total, tracker._pending, tracker._before = (tracker._zeros() for _ in range(3))
            tracker.load_state_dict(state)
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"`path` {os.fspath(path)!r} is not a tracker's file: {error}.") from None
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


def _describe(edges: Tensor) -> str:
    return f"{len(edges) - 1} bins from {edges[0]:g} to {edges[-1]:g}"


def _check_state(state: dict[str, Tensor]) -> None:
    needed = {"edges", "moments", "moments_before", "updates"}
    if not needed <= set(state) or not set(state) <= needed | {"snapshot_steps", "snapshots"}:
        raise ValueError(f"Not the state of a LossVarianceTracker: it has {sorted(state)}.")
    shape = (len(_ROWS), len(state["edges"]) - 1)
    if any(tuple(state[name].shape) != shape for name in ("moments", "moments_before")):
        raise ValueError(f"Not the state of a LossVarianceTracker: its moments are not of shape {shape}.")
    if not all(bool(state[name].isfinite().all()) for name in ("edges", "moments", "moments_before")):
        raise ValueError("The state of the LossVarianceTracker is damaged: it holds values that are not finite.")


def _unit_in(path: str | os.PathLike[str]) -> str | None:
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("unit") or None
