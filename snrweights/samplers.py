"""Timesteps drawn from a density over log-SNR, for a whole optimizer step at once."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from snrweights.densities import Density
from snrweights.drawn import as_density
from snrweights.quantiles import quantiles
from snrweights.schedulers import as_schedule
from snrweights.uniforms import Draws, uniforms


class Draw(NamedTuple):
    """A batch's timesteps ``t`` (B,) and the factors ``weight`` (B,), float32, on its losses.

    Example:
        >>> Draw(torch.tensor([3]), torch.ones(1)).t
        tensor([3])
    """

    t: Tensor
    weight: Tensor


class TimestepSampler:
    """Draws timesteps whose log-SNR has a density, on a discrete or a continuous schedule.

    ``t, weight = sampler.draw(batch_size)``. On a discrete schedule a timestep gets the mass that is nearest to it in
    log-SNR. Numbers are functions of (seed, count of batches) and drawn for all processes and micro-batches of an
    optimizer step together, so that antithetic and stratified draws are that over the whole step, and neither a restart
    nor the number of processes changes them.

    Args:
        schedule: whatever ``as_schedule`` reads.
        density: to draw from: a ``Density`` or its name; None: uniform over the schedule's timesteps (``EDMSchedule``:
            the paper's log-normal).
        base: the density that the objective is meant under, if that is another: ``weight`` is then base / density and
            the expected gradient that of draws from ``base``. None: ``weight`` is 1, and the density is part of what is
            optimised.
        draws: ``"independent"``, ``"antithetic"`` or ``"stratified"``; see ``uniforms``.
        seed: of the draws; the same on every process.
        rank: of this process.
        world_size: number of processes.
        accumulation: micro-batches in an optimizer step.

    Attributes:
        schedule: the schedule.
        density: what is drawn from.
        drawn: number of batches so far.

    Raises:
        ValueError: a bad argument, or a density without mass where ``base`` has some: that would bias.
        TypeError: a schedule that cannot be read or drawn from.

    Example:
        >>> sampler = TimestepSampler("linear", "cosine", seed=1)
        >>> t, weight = sampler.draw(4)
        >>> t.shape, weight
        (torch.Size([4]), tensor([1., 1., 1., 1.]))
    """

    def __init__(
        self,
        schedule: Any,
        density: Density | str | None = None,
        *,
        base: Density | str | None = None,
        draws: Draws = "stratified",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
    ) -> None:
        self.schedule = as_schedule(schedule)
        self.density = as_density(density, self.schedule)
        self.drawn = 0
        self._quantiles = quantiles(self.schedule, self.density)
        self._base = None if base is None else quantiles(self.schedule, as_density(base, self.schedule))
        self._options: dict[str, Any] = {
            "draws": draws,
            "seed": seed,
            "rank": rank,
            "world_size": world_size,
            "accumulation": accumulation,
        }
        uniforms(1, **self._options)  # checks them
        if self._base is not None:
            self._check_support(self._base.support())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.density!r}, draws={self._options['draws']!r})"

    def draw(self, batch_size: int, *, index: int | None = None, device: torch.device | str = "cpu") -> Draw:
        """Draw a batch.

        Args:
            batch_size: timesteps wanted, the same on every process.
            index: number of the batch, for draws that are a function of it; default: one more than the last.
            device: where they are drawn and stay.

        Returns:
            Timesteps as ``schedule`` counts them, integers for a discrete one, and the factors on their losses.
        """
        self.drawn = self.drawn if index is None else index
        u = uniforms(batch_size, index=self.drawn, device=device, **self._options)
        self.drawn += 1
        return self.at(u)

    def at(self, u: Tensor) -> Draw:
        """Return what uniform numbers ``u`` (B,) in [0, 1] draw; 0 is the noisiest end, 1 the cleanest."""
        t = self._quantiles.timesteps(u)
        return Draw(t, self.weight(t))

    def update(self, t: Tensor, loss: Tensor, *, weight: Tensor | None = None) -> None:
        """Do nothing: the density is fixed. ``ImportanceSampler`` learns."""

    def sync(self) -> None:
        """Do nothing: there is nothing to add up."""

    def weight(self, t: Tensor) -> Tensor:
        """Return the factors (B,), float32, on the losses of timesteps ``t`` (B,) of this sampler."""
        if self._base is None:
            return torch.ones(t.shape, device=t.device)
        return (self._base.log_mass(t) - self._quantiles.log_mass(t)).exp().float()

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed run needs."""
        return {"drawn": torch.tensor(self.drawn)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a state.

        Raises:
            ValueError: it is damaged, or another's.
        """
        if set(state) != {"drawn"}:
            raise ValueError(f"Not the state of a {type(self).__name__}: it has {sorted(state)}, not ['drawn'].")
        self.drawn = whole(state["drawn"])

    def _check_support(self, t: Tensor) -> None:
        missing = t[self._quantiles.log_mass(t) == -math.inf]
        if len(missing):
            raise ValueError(
                f"`density` {self.density} has no mass at {len(missing)} of {len(t)} timesteps that `base` draws "
                f"(from t = {missing.min():g} to {missing.max():g}): the gradient would be biased. "
                "Draw from a wider one, or cut `base` off with `snrweights.quantiles.within(base, low, high)`."
            )


def whole(drawn: Tensor) -> int:
    """Read the count of draws of a state, or raise a ValueError."""
    if drawn.numel() != 1 or drawn.is_floating_point() or int(drawn) < 0:
        raise ValueError(f"The state of the sampler is damaged: `drawn` must be a whole number, got {drawn}.")
    return int(drawn)
