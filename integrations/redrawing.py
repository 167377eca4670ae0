"""Timesteps redrawn inside ``scheduler.add_noise``: importance sampling for a training loop that draws its own.

A loop draws timesteps, noises with them, and gives the same tensor to the model. ``add_noise`` is the last moment at
which they can be others: new ones are written into that very tensor before it noises. The weight p / q of each goes to
the model's output with the timesteps that the model was given, which must be those.
"""

from __future__ import annotations

import copy
import math
import os
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from snrweights.integrations.noticing import replace_attribute, timesteps_in
from torch import Tensor, nn

from snrweights.densities import Density
from snrweights.importance import BY_LOSS, ImportanceSampler
from snrweights.samplers import TimestepSampler
from snrweights.schedules import DiscreteSchedule, FlowSchedule, Schedule

_REMEMBERED = 8  # draws whose forward pass may be yet to come: accumulation, or checkpointing of the whole model
_CHECKED = 8  # calls of the model after which its timesteps are no longer waited for


class Redrawing:
    """Redraws what a scheduler's ``add_noise`` is given, and knows the factors on the losses of what it drew.

    Args:
        scheduler: its ``add_noise`` is wrapped from ``start`` to ``stop``, on this very instance.
        sampler: draws the timesteps.
    """

    def __init__(self, scheduler: Any, sampler: TimestepSampler) -> None:
        self.scheduler, self.sampler = scheduler, sampler
        self._owner: weakref.ref[Any] | None = None
        self._restore: Callable[[], None] | None = None
        self._t: Tensor | None = None  # (remembered, B), the newest first
        self._weight: Tensor | None = None
        self._written: deque[tuple[weakref.ref[Tensor], int]] = deque(maxlen=_REMEMBERED)
        self._left_alone = "the script has not called it"
        self._to_check = _CHECKED

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled with a model redraws nothing: the scheduler that it is used with is another."""
        return vars(self) | {"_owner": None, "_restore": None, "_written": deque(maxlen=_REMEMBERED)}

    def start(self, owner: Any, model: nn.Module) -> None:
        """Wrap ``add_noise``, until ``stop`` or the end of the model."""
        self._restore = replace_attribute(self.scheduler, "add_noise", AddNoise(self, self.scheduler.add_noise))
        self._owner = weakref.ref(owner)
        weakref.finalize(model, self.stop).atexit = False

    def stop(self) -> None:
        """Leave the scheduler as it was. Timesteps are the script's own from here on, with factors of 1."""
        if self._restore is not None:
            self._restore()
            self._restore = None

    def belongs_to(self, attachment: Any) -> bool:
        """Whether it was started for this one, and not for one that this is a copy of."""
        return self._owner is not None and self._owner() is attachment

    @property
    def active(self) -> bool:
        """Whether ``add_noise`` is wrapped."""
        return self._restore is not None

    @torch.no_grad()
    def redraw(self, t: Tensor) -> None:
        """Write new timesteps into ``t`` (B,), unless they are to be left alone."""
        reason = self._reason_to_leave(t)
        if reason is not None:
            self._left_alone = reason
        elif not self._is_redrawn(t):
            drawn, weight = self.sampler.draw(len(t), device=t.device)
            t.copy_(drawn)
            self._written.append((weakref.ref(t), t._version))
            self.remember(t, weight)

    def _is_redrawn(self, t: Tensor) -> bool:
        """Whether these are a draw as it was written: a script may noise two things with the same timesteps."""
        alive = ((written(), version) for written, version in self._written)
        return any(
            own is not None and own.data_ptr() == t.data_ptr() and own.shape == t.shape and version == t._version
            for own, version in alive
        )

    def _reason_to_leave(self, t: Any) -> str | None:
        if not isinstance(t, Tensor) or t.ndim != 1:
            given = f"of shape {tuple(t.shape)}" if isinstance(t, Tensor) else f"of type {type(t).__name__}"
            return f"it was called with timesteps {given}, not with a tensor of shape (B,)"
        if len(t) > 1 and t.stride(0) == 0:
            return "it was called with one timestep that is expanded to the batch"
        table = getattr(self.scheduler, "timesteps", None)
        if isinstance(table, Tensor) and _same_memory(table, t):
            return "it was called with a part of the scheduler's own table of timesteps"
        return None

    def left_without_grad(self) -> None:
        """Take note of a call without gradients: of a pipeline, or of a loop that noises so."""
        self._left_alone = "it was called without gradients only, as pipelines do"

    def remember(self, t: Tensor, weight: Tensor | None = None) -> None:
        """Take note of timesteps (B,) that the model is going to be given; without weights, of the script's own."""
        t = t.detach().clone()
        weight = torch.ones(t.shape, device=t.device) if weight is None else weight
        before_t, before = self._t, self._weight
        if before_t is None or before is None or before_t.shape[1:] != t.shape or before_t.device != t.device:
            before_t, before = t.expand(_REMEMBERED, -1), weight.expand(_REMEMBERED, -1)
        # new tensors, since a backward pass that is yet to come may hold the old ones
        self._t, self._weight = (torch.cat((new[None], old[:-1])) for new, old in ((t, before_t), (weight, before)))

    @property
    def learner(self) -> ImportanceSampler | None:
        """The sampler, if it learns from losses."""
        return self.sampler if isinstance(self.sampler, ImportanceSampler) else None

    def factor(self, t: Tensor) -> Tensor:
        """Return the factors on the losses at the timesteps that the model was given, (B,) or (); NaN for others.

        The first calls wait for the device. Once stopped, all are 1.

        Raises:
            ValueError: nothing was drawn, or the model was given other timesteps.
        """
        if not self.active:
            return torch.ones(t.shape, device=t.device)
        if self._t is None or self._weight is None:
            raise ValueError(
                f"`sampler` redraws timesteps inside {self._name}.add_noise, and {self._left_alone}. Noise with this "
                f"scheduler, or draw in the script: `t, weight = sampler.draw(batch_size)`."
            )
        given = t.reshape(-1)
        if given.shape != self._t.shape[1:]:
            raise ValueError(
                f"The model was given {len(given)} timesteps, and {self._name}.add_noise {self._t.shape[1]}: `sampler` "
                f"cannot tell which of them are whose."
            )
        same = (self._t.to(given) == given).all(1)
        newest = same.int().argmax(0, keepdim=True)
        factor = torch.where(same.any(), self._weight.to(given.device).index_select(0, newest)[0], math.nan)
        if not torch.compiler.is_compiling() and self._to_check:
            self._to_check -= 1
            if bool(factor.isnan().any()):
                raise ValueError(
                    f"The model was given other timesteps than {self._name}.add_noise was: `sampler` redraws them in "
                    f"place, and the script noises with a copy of them, or changes them afterwards. Give both the "
                    f"same tensor, or draw in the script: `t, weight = sampler.draw(batch_size)`."
                )
        return factor.reshape(t.shape)

    @property
    def _name(self) -> str:
        return type(self.scheduler).__name__


