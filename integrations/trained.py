"""A trained diffusers model as a denoiser: whatever it predicts, the estimate of x0 at a log-SNR."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import UNet2DModel
from snrweights.integrations.scheduler_files import load_scheduler
from torch import Tensor, nn

from snrweights.process import EDMPreconditioned, alpha_sigma, to_x0
from snrweights.schedulers import as_schedule
from snrweights.schedules import DiscreteSchedule, EDMSchedule, Schedule

_INDEX = "model_index.json"
_WEIGHTS = {"use_safetensors": True, "local_files_only": True}


@dataclass(frozen=True)
class TrainedModel:
    """A network with its schedule and target.

    Attributes:
        name: for people.
        unet: the network, in evaluation mode.
        schedule: that it was trained on; of EDM ``EDMSchedule`` in sigma.
        prediction_type: the target.
    """

    name: str
    unet: UNet2DModel
    schedule: Schedule
    prediction_type: str

    @property
    def conditional(self) -> bool:
        """Whether it is told a class."""
        return self.unet.config.num_class_embeds is not None

    def levels(self, count: int, low: float, high: float) -> Tensor:
        """Return at most ``count`` log-SNRs, evenly from ``low`` to ``high``, inside the schedule's range.

        Of a table of timesteps the nearest that there are.

        Raises:
            ValueError: fewer than two.
        """
        reached = self.schedule.log_snr(self.schedule.grid()).double()
        reached = reached[reached.isfinite()]
        ends = max(low, float(reached.min())), min(high, float(reached.max()))
        levels = torch.linspace(*ends, count, dtype=torch.float64)
        if isinstance(self.schedule, DiscreteSchedule):
            levels = self.schedule.log_snr_table[self._nearest(levels)]
        if len(levels.unique()) < 2:
            raise ValueError(
                f"{self.name} has not two noise levels at log-SNR {low} to {high}: its schedule reaches from "
                f"{float(reached.min()):.2f} to {float(reached.max()):.2f}."
            )
        return levels.unique()

    def _nearest(self, log_snr: Tensor) -> Tensor:
        table = self.schedule.log_snr_table.to(log_snr.device)  # type: ignore[attr-defined]
        return (log_snr[:, None].double() - table).abs().argmin(1)

    def denoise(self, x: Tensor, log_snr: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the estimate of x0, shape and dtype of x = x0 + sigma eps (B, C, H, W); ``log_snr`` (B,)."""
        level = log_snr.to(torch.float64)
        network: nn.Module = self.unet
        if isinstance(self.schedule, EDMSchedule):
            network, t = EDMPreconditioned(self.unet, cast("float", self.schedule.sigma_data)), torch.exp(-level / 2)
        elif isinstance(self.schedule, DiscreteSchedule):
            t = self._nearest(level)
        else:
            t = self.schedule.timestep_of(level)  # type: ignore[attr-defined]
        coords = self.schedule.coords
        alpha = alpha_sigma(level, coords)[0]
        at = alpha.to(x)[:, None, None, None] * x
        classes = {} if labels is None else {"class_labels": labels}
        t = t.float() if t.is_floating_point() else t
        output = network(at.float(), t.to(x.device), **classes)
        prediction = output if isinstance(output, Tensor) else output.sample
        return to_x0(prediction.to(x), at, level.to(x), self.prediction_type, coords, self.schedule.sigma_data)


def load_trained(
    folder: Path, name: str, *, scheduler: str | None = None, prediction_type: str | None = None, device: Any = "cpu"
) -> TrainedModel:
    """Load a model that diffusers saved: a pipeline with a ``UNet2DModel``, or such a model with its scheduler named.

    Args:
        folder: of the pipeline, or of the model.
        name: for people.
        scheduler: what ``load_scheduler`` takes; default: the pipeline's own.
        prediction_type: default: what the scheduler states.
        device: where to.

    Raises:
        FileNotFoundError: no model there.
        ValueError: a model of another kind, or no scheduler.
    """
    if (folder / _INDEX).is_file():
        parts = json.loads((folder / _INDEX).read_text())
        if parts.get("unet", [None, None])[1] != "UNet2DModel":
            kinds = {part: value[1] for part, value in parts.items() if isinstance(value, list)}
            raise ValueError(f"{folder} is a pipeline of {kinds}; `diagnose` reads those with a UNet2DModel.")
        scheduler, folder = scheduler or str(folder), folder / "unet"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds neither a pipeline ({_INDEX}) nor a model (config.json).")
    kind = json.loads((folder / "config.json").read_text()).get("_class_name")
    if kind != "UNet2DModel":
        raise ValueError(f"{folder} holds a {kind}; `diagnose` reads UNet2DModel.")
    if scheduler is None:
        raise ValueError(f"{folder} has no scheduler beside it: name one with `--scheduler`.")
    unet = UNet2DModel.from_pretrained(folder, **_WEIGHTS).to(device).eval()
    schedule = as_schedule(load_scheduler(scheduler))
    prediction_type = prediction_type or schedule.prediction_type
    if isinstance(schedule, EDMSchedule):
        if schedule.sigma_data is None:
            raise ValueError(f"{name}: of the schedulers over sigma, `diagnose` reads those of EDM, with sigma_data.")
        schedule = replace(schedule, timestep="sigma")
    if prediction_type is None:
        raise ValueError(f"`prediction_type` of {name} must be given: its scheduler {scheduler!r} does not state it.")
    return TrainedModel(name, unet, schedule, prediction_type)
