"""Any diffusers scheduler, an alphas_cumprod table or a schedule, read as a Schedule. By duck typing: no import."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from snrweights.schedules import (
    Coordinates,
    CosineSchedule,
    DiscreteSchedule,
    EDMSchedule,
    FlowSchedule,
    Schedule,
    alphas_cumprod_from_betas,
    exact_dtype,
)

_SAMPLER = "it only samples and adds no noise; pass the scheduler that the training loop noises with"
_TOKENS = "it masks or replaces tokens: there is no log-SNR"
_DISTILLED = "its models are distilled, not trained with an MSE on a denoising target"

REFUSED = {
    "AmusedScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "VQDiffusionScheduler": _TOKENS,
    "CMStochasticIterativeScheduler": _DISTILLED,
    "FlowMapEulerDiscreteScheduler": _DISTILLED,
    "HeliosDMDScheduler": _DISTILLED,
    "PiflowScheduler": _DISTILLED,
    "SCMScheduler": _DISTILLED,
    "ConsistencyDecoderScheduler": _DISTILLED,
    "DDIMInverseScheduler": _SAMPLER,
    "HeliosScheduler": _SAMPLER,
    "IPNDMScheduler": _SAMPLER,
    "KarrasVeScheduler": _SAMPLER,
    "LTXEulerAncestralRFScheduler": _SAMPLER,
    "RePaintScheduler": _SAMPLER,
    "ScoreSdeVpScheduler": _SAMPLER,
}

# x0 + sigma eps, so that "native" coordinates are variance exploding although the table is a DDPM one
_EXPLODING = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "DPMSolverSDEScheduler",
)

# their add_noise reads a table that set_timesteps() puts in order; before it, t = T-1 gets the smallest sigma
_ORDERED_BY_SET_TIMESTEPS = (
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
)


@dataclass(frozen=True)
class WuerstchenSchedule:
    """Wuerstchen's continuous cosine: alphas_cumprod(t) by the scheduler's own offset s and scaler, t in [0, 1].

    Like the scheduler it clamps alphas_cumprod to [0.0001, 0.9999].
    """

    s: float
    scaler: float
    prediction_type: str | None = "epsilon"
    sigma_data: float | None = None
    coords: Coordinates = "vp"

    def log_snr(self, t: Tensor) -> Tensor:
        """Return log-SNR of ``t`` in [0, 1], float64."""
        t = t.to(exact_dtype(t.device))
        t = 1 - (1 - t) ** self.scaler if self.scaler > 1 else t**self.scaler
        start = math.cos(self.s / (1 + self.s) * math.pi / 2) ** 2
        bar = (torch.cos((t + self.s) / (1 + self.s) * (math.pi / 2)) ** 2 / start).clamp(1e-4, 0.9999)
        return torch.log(bar) - torch.log1p(-bar)

    def check(self, t: Tensor) -> None:
        """Raise ValueError where ``t`` is outside [0, 1] or NaN."""
        CosineSchedule().check(t)

    def grid(self) -> Tensor:
        """Return 1001 times from 0 to 1."""
        return CosineSchedule().grid()


def as_schedule(source: Any) -> Schedule:
    """Read a schedule from what a training loop has at hand.

    Args:
        source: a Schedule; an ``alphas_cumprod`` tensor (T,); the name of a standard schedule (``"linear"``,
            ``"scaled_linear"``, ``"squaredcos_cap_v2"``, ``"sigmoid"``, ``"cosine"``, ``"flow"``, ``"edm"``); or a
            diffusers scheduler, recognised by its attributes.

    Returns:
        The schedule, in float64, with the prediction type that the scheduler's config states (``"edm"`` for the
        EDM schedulers, whose config says epsilon while the network's output is F).

    Raises:
        TypeError: ``source`` is none of these, or a scheduler that training cannot use; the reason is in the message.

    Example:
        >>> as_schedule("flow")
        FlowSchedule(shift=1.0, num_train_timesteps=1, reversed=False, ...)
    """
    if isinstance(source, Tensor):
        return DiscreteSchedule(source)
    if isinstance(source, str):
        return _by_name(source)
    if all(hasattr(type(source), method) for method in ("log_snr", "check", "grid")):
        schedule: Schedule = source
        return schedule
    return _read_scheduler(source)


def schedule_names() -> list[str]:
    """Return the names that ``as_schedule`` takes."""
    return list(_NAMED)


def _by_name(name: str) -> Schedule:
    if name not in _NAMED:
        raise ValueError(f"Unknown schedule {name!r}; choose one of {schedule_names()}.")
    return _NAMED[name]()


_NAMED: dict[str, Callable[[], Schedule]] = {
    "linear": lambda: DiscreteSchedule.from_name("linear"),
    "scaled_linear": lambda: DiscreteSchedule.from_name("scaled_linear", beta_start=0.00085, beta_end=0.012),
    "squaredcos_cap_v2": lambda: DiscreteSchedule.from_name("squaredcos_cap_v2"),
    "sigmoid": lambda: DiscreteSchedule.from_name("sigmoid"),
    "cosine": CosineSchedule,
    "flow": FlowSchedule,
    "edm": EDMSchedule,
}


def _read_scheduler(scheduler: Any) -> Schedule:
    name = type(scheduler).__name__
    for refused, reason in REFUSED.items():
        if _is_a(scheduler, refused):
            raise TypeError(f"{name} has no training schedule: {reason}.")
    ordered = _is_a(scheduler, *_ORDERED_BY_SET_TIMESTEPS) or _config(scheduler, "use_flow_sigmas")
    if ordered and getattr(scheduler, "num_inference_steps", 0) is None:
        raise TypeError(
            f"{name}.add_noise before set_timesteps() reads its sigmas backwards (t = 0 gets the most noise): train "
            f"with DDPMScheduler.from_config(scheduler.config), or call set_timesteps() first."
        )
    if _is_a(scheduler, "SASolverScheduler") and _config(scheduler, "use_flow_sigmas"):
        raise TypeError(f"{name}.add_noise does not read use_flow_sigmas: train with FlowMatchEulerDiscreteScheduler.")
    for matches, read in _READERS:
        if matches(scheduler):
            return read(scheduler)
    raise TypeError(
        f"Cannot read a noise schedule from {name}; give a diffusers scheduler with `alphas_cumprod` or flow sigmas, "
        f"an alphas_cumprod tensor, a Schedule, or one of {schedule_names()}."
    )


def _is_a(scheduler: Any, *names: str) -> bool:
    return any(cls.__name__ in names for cls in type(scheduler).__mro__)


def _config(scheduler: Any, key: str, default: Any = None) -> Any:
    config = getattr(scheduler, "config", None)
    return default if config is None else getattr(config, "get", lambda k, d: getattr(config, k, d))(key, default)


def alphas_cumprod_of(scheduler: Any) -> Tensor:
    """Return the scheduler's own table in float64; from its betas where they reproduce it, as they are more precise."""
    table = torch.as_tensor(scheduler.alphas_cumprod).detach().cpu()
    betas = getattr(scheduler, "betas", None)
    if betas is not None and len(betas) == len(table):
        exact = alphas_cumprod_from_betas(torch.as_tensor(betas))
        rounding = max(1e-4, 2 * torch.finfo(table.dtype).eps)
        if bool(((table.double() - exact).abs() <= rounding * exact).all()):
            return exact
    return table


