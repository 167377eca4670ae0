"""A dry run: every part of a script touched once, small, and what the full run would cost."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from snrweights.integrations.features import extractor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

GPU, PEAK_FLOPS, UTILISATION = "A100 (312 TFLOP/s in bf16)", 312e12, 0.3
_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
ATTENTION_ON_CPU = {  # which torch's counter leaves out
    _attention: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    _attention_backward: lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4]),
}


@contextmanager
def shrink(options: Any) -> Iterator[Any]:
    """Give options of one step on two images, with one checkpoint, two sampler steps and a folder that goes away."""
    small = copy.deepcopy(options)
    with tempfile.TemporaryDirectory() as folder:
        small.run.output_dir, small.run.resume, small.run.overwrite = folder, None, True
        small.optimizer.max_steps = small.output.checkpointing_steps = small.optimizer.gradient_accumulation_steps = 1
        small.optimizer.train_batch_size = small.output.num_samples = small.output.num_inference_steps = 2
        small.output.evaluation_steps = small.output.evaluation_samples = ()
        small.model.compile = False  # takes minutes, and counts no FLOPs
        if not torch.cuda.is_available():
            small.optimizer.mixed_precision = "no"  # which a CPU emulates, twenty times as slowly
        small.data.dataloader_num_workers = min(small.data.dataloader_num_workers, 1)
        small.output.features = _available(small.output.features, small.output.inception_weights)
        small.data.validation_images = min(small.data.validation_images, 1)
        if getattr(small.output, "optimal_loss", "none") != "none":
            small.output.optimal_loss = "measure"  # of a few images, which are not those of a file
        if hasattr(small.output, "elbo_draws"):
            small.output.elbo_draws = 1
        yield small


def _available(names: tuple[str, ...], weights: str | None) -> tuple[str, ...]:
    """Return the features that can be loaded here; pixels stand in for the others, and it is said."""
    found = []
    for name in names:
        try:
            extractor(name, weights=weights)
        except (ModuleNotFoundError, OSError) as error:
            print(f"Features {name!r} cannot be loaded: {error}\nDry run: pixels stand in.")
            name = "pixels"
        found.append(name)
    return tuple(dict.fromkeys(found))


def stand_in(
    image_column: str, label_column: str, resolution: int, channels: int, num_classes: int
) -> datasets.Dataset:
    """Return eight random images in the columns of a data set that is not here."""
    shape = (resolution, resolution) if channels == 1 else (resolution, resolution, channels)
    pixels = np.random.default_rng(0).integers(0, 256, (8, *shape), dtype=np.uint8)
    data = datasets.Dataset.from_dict(
        {image_column: [Image.fromarray(x) for x in pixels], label_column: [i % max(num_classes, 1) for i in range(8)]}
    )
    return data.cast_column(image_column, datasets.Image(decode=False))


def what_it_costs(options: Any, trainer: Any) -> str:
    """Return parameters, memory, FLOPs of a step and GPU hours of the full run, as text.

    FLOPs are counted by torch on two images, forward and backward, and scaled to the batch; the memory of activations
    is what autograd saves for backward, likewise.
    """
    device = trainer.accelerator.device
    images = torch.zeros(2, options.data.channels, options.data.resolution, options.data.resolution, device=device)
    labels = torch.zeros(2, dtype=torch.long, device=device)
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU) as counter:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = trainer.example_loss(images, labels)
        loss.backward()
    batch, accumulate = options.optimizer.train_batch_size, options.optimizer.gradient_accumulation_steps
    parameters = sum(parameter.numel() for parameter in model.parameters())
    activations = sum(size for pointer, size in saved.items() if pointer not in weights) / 2 * batch
    step = counter.get_total_flops() / 2 * batch * accumulate
    hours = step * options.optimizer.max_steps / (UTILISATION * PEAK_FLOPS) / 3600
    lines = {
        "parameters": f"{parameters / 1e6:.2f} M",
        "weights, gradients, Adam, average": f"{parameters * 4 * 5 / 2**30:.2f} GiB in float32",
        "activations saved for backward": f"{activations / 2**30:.2f} GiB in float32 at {batch} images per process",
        "FLOPs of a step": f"{step / 1e12:.3f} T ({batch} x {accumulate} images per process)",
        "steps": f"{options.optimizer.max_steps}",
        "estimated time": f"{hours:.2g} hours on one {GPU} at {UTILISATION:.0%} utilisation, training alone",
    }
    return "Dry run: every part works.\n" + "\n".join(f"  {name}: {value}" for name, value in lines.items())
