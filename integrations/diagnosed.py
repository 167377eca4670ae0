"""A model or run in a folder, with the data that it was trained on and their optimal loss, diagnosed."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from snrweights.integrations.data import ImageTensors, load_images, split
from snrweights.integrations.floor import FILE, TrainingImages, training_images
from snrweights.integrations.reference_data import is_file_of_points, load_reference
from snrweights.integrations.trained import TrainedModel, load_trained
from torch import Tensor

from snrweights.diagnose import ModelGap, diagnose
from snrweights.optimal import OptimalLossCurve, optimal_loss

_CONFIG = "config.yaml"
_CURVE_DRAWS = 2048


@dataclass(frozen=True)
class Diagnosed:
    """A model with what it was measured on.

    Attributes:
        gap: what was measured.
        model: with its schedule and target.
        images: that it was trained on.
        curve: their optimal loss.
    """

    gap: ModelGap
    model: TrainedModel
    images: Tensor
    curve: OptimalLossCurve


def diagnosed(path: Path, name: str, arguments: argparse.Namespace, device: str, unit: str = "epsilon") -> Diagnosed:
    """Return the model in a folder, measured as the arguments of ``snrweights diagnose`` say.

    Without ``arguments.log_snr`` the levels are from end to end of what schedule and curve reach.

    Raises:
        FileNotFoundError: no model, no data or no curve there.
        ValueError: they cannot be read, or do not fit together, or the unit is none of the model's.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {str(path)!r}.")
    is_run = (path / _CONFIG).is_file()
    options = {"scheduler": arguments.scheduler, "prediction_type": arguments.prediction_type, "device": device}
    model = load_trained(path / "model" if is_run else path, name, **options)
    if unit == "edm" and model.schedule.sigma_data is None:
        raise ValueError(f"`--unit edm` needs a sigma_data, which {name} has none of; choose another unit.")
    data, classes = _data(path, model, arguments, is_run)
    curve = _kept_curve(path, arguments)
    levels = _levels(model, curve, arguments)
    if curve is None:
        known: dict[str, Any] = {"labels": data.labels, "flips": data.flips, "device": device}
        curve = optimal_loss(data.images, (-levels / 2).exp(), draws=_CURVE_DRAWS, seed=arguments.seed + 1, **known)

    def denoise(x: Tensor, log_snr: Tensor, index: Tensor) -> Tensor:
        return model.denoise(x, log_snr, None if classes is None else classes.to(index.device)[index])

    gap = diagnose(
        denoise,
        data.images,
        levels,
        curve,
        name=name,
        labels=data.labels,
        flips=data.flips,
        sigma_data=model.schedule.sigma_data,
        draws=arguments.draws,
        seed=arguments.seed,
        device=device,
    )
    return Diagnosed(gap, model, data.images, curve)


def _data(
    path: Path, model: TrainedModel, arguments: argparse.Namespace, is_run: bool
) -> tuple[TrainingImages, Tensor | None]:
    """Return what a model was trained on, and the classes that it is told."""
    if arguments.data is None:
        if not is_run:
            raise ValueError(f"`--data` must be given: {str(path)!r} has no {_CONFIG} of a run that says what it saw.")
        data = _data_of_run(path)
    else:
        size, channels = model.unet.config.sample_size, model.unet.config.in_channels
        fit: dict[str, Any] = {"resolution": size if isinstance(size, int) else None, "channels": channels}
        images, labels = load_reference(
            arguments.data,
            split=arguments.split,
            column=arguments.column,
            labels=arguments.labels,
            **({} if is_file_of_points(arguments.data) else fit),
        )
        if len(images[0]) != channels:
            raise ValueError(
                f"`--data` {arguments.data!r} has {len(images[0])} channels; {model.name} takes {channels}."
            )
        data = TrainingImages(
            torch.stack([images[i] for i in range(len(images))]), labels, arguments.flips, 0.0, arguments.seed
        )
    if model.conditional != (data.labels is not None):
        told = "is told a class: name its column with `--labels`" if model.conditional else "is told no class"
        raise ValueError(f"{model.name} {told}.")
    if data.labels is not None:
        classes = model.unet.config.num_class_embeds
        if not bool(((data.labels >= 0) & (data.labels < classes)).all()):
            found = f"{int(data.labels.min())} to {int(data.labels.max())}"
            raise ValueError(f"`--labels` {arguments.labels!r} holds {found}; {model.name} knows 0 to {classes - 1}.")
    return data, data.labels


def _data_of_run(path: Path) -> TrainingImages:
    config = yaml.safe_load((path / _CONFIG).read_text())
    options = SimpleNamespace(**{k: SimpleNamespace(**v) for k, v in config.items() if isinstance(v, dict)})
    data, classes = options.data, options.model.num_classes
    rows = load_images(data.dataset, name=data.dataset_config_name, split=data.split, column=data.image_column)
    labels = data.label_column if classes else None
    images = ImageTensors(rows, data.image_column, data.resolution, data.channels, labels, classes)
    return training_images(split(images, data.validation_images, options.run.seed)[0], options)


def _kept_curve(path: Path, arguments: argparse.Namespace) -> OptimalLossCurve | None:
    """Return the curve that is named; or the run's own, if it is that of a model that is always told its class."""
    if arguments.curve is not None:
        return OptimalLossCurve.load(arguments.curve)
    if arguments.data is None and (path / FILE).is_file():
        own = OptimalLossCurve.load(path / FILE)
        if not own.made.get("class_dropout"):
            return own
    return None


def _levels(model: TrainedModel, curve: OptimalLossCurve | None, arguments: argparse.Namespace) -> Tensor:
    """Return the levels: over the range that is named, or what the curve has of the schedule."""
    if arguments.log_snr is not None or curve is None:
        return model.levels(arguments.levels, *(arguments.log_snr or (-math.inf, math.inf)))
    low, high = (-2 * curve.sigmas[[-1, 0]].log()).tolist()
    levels = model.levels(arguments.levels, low, high)
    return levels[(levels >= low) & (levels <= high)]  # the timestep nearest to an end may lie beyond it
