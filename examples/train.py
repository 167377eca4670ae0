"""Train an unconditional diffusion model with a chosen loss weighting.

accelerate launch examples/train.py
accelerate launch examples/train.py --preset digits --method min_snr --set gamma=5 --output-dir runs/min_snr
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from snrweights.integrations.config import parse_config, save_config
from snrweights.integrations.data import ImageTensors, SeededBatches, generator, load_images
from snrweights.integrations.frechet import frechet_distance
from snrweights.integrations.results import image_grid, save_results
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

import snrweights
from snrweights import plots
from snrweights.cli import parse_settings


@dataclass
class Config:
    """Train an unconditional diffusion model with a chosen loss weighting."""

    preset: str = "digits"
    """Where the defaults come from: a file of examples/configs."""
    output_dir: str = ""
    """Folder for everything the run leaves (default: runs/<preset>-<method>)."""
    overwrite: bool = False
    """Start anew in a folder that holds a run."""
    seed: int = 0
    """Of weights, images, noise and samples."""

    dataset: str = "digits"
    """Hub name, folder of images, data set saved to disk, or digits."""
    dataset_config_name: str | None = None
    """Configuration of a hub data set."""
    split: str = "train"
    """Split to train on."""
    image_column: str = "image"
    """Column that holds the images."""
    resolution: int = 32
    """Pixels of a side."""
    channels: Literal[1, 3] = 3
    """1 for grey, 3 for colour."""
    random_flip: bool = False
    """Flip images left to right at random."""
    dataloader_num_workers: int = 0
    """Processes that decode images."""

    block_out_channels: tuple[int, ...] = (128, 256, 256, 256)
    """Channels of the UNet's levels."""
    layers_per_block: int = 2
    """Residual blocks per level."""
    attention: tuple[bool, ...] = (False, True, False, False)
    """Which levels have attention."""
    dropout: float = 0.0
    """In the UNet's residual blocks."""

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = "linear"
    """Noise schedule."""
    num_train_timesteps: int = 1000
    """Its number of timesteps."""
    rescale_betas_zero_snr: bool = False
    """Rescale it to zero terminal SNR."""
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    """What the model predicts."""
    method: str = "smoothed_kl"
    """Weighting: `snrweights methods` prints the table."""
    set: tuple[str, ...] = ()
    """Its hyperparameters, NAME=VALUE."""
    normalize: Literal["mean", "none"] = "mean"
    """Scale the weight to average 1, so that switching methods keeps the learning rate."""

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

    logging_steps: int = 50
    """Optimizer steps between two lines of metrics.jsonl."""
    num_samples: int = 800
    """Images sampled at the end; at most half the data set's, so that there is a floor."""
    eval_batch_size: int = 200
    """Images sampled at once."""
    num_inference_steps: int = 50
    """DDIM steps."""


def make_noise_scheduler(config: Config) -> DDPMScheduler:
    """Return the scheduler that training noises with."""
    return DDPMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
    )


def make_model(config: Config) -> UNet2DModel:
    """Return the network, its weights drawn from the seed."""
    torch.manual_seed(config.seed)
    return UNet2DModel(
        sample_size=config.resolution,
        in_channels=config.channels,
        out_channels=config.channels,
        layers_per_block=config.layers_per_block,
        block_out_channels=config.block_out_channels,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in config.attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention)),
        dropout=config.dropout,
    )


