"""The three forward processes that the reference script trains on: discrete (VP), straight flow, and EDM.

A process says which schedule and target a model is trained with, where timesteps are drawn, how the model
is wrapped, and how images are sampled from it. All arithmetic of noising and targets is ``snrweights.process``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from snrweights.integrations.sampling import Denoise, heun, karras_sigmas
from torch import Tensor, nn

from snrweights import process
from snrweights.densities import Density, FlowUniform, LogUniform, log_normal_sigma, logit_normal
from snrweights.drawn import as_density
from snrweights.quantiles import Quantiles, quantiles
from snrweights.schedulers import as_schedule
from snrweights.schedules import EDMSchedule, FlowSchedule, Schedule
from snrweights.weightings.base import Weighting


class Plain(nn.Module):
    """A network that takes the noisy image and the timestep as they are."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the prediction, shape of ``x``."""
        output: Tensor = self.model(x, t, *args, return_dict=False, **kwargs)[0]
        return output


class Process(ABC):
    """A forward process with what training and sampling on it need.

    Attributes:
        schedule: timesteps to log-SNR.
        prediction_type: the target.
        density: over log-SNR, of the timesteps that ``timesteps`` makes of uniform numbers; None: the schedule's own.
        scheduler: the diffusers scheduler that is saved beside the model.
    """

    schedule: Schedule
    prediction_type: str
    density: Density | None
    scheduler: Any

    def timesteps(self, u: Tensor) -> Tensor:
        """Turn uniform numbers (B,) in [0, 1] into timesteps (B,); 0 is the noisiest end."""
        return self._quantiles.timesteps(u)

    def density_for(self, weighting: Weighting) -> Density | None:
        """Return the density that timesteps are drawn from under a weighting, as ``density`` has it.

        That is the weighting's own; for one with a rule, whose objective is the same whatever the density, the
        schedule's; else the process's.
        """
        return weighting.own_density(self.prediction_type) or (None if weighting.rule else self.density)

    @cached_property
    def _quantiles(self) -> Quantiles:
        return quantiles(self.schedule, as_density(self.density, self.schedule))

    @abstractmethod
    def sample(self, predict: Denoise, noise: Tensor, steps: int) -> Tensor:
        """Turn standard normal noise (B, C, H, W) into images; ``predict(x, t)`` is the model."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the module that is trained: called with (x, t), it returns the prediction."""
        return Plain(model)

    def noisy_and_target(self, images: Tensor, noise: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        """Return the model's input and what it is asked for, both of the images' shape."""
        x = process.add_noise(images, noise, log_snr, self.schedule.coords)
        return x, process.target(self.prediction_type, images, noise, log_snr, self.schedule.sigma_data)


class DiscreteProcess(Process):
    """A DDPM table of timesteps, drawn uniformly; DDIM samples."""

    density = None

    def __init__(self, prediction_type: str, beta_schedule: str, steps: int, rescale_betas_zero_snr: bool) -> None:
        self.scheduler = DDPMScheduler(
            num_train_timesteps=steps,
            beta_schedule=beta_schedule,
            prediction_type=prediction_type,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )
        self.schedule = as_schedule(self.scheduler)
        self.prediction_type = prediction_type

    def sample(self, predict: Denoise, noise: Tensor, steps: int) -> Tensor:
        """Sample with DDIM, trailing timesteps (arXiv 2305.08891)."""
        sampler = DDIMScheduler.from_config(self.scheduler.config, timestep_spacing="trailing")
        sampler.set_timesteps(steps)
        x = noise
        for t in sampler.timesteps:
            x = sampler.step(predict(x, t.expand(len(x)).to(x.device)), t, x, return_dict=False)[0]
        return x


TimeDensity = Literal["uniform", "logit_normal", "log_normal", "log_uniform"]


class FlowProcess(Process):
    """The straight flow of diffusers' FlowMatchEuler; t in [0, 1000], uniform or logit-normal, shifted."""

    prediction_type = "flow_prediction"

    def __init__(self, density: str, mean: float, std: float, shift: float) -> None:
        choices: dict[str, Density] = {"uniform": FlowUniform(shift), "logit_normal": logit_normal(mean, std, shift)}
        if density not in choices:
            raise ValueError(f"`time_density` of a flow must be one of {list(choices)}, got {density!r}.")
        self.density = choices[density]
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        # draws are continuous and reach below the scheduler's smallest sigma
        self.schedule = FlowSchedule(shift, self.scheduler.config.num_train_timesteps)

    def sample(self, predict: Denoise, noise: Tensor, steps: int) -> Tensor:
        """Sample with Euler steps of the scheduler."""
        sampler = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config)
        sampler.set_timesteps(steps)
        x = noise
        for t in sampler.timesteps:
            x = sampler.step(predict(x, t.expand(len(x)).to(x.device)), t, x, return_dict=False)[0]
        return x


class EDMProcess(Process):
    """EDM: x = x0 + sigma eps, a preconditioned network, log-normal or log-uniform sigma, Heun samples."""

    prediction_type = "edm"

    def __init__(self, density: str, mean: float, std: float, sigma_data: float, sigma_min: float, sigma_max: float):
        choices: dict[str, Density] = {
            "log_normal": log_normal_sigma(mean, std),
            "log_uniform": LogUniform(sigma_min, sigma_max),
        }
        if density not in choices:
            raise ValueError(f"`time_density` of EDM must be one of {list(choices)}, got {density!r}.")
        self.density = choices[density]
        self.schedule = EDMSchedule(sigma_data, sigma_min, sigma_max)
        self.scheduler = EDMEulerScheduler(sigma_min=sigma_min, sigma_max=sigma_max, sigma_data=sigma_data)
        self._range = (sigma_min, sigma_max)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the network in its preconditioning."""
        return process.EDMPreconditioned(model, self.schedule.sigma_data or 0.5)

    def sample(self, predict: Denoise, noise: Tensor, steps: int) -> Tensor:
        """Sample with Heun's method on the ODE of Karras 2022 (arXiv 2206.00364), Algorithm 1."""

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            levels = sigma.expand(len(x)).to(x.device, x.dtype)
            log_snr = -2 * torch.log(levels)
            return process.to_x0(predict(x, levels), x, log_snr, "edm", "ve", self.schedule.sigma_data)

        return heun(denoise, noise, karras_sigmas(steps, *self._range))


PROCESSES: dict[str, Callable[[Any], Process]] = {
    "discrete": lambda options: DiscreteProcess(
        options.prediction_type, options.beta_schedule, options.num_train_timesteps, options.rescale_betas_zero_snr
    ),
    "flow": lambda options: FlowProcess(options.time_density, options.density_mean, options.density_std, options.shift),
    "edm": lambda options: EDMProcess(
        options.time_density,
        options.density_mean,
        options.density_std,
        options.sigma_data,
        options.sigma_min,
        options.sigma_max,
    ),
}
