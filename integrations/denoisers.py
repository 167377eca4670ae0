"""Denoisers as training loops call them: inside which wrappers, with which timesteps, with what in their output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from snrweights.integrations.timestep_adapters import Adapter, adapter_of, position_of, refusal_of
from torch import Tensor, nn

from snrweights.schedules import FlowSchedule, Schedule

_WRAPPERS = ("torch", "deepspeed", "peft")  # DDP, FSDP, torch.compile; DeepSpeed's engine; PeftModel

Timestep = Callable[..., Any]


def denoiser_in(model: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of DDP, FSDP, ``torch.compile``, DeepSpeed and PEFT.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> denoiser_in(torch.compile(layer)) is layer
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    while True:
        inner: Any = None
        if type(model).__module__.partition(".")[0] in _WRAPPERS:
            inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
            unwrap: Any = getattr(model, "get_base_model", None)
            inner = unwrap() if inner is None and unwrap is not None else inner
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner


def choose_adapter(model: nn.Module, timestep: Timestep | None, force: bool) -> Adapter:
    """Return the adapter of a model; a plain one where ``timestep`` says what t is.

    Raises:
        TypeError: a model that is refused, or that is not known.
    """
    name, reason = type(model).__name__, refusal_of(model)
    if reason is not None and not force and timestep is None:
        raise TypeError(f"{name} cannot be weighted: {reason}. `force=True` attaches nevertheless.")
    if timestep is not None:
        return adapter_of(model) or Adapter()
    adapter = adapter_of(model) or (Adapter() if force else None)
    if adapter is not None and position_of(model, adapter.argument) is not None:
        return adapter
    inside = [f"{path!r} ({type(m).__name__})" for path, m in model.named_modules() if path and adapter_of(m)]
    raise TypeError(
        f"How {name} takes its timestep is not known: give `timestep=`, a function from the arguments of its call to "
        f"the scheduler's t, such as `lambda sample, t, *args, **kwargs: t`"
        + (f", or attach to what it contains: {inside[0]}." if inside else ".")
    )


class TimestepReader:
    """Reads the schedule's t out of the arguments of a model's call."""

    def __init__(self, model: nn.Module, adapter: Adapter, function: Timestep | None) -> None:
        self._model = type(model).__name__
        self._adapter = adapter
        self._position = position_of(model, adapter.argument)
        self._function = function

    def __call__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        schedule: Schedule,
        rows: int,
        device: torch.device,
    ) -> Tensor:
        """Return t of shape (rows,), or () if it is one for all.

        Raises:
            ValueError: the timesteps are neither one nor one a sample.
        """
        if self._function is not None:
            t = torch.as_tensor(self._function(*args, **kwargs), device=device)
        else:
            given = self._given(args, kwargs)
            sample = args[0] if args else kwargs.get("hidden_states")
            t = self._adapter.meaning(torch.as_tensor(given, device=device), schedule, model, sample)
        if not t.is_floating_point() and t.dtype not in (torch.int32, torch.int64):
            t = t.long()
        if t.numel() == 1:
            return t.reshape(())
        if t.numel() != rows:
            raise ValueError(
                f"{self._model} was called with timesteps of shape {tuple(t.shape)} and returned {rows} samples; give "
                f"`timestep=`, a function from the call's arguments to one t a sample."
            )
        return t.reshape(rows)

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = kwargs.get(self._adapter.argument)
        if given is None and self._position is not None and self._position < len(args):
            given = args[self._position]
        if given is None:
            raise ValueError(f"{self._model} was called without `{self._adapter.argument}`.")
        return given


def check_timesteps(t: Tensor, schedule: Schedule) -> None:
    """Check timesteps of a batch; it waits for the device.

    Raises:
        ValueError: t outside the schedule, or sigma where sigma * num_train_timesteps is meant.
        IndexError: t outside a discrete schedule.
    """
    schedule.check(t)
    if isinstance(schedule, FlowSchedule) and schedule.num_train_timesteps > 1 and bool((t < 1).all()):
        raise ValueError(
            f"`t` is at most {float(t.max()):g}, where {schedule.num_train_timesteps} is pure noise: the model seems "
            "to be given sigma itself; give `timestep=`, a function from the call's arguments to sigma * "
            "num_train_timesteps."
        )


def prediction_in(output: Any, per_sample_list: bool = False) -> Tensor | list[Tensor]:
    """Return the prediction in a model's output: a tensor, or for some models a list with one tensor a sample.

    Example:
        >>> prediction_in((torch.zeros(1), "more"))
        tensor([0.])
    """
    found = output
    while isinstance(found, (tuple, dict)):
        found = next(iter(found.values())) if isinstance(found, dict) else found[0]
    if isinstance(found, Tensor) or (per_sample_list and isinstance(found, list)):
        return found
    raise TypeError(f"No prediction found in an output of type {type(output).__name__}: it begins with {type(found)}.")


def with_prediction(output: Any, prediction: Tensor) -> Any:
    """Return the output with another prediction at the place of its own.

    Example:
        >>> with_prediction((torch.zeros(1), "more"), torch.ones(1))
        (tensor([1.]), 'more')
    """
    if isinstance(output, Tensor):
        return prediction
    if isinstance(output, dict):
        key = next(iter(output))
        output[key] = with_prediction(output[key], prediction)
        return output
    parts = (with_prediction(output[0], prediction), *output[1:])
    return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
