"""Every option of train_masked.py, in sections. A preset in configs/masked/ sets some; the command line any."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from options import (
    COMMON_BOUNDS,
    DataOptions,
    NetworkOptions,
    OptimizerOptions,
    OutputOptions,
    RunOptions,
    check_bounds,
)

ScheduleName = Literal["linear", "cosine", "polynomial"]


@dataclass
class MaskedRunOptions(RunOptions):
    """Where the run lies and how it starts."""

    output_dir: str = ""
    """Folder for everything the run leaves (default: runs/masked-<preset>-<method>)."""


@dataclass
class TokenOptions(DataOptions):
    """What to train on."""

    levels: int = 256
    """Values of a pixel of a channel, which is a token: images are rounded to them."""


@dataclass
class TransformerOptions(NetworkOptions):
    """The transformer over squares of pixels."""

    patch_size: int = 1
    """Pixels of a side of a square, whose tokens share a position of the sequence."""
    hidden_size: int = 128
    """Of the transformer."""
    num_layers: int = 4
    """Its blocks."""
    num_heads: int = 4
    """Of attention."""
    dropout: float = 0.0
    """In attention and after each half of a block."""


@dataclass
class MaskingOptions:
    """How tokens are masked."""

    schedule: ScheduleName = "linear"
    """Probability that a token is kept at time t. The ELBO is the same for all."""
    counts: Literal["independent", "exact"] = "independent"
    """Mask each token by itself, or as many of a sequence as the time says."""
    draws: Literal["independent", "antithetic", "stratified"] = "antithetic"
    """Times of an optimizer step: independent, or spread over it."""


@dataclass
class MaskedWeightOptions:
    """How much each mask ratio counts."""

    method: str = "elbo"
    """Weighting: elbo, simple, flow, sigmoid, iddpm or edm."""
    set: tuple[str, ...] = ()
    """Its hyperparameters, NAME=VALUE."""
    normalize: Literal["mean", "none"] = "mean"
    """Scale the weight to average 1 over a uniform mask ratio, so that switching methods keeps the learning rate."""


@dataclass
class TokenOutputOptions(OutputOptions):
    """What is written and measured, and when."""

    num_inference_steps: int = 64
    """Steps of the sampler."""
    sampler: Literal["ancestral", "confidence"] = "ancestral"
    """The reverse process, or the surest tokens first, as MaskGIT does."""
    sampling_schedule: ScheduleName = "cosine"
    """Schedule of the sampler: the model knows no time, so that any will do."""
    temperature: float = 1.0
    """Divides the logits when sampling."""
    choice_temperature: float = 4.5
    """Confidence: of the noise in which tokens are kept, falling to 0."""
    elbo_draws: int = 16
    """Times at which each held-out image is masked to measure its ELBO."""


@dataclass
class Options:
    """Train a masked diffusion model of pixels with a chosen loss weighting."""

    preset: str = "digits"
    """Where the defaults come from: a file of examples/configs/masked."""
    run: MaskedRunOptions = field(default_factory=MaskedRunOptions)
    data: TokenOptions = field(default_factory=TokenOptions)
    model: TransformerOptions = field(default_factory=TransformerOptions)
    masking: MaskingOptions = field(default_factory=MaskingOptions)
    weight: MaskedWeightOptions = field(default_factory=MaskedWeightOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    output: TokenOutputOptions = field(default_factory=TokenOutputOptions)


BOUNDS = {
    "> 0": (
        *("model.patch_size", "model.hidden_size", "model.num_layers", "model.num_heads"),
        *("output.num_inference_steps", "output.elbo_draws"),
    ),
    ">= 0": ("output.temperature", "output.choice_temperature"),
    "> 1": ("data.levels",),
}


def check_options(options: Options) -> None:
    """Refuse values that would train nothing or fail late, naming flag and bound."""
    check_bounds(options, COMMON_BOUNDS)
    check_bounds(options, BOUNDS)
    data, model = options.data, options.model
    if data.levels > 256:
        raise SystemExit(f"`--levels` must be at most 256, which is what images are read with, got {data.levels}.")
    output, default = options.output, TokenOutputOptions().choice_temperature
    if output.sampler != "confidence" and output.choice_temperature != default:
        given = f"`--choice-temperature {output.choice_temperature}`"
        raise SystemExit(f"{given} does nothing in ancestral sampling: give --sampler confidence.")
    for whole, part, size, number in (
        ("resolution", "patch-size", data.resolution, model.patch_size),
        ("hidden-size", "num-heads", model.hidden_size, model.num_heads),
    ):
        if size % number:
            raise SystemExit(f"`--{part}` must divide `--{whole}`, {size}, got {number}.")
