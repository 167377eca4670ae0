"""How each model takes its timestep: the name of the argument, what it means, and which models have no weight.

Classes are found by name in the method resolution order, so that nothing of diffusers is imported, subclasses are
served, and so are the classes that FSDP derives.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from snrweights.schedules import FlowSchedule, Schedule, exact_dtype

Meaning = Callable[[Tensor, Schedule, nn.Module, Any], Tensor]


def same(t: Tensor, schedule: Schedule, model: nn.Module, sample: Any) -> Tensor:
    """The timestep as the scheduler counts it: an index, sigma * num_train_timesteps, 0.25 ln sigma, Wuerstchen's r."""
    del schedule, model, sample
    return t


def unit(t: Tensor, schedule: Schedule, model: nn.Module, sample: Any) -> Tensor:
    """A flow's sigma in [0, 1]."""
    del model, sample
    return t.to(exact_dtype(t.device)) * _steps(schedule)


def reversed_unit(t: Tensor, schedule: Schedule, model: nn.Module, sample: Any) -> Tensor:
    """1 - sigma: the data are at 1."""
    del model, sample
    return (1 - t.to(exact_dtype(t.device))) * _steps(schedule)


def shifted_by_resolution(t: Tensor, schedule: Schedule, model: nn.Module, sample: Any) -> Tensor:
    """CogView4: the timestep before the shift by ``k = 0.75 sqrt(tokens / 256) + 0.25`` that the noise level has."""
    patch = model.config.patch_size  # type: ignore[union-attr]
    tokens = sample.shape[-2] * sample.shape[-1] // patch**2  # type: ignore[operator]
    k = 0.75 * (tokens / 256) ** 0.5 + 0.25
    steps = _steps(schedule)
    s = t.to(exact_dtype(t.device)) / steps
    return k * s / (1 + (k - 1) * s) * steps


def _steps(schedule: Schedule) -> int:
    steps = getattr(schedule, "num_train_timesteps", None)
    if steps is None:
        raise TypeError(
            f"This model takes a flow's sigma as its timestep and goes with a FlowMatch scheduler, not with "
            f"{type(schedule).__name__}; give `timestep=`, a function from the call's arguments to the schedule's t."
        )
    return int(steps)


def as_it_is(schedule: Schedule) -> Schedule:
    """The schedule that the scheduler has."""
    return schedule


def mirrored(schedule: Schedule) -> Schedule:
    """Lumina2's scripts take the scheduler's sigma for the share of the data: shift k draws noise as 1 / k would."""
    if isinstance(schedule, FlowSchedule):
        return dataclasses.replace(schedule, shift=1 / schedule.shift, s_min=0.0)
    return schedule


@dataclass(frozen=True)
class Adapter:
    """Where a model takes its timestep and what that means.

    Attributes:
        argument: name of the argument.
        meaning: from it to the timestep as the schedule counts it.
        schedule: from the scheduler's schedule to the one that is trained on.
        per_sample_list: whether the output is a list with one tensor a sample.
    """

    argument: str = "timestep"
    meaning: Meaning = same
    schedule: Callable[[Schedule], Schedule] = as_it_is
    per_sample_list: bool = False

    @property
    def is_flow(self) -> bool:
        """Whether the model takes a flow's time in [0, 1], whatever the scheduler."""
        return self.meaning in (unit, reversed_unit)


_PLAIN = Adapter()
_UNIT = Adapter(meaning=unit)
_REVERSED = Adapter(meaning=reversed_unit)

