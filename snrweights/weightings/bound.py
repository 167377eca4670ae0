"""A weighting on a schedule: a curve over log-SNR, and a function of timesteps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from snrweights.densities import Density
from snrweights.drawn import mean_under
from snrweights.predictions import LIMIT, convert_log_weight
from snrweights.schedules import DiscreteSchedule, Schedule, lookup

if TYPE_CHECKING:
    from snrweights.weightings.base import Weighting


@dataclass(frozen=True)
class WeightCurve:
    """A weight over log-SNR for one prediction type, in float64: ``curve(log_snr) -> w``, same shape.

    Exact at infinite log-SNR. ``mean`` is its average under the density. Of a weight that depends on the batch it is
    the part that can be told from log-SNR alone; the weighting's docstring says which.
    """

    weighting: Weighting
    prediction_type: str
    density: Density
    sigma_data: float | None = None
    clamp_max: float | None = None
    scale: float = 1.0

    def __call__(self, log_snr: Tensor) -> Tensor:
        """Return the weight at ``log_snr``, any shape."""
        return self.log_weight(log_snr).exp()

    def log_weight(self, log_snr: Tensor, prediction_type: str | None = None) -> Tensor:
        """Return the logarithm of the weight, as one on the MSE of another target if that is named."""
        finite = log_snr.clamp(-LIMIT, LIMIT)
        return self.convert(self.weighting.log_weight(finite), finite, prediction_type)

    def convert(self, log_weight: Tensor, finite: Tensor, prediction_type: str | None = None) -> Tensor:
        """Turn what ``weighting.log_weight`` returns at a finite log-SNR into what ``log_weight`` here returns."""
        native = self.weighting.target
        if native == "objective":
            log_weight, native = log_weight - self.density.log_prob(finite), "epsilon"
        if native != "native":
            log_weight = convert_log_weight(log_weight, finite, native, self.prediction_type, self.sigma_data)
        if self.clamp_max is not None:
            log_weight = log_weight.clamp(max=math.log(self.clamp_max))
        if self.scale != 1.0:
            log_weight = log_weight + math.log(self.scale)
        if prediction_type is None:
            return log_weight
        return convert_log_weight(log_weight, finite, self.prediction_type, prediction_type, self.sigma_data)

    def mean(self) -> float:
        """Return the average weight under the density; inf where the integral does not converge."""
        return mean_under(self.density, self)

    def normalized(self) -> WeightCurve:
        """Return the curve scaled to mean 1 under the density."""
        mean = self.mean()
        if not 0 < mean < math.inf:
            raise ValueError(
                f"`normalize='mean'`: {self.weighting.name!r} for {self.prediction_type!r} averages {mean} under "
                f"{self.density}; give `clamp_max=` or a density that the weight is integrable under."
            )
        return dataclasses.replace(self, scale=self.scale / mean)


class BoundWeighting:
    """A weighting bound to a schedule: ``bound(t)`` returns weights of t's shape; the hot path of a training loop.

    Integer t on a discrete schedule is one gather from a table on t's device (copied there once); float t between two
    timesteps interpolates the table; continuous schedules evaluate the formula. Nothing synchronises with the host.

    Attributes:
        curve: the weight as a function of log-SNR.
        schedule: the schedule it was bound to.
        dtype: of the weights returned.
        reduce: sums a tensor over the processes, for weights that depend on the batch; None on a single one.

    Example:
        >>> import torch
        >>> from snrweights import get_weighting
        >>> bound = get_weighting("snr_plus_one").bind("flow")
        >>> bound(torch.tensor([0.5, 1.0]))  # 2 where SNR = 1; its limit, 1, at SNR = 0
        tensor([0.5000, 1.0000])
    """

    reduce: Callable[[Tensor], Tensor] | None = None

    def __init__(self, curve: WeightCurve, schedule: Schedule, weights: Tensor) -> None:
        self.curve = curve
        self.schedule = schedule
        self.dtype = weights.dtype
        self._discrete = isinstance(schedule, DiscreteSchedule)
        self._table = {weights.device: weights}

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.curve.weighting!r}, prediction_type={self.curve.prediction_type!r}, "
            f"schedule={type(self.schedule).__name__})"
        )

    def __call__(self, t: Tensor, loss: Tensor | None = None) -> Tensor:
        """Return the weights of timesteps ``t``, shape (B,) or ().

        A float ``t`` beyond the ends of a discrete schedule gets the weight of the end; ``loss_weight`` refuses it.
        ``loss``, the unweighted losses (B,), is for weights that depend on them, and not looked at by others.

        Raises:
            IndexError: an integer ``t`` outside a discrete schedule (on an accelerator: a device assertion).
            ValueError: ``t`` has more than one dimension.
        """
        if t.ndim > 1:
            raise ValueError(f"`t` must have shape (B,) or (), got {tuple(t.shape)}.")
        del loss
        if not self._discrete:
            return self.curve(self.schedule.log_snr(t)).to(self.dtype)
        table = self._table.get(t.device)
        if table is None:
            table = self._table[t.device] = next(iter(self._table.values())).to(t.device)
        if not t.is_floating_point():
            try:
                return lookup(table, t)
            except IndexError:
                self.schedule.check(t)
                raise
        return lookup(table, t)

    def center_on(self, t: Tensor) -> None:
        """Announce all timesteps of an optimizer step, before its first micro-batch; each process its own.

        A weight that depends on the timesteps of its batch then takes them for the batch until the next call. Others do
        not look at them.
        """
        del t

    def state_dict(self) -> dict[str, Tensor]:
        """Return what the weight remembers from step to step; by default nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a state, on every process.

        Raises:
            ValueError: it is not one of this weighting.
        """
        own = self.state_dict()
        if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in state.items()}:
            raise ValueError(f"Not the state of {self!r}: it has {sorted(state)}, and not {sorted(own)} of its shapes.")
