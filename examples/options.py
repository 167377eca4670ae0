"""Every option of train.py, in sections. A preset in configs/ sets some; the command line any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro


@dataclass
class RunOptions:
    """Where the run lies and how it starts."""

    output_dir: str = ""
    """Folder for everything the run leaves (default: runs/<preset>-<method>)."""
    overwrite: bool = False
    """Start anew in a folder that holds a run."""
    resume: Annotated[str | None, tyro.conf.arg(aliases=["--resume-from-checkpoint"])] = None
    """Go on from a checkpoint: latest, or its folder."""
    seed: int = 0
    """Of weights, images, noise and samples."""
    dry_run: bool = False
    """Touch every part once, small, and print what the run would cost."""


@dataclass
class DataOptions:
    """What to train on."""

    dataset: str = "digits"
    """Hub name, folder of images or of IDX files, data set saved to disk, or digits."""
    dataset_config_name: str | None = None
    """Configuration of a hub data set."""
    split: str = "train"
    """Split to train on."""
    image_column: str = "image"
    """Column that holds the images."""
    label_column: str = "label"
    """Column that holds the classes, where the model is conditional."""
    resolution: int = 32
    """Pixels of a side."""
    channels: Literal[1, 3] = 3
    """1 for grey, 3 for colour."""
    random_flip: bool = False
    """Flip images left to right at random."""
    validation_images: int = 0
    """Images held out of training to measure the loss on."""
    dataloader_num_workers: int = 0
    """Processes that decode images."""


@dataclass
class NetworkOptions:
    """What every network has."""

    num_classes: int = 0
    """Condition on that many classes; 0: unconditional."""
    class_dropout: float = 0.1
    """Share of training labels replaced by none, for guidance."""
    gradient_checkpointing: bool = False
    """Less memory for more computation."""
    compile: bool = False
    """torch.compile."""


@dataclass
class ModelOptions(NetworkOptions):
    """The UNet (diffusers' UNet2DModel)."""

    block_out_channels: tuple[int, ...] = (128, 256, 256, 256)
    """Channels of its levels."""
    layers_per_block: int = 2
    """Residual blocks per level."""
    attention: tuple[bool, ...] = (False, True, False, False)
    """Which levels have attention."""
    dropout: float = 0.0
    """In residual blocks."""


@dataclass
class ProcessOptions:
    """The forward process and what the model predicts."""

    process: Literal["discrete", "flow", "edm"] = "discrete"
    """A DDPM table, straight flow, or EDM's preconditioned network."""
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    """Discrete: what the model predicts."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = "linear"
    """Discrete: the noise schedule."""
    num_train_timesteps: int = 1000
    """Discrete: its number of timesteps."""
    rescale_betas_zero_snr: bool = False
    """Discrete: rescale it to zero terminal SNR."""
    time_density: Literal["uniform", "logit_normal", "log_normal", "log_uniform"] = "uniform"
    """Flow: uniform or logit_normal. EDM: log_normal or log_uniform sigma."""
    density_mean: float = 0.0
    """Mean of logit(t), or of ln sigma."""
    density_std: float = 1.0
    """Their standard deviation."""
    shift: float = 1.0
    """Flow: shift of t towards noise."""
    sigma_data: float | None = 0.5
    """EDM: standard deviation of the data; None: measured."""
    sigma_min: float = 0.002
    """EDM: least noise when sampling."""
    sigma_max: float = 80.0
    """EDM: most noise when sampling."""


@dataclass
class WeightOptions:
    """How much each noise level counts."""

    method: str = "smoothed_kl"
    """Weighting: `snrweights methods` prints the table."""
    set: tuple[str, ...] = ()
    """Its hyperparameters, NAME=VALUE."""
    normalize: Literal["mean", "none"] = "mean"
    """Scale the weight to average 1, so that switching methods keeps the learning rate."""
    clamp_max: float | None = None
    """Upper bound on the weight before that, for weights that are infinite somewhere."""
    learned_uncertainty: bool = False
    """Learn the size of the weighted loss at each noise level beside the model and divide by it, as EDM2 does."""


@dataclass
class SamplerOptions:
    """How noise levels are drawn."""

    draws: Literal["independent", "antithetic", "stratified"] = "independent"
    """Independent, or spread over all that an optimizer step draws."""
    importance: Literal["none", "gradient", "loss_second_moment", "variance", "gap"] | None = None
    """Draw by measured losses, with importance weights (default: as the method asks)."""
    importance_mode: Literal["resample", "reweight", "uncorrected"] = "resample"
    """resample keeps the objective, reweight and uncorrected change it."""
    importance_floor: float | None = None
    """Share of draws that stay where the process has them (default: the rule's)."""
    importance_refresh: int = 10
    """Forward passes between two computations of the density."""


@dataclass
class OptimizerOptions:
    """How the model is trained."""

    max_steps: int = 100_000
    """Optimizer steps."""
    train_batch_size: int = 128
    """Images per process and forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step."""
    learning_rate: float = 2e-4
    """Of Adam."""
    lr_scheduler: Literal["constant_with_warmup", "cosine", "linear"] = "constant_with_warmup"
    """Its course."""
    lr_warmup_steps: int = 500
    """Optimizer steps of linear warm-up."""
    max_grad_norm: float = 1.0
    """Clip gradients to this norm."""
    ema_decay: float = 0.9995
    """Largest decay of the exponential moving average of the weights."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of forward and backward."""


@dataclass
class OutputOptions:
    """What is written and measured, and when."""

    logging_steps: int = 50
    """Optimizer steps between two lines of metrics.jsonl."""
    validation_steps: int = 0
    """Optimizer steps between two measurements on the held-out images; 0: at the end only."""
    checkpointing_steps: int = 0
    """Optimizer steps between two checkpoints; 0: only when interrupted."""
    checkpoints_total_limit: int = 2
    """How many checkpoints are kept."""
    num_samples: int = 700
    """Images sampled at the end and compared with as many of the data set's."""
    evaluation_steps: tuple[int, ...] = ()
    """Optimizer steps after which, as at the end, images are sampled from the averaged weights and compared."""
    evaluation_samples: tuple[int, ...] = ()
    """Counts of images compared at these steps, and at the end as well (default: what is compared at the end)."""
    eval_batch_size: int = 100
    """Images sampled at once."""
    num_inference_steps: int = 50
    """Steps of the sampler: DDIM, Euler (flow) or Heun (EDM)."""
    guidance_scale: float = 1.0
    """Guidance towards the class; 1: none."""
    features: tuple[Literal["pixels", "lite0", "inception"], ...] = ("pixels",)
    """Features in which samples are compared with the data."""
    inception_weights: str | None = None
    """Local file of the Inception weights (default: downloaded)."""


@dataclass
class OutputWithOptimum(OutputOptions):
    """What is written and measured, and when."""

    optimal_loss: str = "none"
    """The loss that no model can beat, by noise level: measure it, or the file of a curve, or none."""


@dataclass
class Options:
    """Train a diffusion model with a chosen loss weighting."""

    preset: str = "digits"
    """Where the defaults come from: a file of examples/configs."""
    run: RunOptions = field(default_factory=RunOptions)
    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    process: ProcessOptions = field(default_factory=ProcessOptions)
    weight: WeightOptions = field(default_factory=WeightOptions)
    sampler: SamplerOptions = field(default_factory=SamplerOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    output: OutputWithOptimum = field(default_factory=OutputWithOptimum)


# what may differ between the parts of a resumed run
FREE = (
    *("run.output_dir", "run.overwrite", "run.resume", "run.dry_run", "output", "data.dataloader_num_workers"),
    *("model.compile", "optimizer.max_steps", "optimizer.train_batch_size"),  # the global batch must stay the same
)


COMMON_BOUNDS = {
    "> 0": (
        *("data.resolution", "optimizer.max_steps", "optimizer.train_batch_size", "optimizer.learning_rate"),
        *("optimizer.gradient_accumulation_steps", "optimizer.max_grad_norm", "output.logging_steps"),
        *("output.eval_batch_size", "output.checkpoints_total_limit", "output.evaluation_steps"),
    ),
    ">= 0": (
        *("run.seed", "data.validation_images", "data.dataloader_num_workers", "model.num_classes"),
        *("optimizer.lr_warmup_steps", "output.validation_steps", "output.checkpointing_steps"),
    ),
    "> 1": ("output.num_samples", "output.evaluation_samples"),
    "in [0, 1)": ("model.dropout", "model.class_dropout", "optimizer.ema_decay"),
}
BOUNDS = {
    "> 0": ("process.num_train_timesteps", "process.density_std", "process.sigma_data", "sampler.importance_refresh"),
    "> 1": ("output.num_inference_steps",),
    "in (0, 1]": ("sampler.importance_floor",),
}
HOLDS = {
    "> 0": lambda x: x > 0,
    ">= 0": lambda x: x >= 0,
    "> 1": lambda x: x > 1,
    "in [0, 1)": lambda x: 0 <= x < 1,
    "in (0, 1]": lambda x: 0 < x <= 1,
}


def check_bounds(options: Any, bounds: Mapping[str, Sequence[str]]) -> None:
    """Refuse values outside their bounds, naming flag and bound; None is within any."""
    for bound, names in bounds.items():
        for name in names:
            section, field_name = name.split(".")
            value = getattr(getattr(options, section), field_name)
            values = value if isinstance(value, tuple) else (value,)
            if value is not None and not all(map(HOLDS[bound], values)):
                raise SystemExit(f"`--{field_name.replace('_', '-')}` must be {bound}, got {value}.")


def check_options(options: Options) -> None:
    """Refuse values that would train nothing or fail late, naming flag and bound."""
    check_bounds(options, COMMON_BOUNDS)
    check_bounds(options, BOUNDS)
    levels, attention = options.model.block_out_channels, options.model.attention
    if len(levels) != len(attention):
        raise SystemExit(f"`--attention` needs one entry per level, {len(levels)}, got {len(attention)}.")