class AddNoise:
    """In place of a scheduler's ``add_noise``; a copy of the scheduler, pickled or not, has that of its class."""

    def __init__(self, redrawing: Redrawing, add_noise: Callable[..., Any]) -> None:
        self._redrawing, self._add_noise = redrawing, add_noise

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Redraw the timesteps, and noise with them."""
        if torch.is_grad_enabled():
            self._redrawing.redraw(timesteps_in(args, kwargs))
        else:
            self._redrawing.left_without_grad()
        return self._add_noise(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy has no state yet when this is called: what it gets is the method of its class
        return getattr, (self._redrawing.scheduler, "add_noise")


def check_noising(scheduler: Any, schedule: Schedule) -> None:
    """Check that ``scheduler.add_noise`` noises each timestep of the schedule as much as the schedule says.

    Raises:
        TypeError: it does not, or there is none, with the reason.
        ValueError: it is wrapped already.
    """
    name = scheduler if isinstance(scheduler, str) else type(scheduler).__name__
    refused = "`sampler` redraws timesteps inside scheduler.add_noise, and "
    if isinstance(schedule, FlowSchedule):
        raise TypeError(
            f"{refused}loops that train on {name} mix noise in by themselves, from sigmas of their own: draw in the "
            f"script, `t, weight = TimestepSampler(...).draw(batch_size)`."
        )
    if not callable(getattr(scheduler, "add_noise", None)):
        raise TypeError(f"{refused}{name} has none; give the scheduler that the loop noises with.")
    if not isinstance(schedule, DiscreteSchedule):
        raise TypeError(f"{refused}that of {name} does not take any timestep of a table: draw in the script.")
    if isinstance(scheduler.add_noise, AddNoise):
        raise ValueError(f"{name}.add_noise redraws timesteps already, for another model; detach() that first.")
    wrong = _timesteps_noised_otherwise(scheduler, schedule)
    if wrong:
        raise TypeError(
            f"{refused}that of this {name} does not noise t = {wrong[0]} as its table says, nor {len(wrong) - 1} more: "
            f"was `set_timesteps` called? Train with a scheduler of its own."
        )


def _timesteps_noised_otherwise(scheduler: Any, schedule: DiscreteSchedule) -> list[int]:
    t = torch.arange(len(schedule.log_snr_table))
    zero, one = torch.zeros(len(t), dtype=torch.float64), torch.ones(len(t), dtype=torch.float64)
    scheduler = copy.copy(scheduler)  # it may move its tables
    try:
        with torch.no_grad():
            alpha, sigma = (scheduler.add_noise(*of, t) for of in ((one, zero), (zero, one)))
    except IndexError:  # no such timestep
        return t.tolist()
    log_snr = 2 * (alpha.log() - sigma.log())
    as_told = (log_snr - schedule.log_snr_table).abs() < 0.05  # tables are float32, and their ends rounded
    return t[~(as_told | (log_snr == schedule.log_snr_table))].tolist()


def sampler_of(name: str | TimestepSampler, schedule: Schedule, density: Density | str | None) -> TimestepSampler:
    """Return the sampler of a rule, for all processes of ``torch.distributed``; a sampler as it is.

    Its seed is ``torch.initial_seed()`` of the first process.

    Raises:
        ValueError: an unknown rule, a sampler of another schedule, or processes that are not connected yet.
    """
    if isinstance(name, TimestepSampler):
        tables = [getattr(each, "log_snr_table", torch.empty(0)) for each in (name.schedule, schedule)]
        if not torch.equal(*tables):
            raise ValueError(f"`sampler` {name!r} has another schedule than the scheduler: give it that scheduler.")
        return name
    if name not in BY_LOSS:
        raise ValueError(f"`sampler` must be a TimestepSampler or one of {list(BY_LOSS)}, got {name!r}.")
    seed = torch.initial_seed() % 2**63
    if not _distributed():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"`sampler` {name!r} draws for all processes together, and torch.distributed is not initialised: "
                f"attach after `Accelerator()` or `init_process_group()`."
            )
        return ImportanceSampler(schedule, name, density=density, seed=seed)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    seed = int(summed_over_processes(torch.tensor(0 if rank else seed)))
    reduce = summed_over_processes
    return ImportanceSampler(
        schedule, name, density=density, seed=seed, rank=rank, world_size=world_size, reduce=reduce
    )


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def summed_over_processes(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, on each of them."""
    on_device = "cuda" if torch.distributed.get_backend() == "nccl" else tensor.device
    summed = tensor.to(on_device, copy=True)
    torch.distributed.all_reduce(summed)
    return summed.to(tensor.device)


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
