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

Denoise = Callable[[Tensor, Tensor], Tensor]


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
        denoiser: called as ``denoiser(x, t, class_labels=...)``.
        labels: (B,) or None for an unconditional model.
        scale: 1 is no guidance.
        unconditional: the label that stands for none.

    Source: Ho & Salimans 2022, arXiv 2207.12598.
    """
    if labels is None:
        return denoiser
    if scale == 1.0:
        return lambda x, t: denoiser(x, t, class_labels=labels)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        both = torch.cat([labels, torch.full_like(labels, unconditional)])
        towards, away = denoiser(torch.cat([x, x]), torch.cat([t, t]), class_labels=both).chunk(2)
        return away + scale * (towards - away)

    return predict


@torch.inference_mode()
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

    Batches of fixed content are shared out, and the noise of every image has a generator of its own.

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
    device, count = accelerator.device, shape[0]
    samples = torch.zeros(shape, dtype=torch.uint8)
    starts = range(0, count, batch_size)[accelerator.process_index :: accelerator.num_processes]
    for start in tqdm(starts, desc="Sampling", unit="batch", disable=not accelerator.is_main_process):
        numbers = range(start, min(start + batch_size, count))
        x = torch.stack([torch.randn(shape[1:], generator=noise(i)) for i in numbers]).to(device)
        labels = torch.tensor([i % classes for i in numbers], device=device) if classes else None
        images = process.sample(guided(denoiser, labels, guidance_scale, classes), x, steps)
        samples[start : numbers.stop] = to_bytes(images).cpu()
    return accelerator.reduce(samples.to(device), "sum").cpu()