ADAPTERS: dict[str, Adapter] = {
    # an index, or whatever the scheduler's own timesteps are
    "UNet1DModel": _PLAIN,
    "UNet2DModel": _PLAIN,
    "UNet2DConditionModel": _PLAIN,
    "UNet3DConditionModel": _PLAIN,
    "UNetMotionModel": _PLAIN,
    "UNetSpatioTemporalConditionModel": _PLAIN,
    "I2VGenXLUNet": _PLAIN,
    "Kandinsky3UNet": _PLAIN,
    "PriorTransformer": _PLAIN,
    "DiTTransformer2DModel": _PLAIN,
    "HunyuanDiT2DModel": _PLAIN,
    "PixArtTransformer2DModel": _PLAIN,
    "PixArtControlNetTransformerModel": _PLAIN,  # a denoiser with its ControlNet inside, as is the next
    "UNetControlNetXSModel": _PLAIN,
    "LatteTransformer3DModel": _PLAIN,
    "AllegroTransformer3DModel": _PLAIN,
    "CogVideoXTransformer3DModel": _PLAIN,
    "CogView3PlusTransformer2DModel": _PLAIN,
    "WuerstchenPrior": Adapter("r"),
    # flow, sigma * num_train_timesteps
    "SD3Transformer2DModel": _PLAIN,
    "SanaTransformer2DModel": _PLAIN,
    "HiDreamImageTransformer2DModel": Adapter("timesteps"),
    "WanTransformer3DModel": _PLAIN,
    "HunyuanVideoTransformer3DModel": _PLAIN,
    "LTXVideoTransformer3DModel": _PLAIN,
    "CogView4Transformer2DModel": Adapter(meaning=shifted_by_resolution),
    # flow, sigma
    "FluxTransformer2DModel": _UNIT,
    "Flux2Transformer2DModel": _UNIT,
    "QwenImageTransformer2DModel": _UNIT,
    "Krea2Transformer2DModel": _UNIT,
    "ChromaTransformer2DModel": _UNIT,
    "AuraFlowTransformer2DModel": _UNIT,
    # flow, 1 - sigma
    "Lumina2Transformer2DModel": Adapter(meaning=reversed_unit, schedule=mirrored),
    "LuminaNextDiT2DModel": _REVERSED,
    "Ideogram4Transformer2DModel": _REVERSED,
    "ZImageTransformer2DModel": Adapter("t", reversed_unit, per_sample_list=True),
}

_TOKENS = "it predicts tokens under a cross entropy: there is no noise level"
_RESIDUALS = "it returns residuals for another model: attach to the denoiser that it steers, frozen or not"
_AUTOENCODER = "it is an autoencoder: there is no noise level"
_PER_FRAME = "its noise level differs between frames: give `timestep=`, from the call's arguments to one t a sample"
_SIGMA = "its time embedding is of sigma: give `timestep=`, a function from the call's arguments to the scheduler's t"
_TWO_TIMES = "it learns a map between two times, not a denoising target"

REFUSED: dict[str, str] = {
    "UVit2DModel": _TOKENS,
    "VQModel": _AUTOENCODER,
    "AutoencoderKL": _AUTOENCODER,
    "AutoencoderTiny": _AUTOENCODER,
    "AutoencoderRAE": _AUTOENCODER,
    "AsymmetricAutoencoderKL": _AUTOENCODER,
    "CosmosTransformer3DModel": _PER_FRAME,
    "AnyFlowTransformer3DModel": _TWO_TIMES,
    "AnyFlowFARTransformer3DModel": _TWO_TIMES,
}


def classes_of(model: nn.Module) -> list[str]:
    """Return the names of the model's class and of its bases."""
    return [cls.__name__ for cls in type(model).__mro__]


def adapter_of(model: nn.Module) -> Adapter | None:
    """Return the adapter of a model's class, or None if it is not known.

    Example:
        >>> adapter_of(nn.Linear(1, 1)) is None
        True
    """
    return next((ADAPTERS[name] for name in classes_of(model) if name in ADAPTERS), None)


def refusal_of(model: nn.Module) -> str | None:
    """Return why a model's class has no weight, or None if nothing speaks against it."""
    names = classes_of(model)
    if any("ControlNet" in name or name == "T2IAdapter" for name in names) and adapter_of(model) is None:
        return _RESIDUALS
    if getattr(getattr(model, "config", None), "time_embedding_type", None) == "fourier":
        return _SIGMA
    return next((REFUSED[name] for name in names if name in REFUSED), None)


def position_of(model: nn.Module, argument: str) -> int | None:
    """Return at which position a model's ``forward`` takes an argument, or None if it has no such argument."""
    parameters = list(inspect.signature(type(model).forward).parameters)[1:]
    return parameters.index(argument) if argument in parameters else None