def _read_table(scheduler: Any) -> Schedule:
    coords: Coordinates = "ve" if _is_a(scheduler, *_EXPLODING) else "vp"
    return DiscreteSchedule(
        alphas_cumprod_of(scheduler), _config(scheduler, "prediction_type"), _config(scheduler, "sigma_data"), coords
    )


def _read_flow(scheduler: Any) -> Schedule:
    steps = int(_config(scheduler, "num_train_timesteps", 1000))
    dynamic = bool(_config(scheduler, "use_dynamic_shifting", False))  # then shifted per resolution, at sampling only
    shift = 1.0 if dynamic else float(_config(scheduler, "shift", _config(scheduler, "flow_shift", 1.0)))
    return FlowSchedule(shift, steps, s_min=shift / (steps + shift - 1))


def _read_reversed_flow(scheduler: Any) -> Schedule:
    return FlowSchedule(float(_config(scheduler, "shift", 1.0)), reversed=True)


def _read_edm(scheduler: Any) -> Schedule:
    low, high = (float(_config(scheduler, key)) for key in ("sigma_min", "sigma_max"))
    return EDMSchedule(float(_config(scheduler, "sigma_data")), low, high, "c_noise", "edm")


def _read_continuous_euler(scheduler: Any) -> Schedule:
    sigmas = (1 / alphas_cumprod_of(scheduler).double() - 1).sqrt()
    return EDMSchedule(None, sigmas[0].item(), sigmas[-1].item(), "c_noise", _config(scheduler, "prediction_type"))


def _read_arctangent(scheduler: Any) -> Schedule:
    """Stable Audio's t = 2/pi arctan(sigma) is the cosine schedule."""
    t_min, t_max = (math.atan(_config(scheduler, key)) * 2 / math.pi for key in ("sigma_min", "sigma_max"))
    t_min, t_max = t_min * (1 - 1e-6), min(1.0, t_max * (1 + 1e-6))  # its own timesteps are rounded to float32
    return CosineSchedule(64.0, t_min, t_max, _config(scheduler, "prediction_type"), 1.0, "ve")


def _read_wuerstchen(scheduler: Any) -> Schedule:
    return WuerstchenSchedule(float(scheduler.s), float(scheduler.scaler))


def _read_discrete_sigmas(scheduler: Any) -> Schedule:
    sigmas = torch.as_tensor(scheduler.discrete_sigmas).double()
    return DiscreteSchedule(1 / (1 + sigmas**2), _config(scheduler, "prediction_type"), None, "ve")


# in order: the first that matches reads
_READERS: list[tuple[Callable[[Any], bool], Callable[[Any], Schedule]]] = [
    (lambda s: bool(_config(s, "use_flow_sigmas")), _read_flow),
    (lambda s: _is_a(s, "MiniMaxH3Scheduler", "RFD4ProteinaScheduler"), _read_reversed_flow),
    (lambda s: _is_a(s, "DDPMWuerstchenScheduler"), _read_wuerstchen),
    (lambda s: _is_a(s, "CosineDPMSolverMultistepScheduler"), _read_arctangent),
    (
        lambda s: (_config(s, "timestep_type"), _config(s, "prediction_type")) == ("continuous", "v_prediction"),
        _read_continuous_euler,
    ),
    (lambda s: getattr(s, "alphas_cumprod", None) is not None, _read_table),
    (lambda s: _config(s, "sigma_data") is not None, _read_edm),
    (lambda s: getattr(s, "discrete_sigmas", None) is not None, _read_discrete_sigmas),
    (lambda s: hasattr(s, "scale_noise") and hasattr(s, "sigmas"), _read_flow),
]
