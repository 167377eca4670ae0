"""Sampling: noise levels, Heun's method, guidance, and many images shared out over processes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from accelerate import Accelerator
from snrweights.integrations.results import to_bytes
from torch import Tensor, nn
from tqdm.auto import tqdm

Denoise = Callable[..., Tensor]  # of the image and the noise level


def karras_sigmas(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Return ``steps`` levels from sigma_max to sigma_min, then 0: Eq. 5 of Karras 2022. Float64, (steps + 1,)."""
    if steps < 2:
        raise ValueError(f"`steps` must be >= 2, got {steps}.")
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    roots = sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))
    return torch.cat([roots**rho, torch.zeros(1, dtype=torch.float64)])


def heun(denoise: Denoise, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Integrate dx/dsigma = (x - denoise(x, sigma)) / sigma from sigmas[0] to sigmas[-1] by Heun's second-order method.

    The last step, to sigma = 0, is Euler's; n levels cost 2 n - 1 evaluations.
    """
    x = noise * sigmas[0].item()
    for sigma, following in pairwise(sigmas):
        slope = (x - denoise(x, sigma)) / sigma.item()
        step = (following - sigma).item()
        euler = x + step * slope
        if following > 0:
            slope = (slope + (euler - denoise(euler, following)) / following.item()) / 2
            euler = x + step * slope
        x = euler
    return x


def guided(denoiser: nn.Module, labels: Tensor | None, scale: float, unconditional: int) -> Denoise:
    """Return ``predict(x, t)``: the denoiser, guided towards labels by ``p_0 + scale (p_label - p_0)``.

    Args:
        denoiser: called as ``denoiser(x, t, class_labels=...)``, or with other inputs that have a row for each sample.
        labels: (B,) or None for an unconditional model.
        scale: 1 is no guidance.
        unconditional: the label that stands for none.

    Source: Ho & Salimans 2022, arXiv 2207.12598.
    """
    if labels is None:
        return denoiser
    if scale == 1.0:
        return lambda *inputs: denoiser(*inputs, class_labels=labels)

    def predict(*inputs: Tensor) -> Tensor:
        both = torch.cat([labels, torch.full_like(labels, unconditional)])
        towards, away = denoiser(*(torch.cat([x, x]) for x in inputs), class_labels=both).chunk(2)
        return away + scale * (towards - away)

    return predict


def sample_images(
    process: Any,
    denoiser: nn.Module,
    shape: tuple[int, int, int, int],
    *,
    noise: Callable[[int], torch.Generator],
    steps: int,
    classes: int,
    guidance_scale: float,
    batch_size: int,
    accelerator: Accelerator,
) -> Tensor:
    """Sample images as bytes, the same ones on any number of processes.

    Args:
        process: with ``sample``, as ``snrweights.integrations.processes`` has it.
        denoiser: its model, in evaluation mode.
        shape: (N, C, H, W).
        noise: from the number of an image to the generator of its noise.
        steps: of the sampler.
        classes: number of classes, of which image i gets i modulo that; 0: unconditional.
        guidance_scale: 1 is no guidance.
        batch_size: images at once.
        accelerator: of the run.

    Returns:
        uint8 (N, C, H, W), on the CPU of every process.
    """

    def make(numbers: range) -> Tensor:
        x = torch.stack([torch.randn(shape[1:], generator=noise(i)) for i in numbers]).to(accelerator.device)
        labels = labels_of(numbers, classes, accelerator.device)
        images: Tensor = process.sample(guided(denoiser, labels, guidance_scale, classes), x, steps)
        return images

    return shared_out(make, shape, batch_size, accelerator)


def labels_of(numbers: range, classes: int, device: torch.device) -> Tensor | None:
    """Return the classes of images by their numbers, in turn; of no classes None."""
    return torch.tensor([i % classes for i in numbers], device=device) if classes else None


@torch.inference_mode()
def shared_out(
    make: Callable[[range], Tensor], shape: tuple[int, int, int, int], batch_size: int, accelerator: Accelerator
) -> Tensor:
    """Make images in batches of fixed content that the processes share out.

    Args:
        make: from the numbers of a batch to its images (B, C, H, W) in [-1, 1]; a function of the numbers alone.
        shape: (N, C, H, W).
        batch_size: images at once.
        accelerator: of the run.

    Returns:
        uint8 (N, C, H, W), on the CPU of every process.
    """
    count = shape[0]
    samples = torch.zeros(shape, dtype=torch.uint8)
    starts = range(0, count, batch_size)[accelerator.process_index :: accelerator.num_processes]
    for start in tqdm(starts, desc="Sampling", unit="batch", disable=not accelerator.is_main_process):
        numbers = range(start, min(start + batch_size, count))
        samples[start : numbers.stop] = to_bytes(make(numbers)).cpu()
    return accelerator.reduce(samples.to(accelerator.device), "sum").cpu()