def make_target(noise_scheduler: DDPMScheduler, images: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return what the model is to predict."""
    if noise_scheduler.config.prediction_type == "v_prediction":
        return noise_scheduler.get_velocity(images, noise, t)
    return {"epsilon": noise, "sample": images}[noise_scheduler.config.prediction_type]


def training_loss(
    model: torch.nn.Module,
    noise_scheduler: DDPMScheduler,
    weight: snrweights.BoundWeighting,
    tracker: snrweights.LossVarianceTracker,
    images: Tensor,
    noise: Tensor,
    t: Tensor,
) -> Tensor:
    """Return the weighted loss of a batch; the tracker sees the unweighted one."""
    noisy = noise_scheduler.add_noise(images, noise, t)
    prediction = model(noisy, t, return_dict=False)[0]
    losses = snrweights.per_sample_mse(prediction, make_target(noise_scheduler, images, noise, t))
    tracker.update(losses, weight.schedule.log_snr(t))
    return (weight(t) * losses).mean()


def draw(config: Config, accelerator: Accelerator, images: Tensor, pass_: int) -> tuple[Tensor, Tensor, Tensor]:
    """Flip images and draw noise and timesteps: a function of (seed, forward pass) for the global batch.

    Every process draws for all and takes its slice, so that the number of processes changes nothing.
    """
    device, here = accelerator.device, len(images)
    everywhere = here * accelerator.num_processes
    mine = slice(here * accelerator.process_index, here * (accelerator.process_index + 1))
    stream = generator(config.seed, 1, pass_, device=device)
    noise = torch.randn(everywhere, *images.shape[1:], generator=stream, device=device)[mine]
    t = torch.randint(config.num_train_timesteps, (everywhere,), generator=stream, device=device)[mine]
    if config.random_flip:
        flip = torch.rand(everywhere, generator=stream, device=device)[mine] < 0.5
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    return images, noise, t


@torch.inference_mode()
def sample_images(config: Config, model: UNet2DModel, noise_scheduler: DDPMScheduler, count: int) -> Tensor:
    """Sample with DDIM; the noise of image i is a function of (seed, i)."""
    sampler = DDIMScheduler.from_config(noise_scheduler.config, timestep_spacing="trailing")
    sampler.set_timesteps(config.num_inference_steps)
    shape = (config.channels, config.resolution, config.resolution)
    noise = torch.stack([torch.randn(shape, generator=generator(config.seed, 2, i)) for i in range(count)])
    batches = []
    for x in tqdm(noise.split(config.eval_batch_size), desc="Sampling", unit="batch"):
        x = x.to(model.device)
        for t in sampler.timesteps:
            x = sampler.step(model(x, t, return_dict=False)[0], t, x, return_dict=False)[0]
        batches.append(x.clamp(-1, 1).cpu())
    return torch.cat(batches)


def measure(config: Config, data: ImageTensors, samples: Tensor) -> dict[str, Any]:
    """Compare samples with as many images, and those with as many others: the floor that no model can pass."""
    order = torch.randperm(len(data), generator=generator(config.seed, 3)).tolist()
    n = len(samples)
    real, other = (torch.stack([data[i] for i in order[k * n : (k + 1) * n]]) for k in range(2))
    return {
        "features": "pixels",
        "count": n,
        "frechet_distance": frechet_distance(samples.flatten(1), real.flatten(1)),
        "frechet_distance_real_vs_real": frechet_distance(other.flatten(1), real.flatten(1)),
    }


def main(argv: list[str] | None = None) -> None:
    """Train, then write down everything that was learnt."""
    config = parse_config(Config, Path(__file__).parent / "configs", "digits", argv)
    output = Path(config.output_dir or f"runs/{config.preset}-{config.method}")
    config.output_dir = str(output)
    if (output / "config.yaml").exists() and not config.overwrite:
        raise SystemExit(f"{output} holds a run already: give another --output-dir, or --overwrite.")
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with="tensorboard",
        project_dir=output,
    )

    # everything that can be wrong with the configuration is found out here, before any work
    noise_scheduler = make_noise_scheduler(config)
    weighting = snrweights.get_weighting(config.method, **parse_settings(config.set))
    weight = weighting.bind(noise_scheduler, normalize="mean" if config.normalize == "mean" else None)
    images = load_images(
        config.dataset, name=config.dataset_config_name, split=config.split, column=config.image_column
    )
    data = ImageTensors(images, config.image_column, config.resolution, config.channels)
    passes = config.max_steps * config.gradient_accumulation_steps
    batches = SeededBatches(
        len(data), config.train_batch_size, config.seed, passes, accelerator.process_index, accelerator.num_processes
    )
    loader = DataLoader(
        data,
        batch_sampler=batches,
        num_workers=config.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )

    model = make_model(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_steps,
    )
    ema = EMAModel(model.parameters(), decay=config.ema_decay, foreach=True)
    ema.to(accelerator.device)
    model, optimizer = accelerator.prepare(model, optimizer)
    tracker = snrweights.LossVarianceTracker()

    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        save_config(config, output / "config.yaml")
        plots.save(plots.plot_weights(noise_scheduler, {config.method: weighting}), output / "weights.png")
        metrics = (output / "metrics.jsonl").open("w")
    accelerator.init_trackers("tensorboard")
    start = time.perf_counter()
    running = torch.zeros((), device=accelerator.device)  # read only when logged, so that no step waits for the device
    progress = tqdm(total=config.max_steps, disable=not accelerator.is_main_process, unit="step", desc="Training")
    step = 0
    for pass_, batch in enumerate(loader):
        with accelerator.accumulate(model):
            batch = batch.to(accelerator.device, non_blocking=True)
            drawn = draw(config, accelerator, batch, pass_)
            loss = training_loss(model, noise_scheduler, weight, tracker, *drawn)
            accelerator.backward(loss)
            running += loss.detach() / config.gradient_accumulation_steps
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        step += 1
        if step == config.max_steps // 2:
            tracker.reset()  # the figure is of the second half: what the first steps were like hides the rest
        lr_scheduler.step()
        ema.step(model.parameters())
        progress.update()
        if step % config.logging_steps == 0 or step == config.max_steps:
            since = (step - 1) % config.logging_steps + 1
            mean_loss = accelerator.reduce(running, "mean").item() / since
            running.zero_()
            values = {"loss": mean_loss, "lr": lr_scheduler.get_last_lr()[0], "seconds": time.perf_counter() - start}
            accelerator.log(values, step=step)
            if accelerator.is_main_process:
                metrics.write(json.dumps({"step": step, **values}) + "\n")
                metrics.flush()
            progress.set_postfix(loss=f"{mean_loss:.4f}")
    progress.close()
    seconds = time.perf_counter() - start

    if accelerator.is_main_process:
        metrics.close()
        finish(config, output, accelerator.unwrap_model(model), ema, noise_scheduler, tracker, data, seconds)
    accelerator.end_training()


def finish(
    config: Config,
    output: Path,
    model: UNet2DModel,
    ema: EMAModel,
    noise_scheduler: DDPMScheduler,
    tracker: snrweights.LossVarianceTracker,
    data: ImageTensors,
    seconds: float,
) -> None:
    """Write model, samples, figures and results, all of the averaged weights."""
    ema.copy_to(model.parameters())
    model.eval()
    DDPMPipeline(model, noise_scheduler).save_pretrained(output / "model")
    tracker.save(output / "tracker.safetensors")
    plots.save(plots.plot_loss_by_noise(tracker.compute(), target=config.prediction_type), output / "loss_by_noise.png")
    samples = sample_images(config, model, noise_scheduler, min(config.num_samples, len(data) // 2))
    image_grid(samples[:100]).save(output / "samples.png")
    results = measure(config, data, samples)
    save_results(
        output / "results.json",
        method=config.method,
        hyperparameters=parse_settings(config.set),
        steps=config.max_steps,
        seed=config.seed,
        training_seconds=round(seconds, 1),
        **results,
    )
    print(
        f"Fréchet distance ({results['features']}, n={results['count']}): {results['frechet_distance']:.4f}; "
        f"real against real: {results['frechet_distance_real_vs_real']:.4f}. Everything is in {output}/"
    )


if __name__ == "__main__":
    main()
