"""A weighting bound to a scheduler that a script may change while it trains."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from snrweights.losses import same_state, state_of
from snrweights.predictions import LIMIT, convert_log_weight
from snrweights.schedulers import as_schedule
from snrweights.schedules import DiscreteSchedule, EDMSchedule, Schedule
from snrweights.weightings.base import Weighting
from snrweights.weightings.bound import BoundWeighting


class LiveWeighting:
    """Binds a weighting, or None for none, to a scheduler, and again when that has changed.

    Attributes:
        schedule: what the scheduler is read as.
        bound: the weighting bound to it; None without a weighting.
    """

    def __init__(
        self,
        scheduler: Any,
        weighting: Weighting | None,
        seen_by_model: Callable[[Schedule], Schedule],
        **options: Any,
    ) -> None:
        self.scheduler = scheduler
        self.weighting = weighting
        self.options = options
        self._seen_by_model = seen_by_model
        self._state = state_of(scheduler)
        self._bind()
        self._key = id(self)
        _LIVE[self._key] = self
        self.on_trace: Callable[[], None] | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._key = id(self)
        _LIVE[self._key] = self

    def _bind(self) -> None:
        schedule = self._seen_by_model(as_schedule(self.scheduler))
        bound = self.weighting.bind(schedule, **self.options) if self.weighting else None
        self.schedule: Schedule = schedule  # both, or none where the weight cannot be bound
        self.bound: BoundWeighting | None = bound

    def refresh(self) -> None:
        """Bind again if the scheduler's table or config is another than before.

        A compiled graph does so when it is traced, and is traced again when the prediction type has changed.
        """
        if torch.compiler.is_compiling():
            config = getattr(self.scheduler, "config", None)
            _refresh_while_tracing(self._key, getattr(config, "prediction_type", None))
        else:
            self._refresh()

    def _refresh(self) -> None:
        state = state_of(self.scheduler)
        if not same_state(self._state, state):
            self._bind()
            self._state = state

    @property
    def output_type(self) -> str | None:
        """The prediction type of the model's output: what the scheduler states, else what was given."""
        return self.schedule.prediction_type or self.options["prediction_type"]

    def tracked_as(self, log_snr: Tensor) -> tuple[str | None, Tensor | float]:
        """Return the prediction type of the output, and the weight that the loss has on its MSE.

        A flow's or EDM's output is what such a scheduler implies, and a loss that was said to be on another target is
        on that target made from it. A discrete scheduler's config can be wrong: what was given stands for the output.
        """
        given, output = self.options["prediction_type"], self.output_type
        if given is None or given == output or isinstance(self.schedule, DiscreteSchedule):
            return given or output, 1.0
        zero, finite = torch.zeros_like(log_snr), log_snr.clamp(-LIMIT, LIMIT)
        return output, convert_log_weight(zero, finite, given, str(output), self.schedule.sigma_data).exp()

    @property
    def density_name(self) -> str:
        """The density that means are under, in words."""
        given = self.options["density"]
        if given is None and not isinstance(self.schedule, EDMSchedule):
            return "uniform over the scheduler's timesteps"
        return str(given if given is not None or self.bound is None else self.bound.curve.density)

    @property
    def scheduler_name(self) -> str:
        """The scheduler's class, or what was given in its place."""
        return self.scheduler if isinstance(self.scheduler, str) else type(self.scheduler).__name__

    def __repr__(self) -> str:
        if self.bound is None:
            return f"no weight, on {self.scheduler_name}"
        options = "".join(
            f", {name}={value!r}"
            for name, value in self.options.items()
            if value is not None and name not in ("prediction_type", "dtype")
        )
        return (
            f"{self.weighting!r} on the MSE of {self.bound.curve.prediction_type!r}{options}, on {self.scheduler_name}"
        )


_LIVE: weakref.WeakValueDictionary[int, LiveWeighting] = weakref.WeakValueDictionary()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _refresh_while_tracing(key: int, prediction_type: str | None) -> bool:
    """Refresh outside of the graph; the arguments are what the graph is guarded by."""
    del prediction_type
    live = _LIVE[key]
    live._refresh()
    if live.on_trace is not None:
        live.on_trace()
    return True
