"""A weighting bound to a scheduler that a script may change while it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from snrweights.losses import same_state, state_of
from snrweights.schedulers import as_schedule
from snrweights.schedules import Schedule
from snrweights.weightings.base import BoundWeighting, Weighting


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

    def _bind(self) -> None:
        self.schedule = self._seen_by_model(as_schedule(self.scheduler))
        weighting = self.weighting
        self.bound: BoundWeighting | None = weighting.bind(self.schedule, **self.options) if weighting else None

    def refresh(self) -> None:
        """Bind again if the scheduler's table or config is another than before."""
        state = state_of(self.scheduler)
        if not same_state(self._state, state):
            self._state = state
            self._bind()

    @property
    def output_type(self) -> str | None:
        """The prediction type of the model's output: what the scheduler states, else what was given."""
        return self.schedule.prediction_type or self.options["prediction_type"]

    @property
    def scheduler_name(self) -> str:
        """The scheduler's class, or what was given in its place."""
        return repr(self.scheduler) if isinstance(self.scheduler, str) else type(self.scheduler).__name__

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
