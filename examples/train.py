"""Train a diffusion model with a chosen loss weighting.

accelerate launch examples/train.py
accelerate launch examples/train.py --preset digits-edm --method min_snr --set gamma=5 --output-dir runs/x
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from diffusers import DDPMPipeline, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from options import FREE, Options, check_options
from snrweights.integrations import metrics
from snrweights.integrations.accelerate import SumOverProcesses
from snrweights.integrations.checkpoint import (
    CheckpointError,
    Checkpoints,
    StopSignal,
    copy_whole,
    load_model_and_optimizer_state,
    model_and_optimizer_state,
    whole,
)
from snrweights.integrations.config import changed_options, parse_options, save_options
from snrweights.integrations.data import ImageTensors, SeededBatches, detach_worker, generator, load_images, seed_of
from snrweights.integrations.dry_run import shrink, stand_in, what_it_costs
from snrweights.integrations.features import extractor
from snrweights.integrations.processes import PROCESSES, Process
from snrweights.integrations.results import MetricsLog, image_grid, save_results
from snrweights.integrations.sampling import sample_images
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

import snrweights
from snrweights import plots
from snrweights.settings import parse_settings
from snrweights.statistics import LossStatistics

NOISE, VALIDATION, SAMPLES, MEASURE, SPLIT, DROPOUT = range(1, 7)  # streams of random numbers, beside the seed
PRESETS = Path(__file__).parent / "configs"


def make_model(options: Options) -> UNet2DModel:
    """Return the network, its weights drawn from the seed."""
    model = options.model
    torch.manual_seed(options.run.seed)
    unet = UNet2DModel(
        sample_size=options.data.resolution,
        in_channels=options.data.channels,
        out_channels=options.data.channels,
        layers_per_block=model.layers_per_block,
        block_out_channels=model.block_out_channels,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in model.attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(model.attention)),
        dropout=model.dropout,
        num_class_embeds=model.num_classes + 1 if model.num_classes else None,  # the last stands for no class
    )
    if model.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


class Trainer:
    """Model, weighting and optimizer, and one step of training them.

    Whatever is random is a function of (seed, forward pass): noise and timesteps are drawn for the global batch, of
    which every process takes its slice, so that neither a restart nor the number of processes changes a run. (But
    dropout in the network is drawn per process.)
    """

    def __init__(self, options: Options, accelerator: Accelerator, process: Process) -> None:
        self.options, self.accelerator, self.process = options, accelerator, process
        weighting = snrweights.get_weighting(options.weight.method, **parse_settings(options.weight.set))
        self.weight = weighting.bind(
            process.schedule,
            prediction_type=process.prediction_type,
            density=process.density,
            normalize="mean" if options.weight.normalize == "mean" else None,
            clamp_max=options.weight.clamp_max,
        )
        self.tracker = self.make_tracker(reduce=SumOverProcesses(accelerator))
        model = process.wrap(make_model(options))
        optimizer = torch.optim.Adam(model.parameters(), lr=options.optimizer.learning_rate)
        schedule = get_scheduler(
            options.optimizer.lr_scheduler,
            optimizer,
            num_warmup_steps=options.optimizer.lr_warmup_steps,
            num_training_steps=options.optimizer.max_steps + 1,  # so that the last step is not one of rate 0
        )
        self._lr_factor = schedule.lr_lambdas[0]
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        fused = not isinstance(self.model, FSDPModule)  # sharded tensors have no fused copy
        self.ema = EMAModel(self.model.parameters(), decay=options.optimizer.ema_decay, foreach=fused)
        self.ema.to(accelerator.device)

    def draw(self, images: Tensor, labels: Tensor, forward: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Flip images, drop labels, and draw noise and timesteps for forward pass number ``forward``."""
        rank, world, device = self.accelerator.process_index, self.accelerator.num_processes, self.accelerator.device
        here = slice(len(images) * rank, len(images) * (rank + 1))
        stream = generator(self.options.run.seed, NOISE, forward, device=device)
        everywhere = (len(images) * world, *images.shape[1:])
        noise = torch.randn(everywhere, generator=stream, device=device)[here]
        u, flip, drop = torch.rand((3, everywhere[0]), generator=stream, device=device)[:, here]
        if self.options.data.random_flip:
            images = torch.where(flip[:, None, None, None] < 0.5, images.flip(-1), images)
        labels = torch.where(drop < self.options.model.class_dropout, self.options.model.num_classes, labels)
        return images, noise, self.process.timesteps(u), labels

    def losses(self, images: Tensor, noise: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the unweighted loss of each sample, and its log-SNR."""
        log_snr = self.process.schedule.log_snr(t)
        x, target = self.process.noisy_and_target(images, noise, log_snr)
        classes = {"class_labels": labels} if self.options.model.num_classes else {}
        return snrweights.per_sample_mse(self.model(x, t, **classes), target), log_snr

    def step(self, step: int, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """Make optimizer step number ``step``, from 1; return the weighted loss, on the device."""
        accumulate, device = self.options.optimizer.gradient_accumulation_steps, self.accelerator.device
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        total = torch.zeros((), device=device)
        for forward in range((step - 1) * accumulate, step * accumulate):
            images, labels = (part.to(device, non_blocking=True) for part in next(batches))
            if self.options.model.dropout:
                torch.manual_seed(seed_of(self.options.run.seed, DROPOUT, forward, self.accelerator.process_index))
            with self.accelerator.accumulate(self.model):
                images, noise, t, labels = self.draw(images, labels, forward)
                losses, log_snr = self.losses(images, noise, t, labels)
                self.tracker.update(losses, log_snr, prediction_type=self.process.prediction_type)
                loss = (self.weight(t) * losses).mean()
                self.accelerator.backward(loss)
                total += loss.detach() / accumulate
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.options.optimizer.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.ema.step(self.model.parameters())
        return total

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of step number ``step``, from 1."""
        return self.options.optimizer.learning_rate * self._lr_factor(step)

    @torch.no_grad()
    def validate(self, held_out: tuple[Tensor, Tensor]) -> LossStatistics:
        """Measure the averaged weights on held-out images: each at four noise levels, the same every time."""
        images, labels = (part.repeat_interleave(4, 0) for part in held_out)
        stream = generator(self.options.run.seed, VALIDATION)
        noise = torch.randn(images.shape, generator=stream)
        u = (torch.randperm(len(images), generator=stream) + 0.5) / len(images)
        tracker = self.make_tracker()
        parts = zip(
            *(x.split(self.options.optimizer.train_batch_size) for x in (images, noise, u, labels)), strict=True
        )
        self.ema.store(self.model.parameters())
        self.ema.copy_to(self.model.parameters())
        self.model.eval()
        for batch in parts:
            images, noise, u, labels = (part.to(self.accelerator.device) for part in batch)
            losses, log_snr = self.losses(images, noise, self.process.timesteps(u), labels)
            tracker.update(losses, log_snr, prediction_type=self.process.prediction_type)
        self.model.train()
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # without a backward it still holds the whole weights
        self.ema.restore(self.model.parameters())
        return tracker.compute()

    def make_tracker(self, **options: Any) -> snrweights.LossVarianceTracker:
        """Return a tracker of the error of epsilon, whatever the model predicts."""
        return snrweights.LossVarianceTracker(unit="epsilon", sigma_data=self.process.schedule.sigma_data, **options)

    def state(self, running: Tensor) -> dict[str, Tensor]:
        """Return everything that a step changes, whole tensors; every process calls it."""
        averages = {f"ema.{i}": whole(value) for i, value in enumerate(self.ema.shadow_params)}
        self.tracker.sync()
        tracked = {f"tracker.{name}": value for name, value in self.tracker.state_dict().items()}
        scaler = self.accelerator.scaler
        scale = {f"scaler.{key}": torch.tensor(value) for key, value in (scaler.state_dict() if scaler else {}).items()}
        learnt = model_and_optimizer_state(self.model, self.optimizer.optimizer)
        return {**learnt, **averages, **tracked, **scale, "running": self.accelerator.reduce(running, "mean")}

    def restore(self, step: int, state: dict[str, Tensor]) -> Tensor:
        """Take over the state of a checkpoint; return the running loss."""
        load_model_and_optimizer_state(self.model, self.optimizer.optimizer, state)
        if self.accelerator.scaler:
            scale = {name.removeprefix("scaler."): value.item() for name, value in state.items() if "scaler." in name}
            self.accelerator.scaler.load_state_dict(scale)
        self.ema.optimization_step = step
        for i, value in enumerate(self.ema.shadow_params):
            copy_whole(value, state[f"ema.{i}"])
        tracked = {name.removeprefix("tracker."): value for name, value in state.items() if "tracker." in name}
        self.tracker.load_state_dict(tracked)
        return state["running"].to(self.accelerator.device)

    def save_model(self, folder: Path) -> None:
        """Save the averaged weights as a pipeline; every process calls it."""
        self.ema.copy_to(self.model.parameters())
        weights = self.accelerator.get_state_dict(self.model)
        if self.accelerator.is_main_process:
            unet = make_model(self.options)
            unet.load_state_dict({name.split("model.", 1)[1]: value for name, value in weights.items()})
            DDPMPipeline(unet, self.process.scheduler).save_pretrained(folder)
        self.accelerator.wait_for_everyone()


def load_data(options: Options) -> tuple[Subset, Subset]:
    """Return training and held-out images; the split is a function of the seed."""
    data = options.data
    try:
        rows = load_images(data.dataset, name=data.dataset_config_name, split=data.split, column=data.image_column)
    except FileNotFoundError as error:
        if not options.run.dry_run:
            raise SystemExit(str(error)) from None
        print(f"{error}\nDry run: random images of the same schema stand in.")
        rows = stand_in(data.image_column, data.label_column, data.resolution, data.channels, options.model.num_classes)
    labels = data.label_column if options.model.num_classes else None
    images = ImageTensors(rows, data.image_column, data.resolution, data.channels, labels, options.model.num_classes)
    if not 0 <= data.validation_images < len(images):
        raise SystemExit(f"`validation_images` must be in [0, {len(images)}), got {data.validation_images}.")
    order = torch.randperm(len(images), generator=generator(options.run.seed, SPLIT)).tolist()
    return Subset(images, order[data.validation_images :]), Subset(images, order[: data.validation_images])


def main(argv: list[str] | None = None) -> None:
    """Train, then write down everything that was learnt."""
    options = parse_options(Options, PRESETS, "digits", argv)
    options.run.output_dir = options.run.output_dir or f"runs/{options.preset}-{options.weight.method}"
    check_options(options)
    if options.run.dry_run:
        with shrink(options) as small:
            trainer = train(small)
            print(what_it_costs(options, trainer))
    else:
        train(options)


def train(options: Options) -> Trainer:
    """Train as the options say; return the trainer."""
    output = Path(options.run.output_dir)
    settings = options.optimizer
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        dynamo_backend="inductor" if options.model.compile else None,
        log_with="tensorboard",
        project_dir=output,
    )
    main_process = accelerator.is_main_process
    global_batch = settings.train_batch_size * accelerator.num_processes
    saved = output / "config.yaml"
    if saved.exists() and not (options.run.resume or options.run.overwrite):
        raise SystemExit(f"{output} holds a run: go on with --resume latest, begin anew with --overwrite.")
    trainer = Trainer(options, accelerator, PROCESSES[options.process.process](options.process))
    data, held_out = load_data(options)
    for features in options.output.features:
        extractor(features, weights=options.output.inception_weights)  # missing, it is said now and not at the end
    checkpoints = Checkpoints(output / "checkpoints", options.output.checkpoints_total_limit, accelerator)

    # sum and number of the losses since the last line: read when logged only, so that no step waits for the device
    start, running = 0, torch.zeros(2, device=accelerator.device)
    began = time.perf_counter()
    if options.run.resume:
        changes = changed_options(saved, options, free=FREE) if saved.exists() else []
        before, now = yaml.safe_load(saved.read_text()).get("global_batch") if saved.exists() else None, global_batch
        changes += [f"global batch: {before} -> {now}"] if before not in (None, now) else []
        if changes:
            raise SystemExit(f"{output} was run with other options; to resume, keep them: {'; '.join(changes)}.")
        found = checkpoints.find(options.run.resume)
        if found:
            start, state = checkpoints.load(found)
            running = trainer.restore(start, state)
            began -= state["seconds"].item()
            accelerator.print(f"Resuming from {found}, step {start}.")
        else:
            accelerator.print(f"No checkpoint in {output}: starting at step 0.")
    accelerator.wait_for_everyone()  # all have read what is there
    if main_process:
        if not options.run.resume:
            checkpoints.clear()
        output.mkdir(parents=True, exist_ok=True)
        save_options(options, saved, global_batch=global_batch)
        process = trainer.process
        choices = {"prediction_type": process.prediction_type, "density": process.density}
        labelled = {options.weight.method: trainer.weight.curve.weighting}
        plots.save(plots.plot_weights(process.schedule, labelled, **choices), output / "weights.png")
    log = MetricsLog(output / "metrics.jsonl", accelerator, keep_until=start)

    passes = range(
        start * settings.gradient_accumulation_steps, settings.max_steps * settings.gradient_accumulation_steps
    )
    batches = SeededBatches(
        len(data),
        settings.train_batch_size,
        options.run.seed,
        passes,
        accelerator.process_index,
        accelerator.num_processes,
    )
    workers = options.data.dataloader_num_workers
    pinned = accelerator.device.type == "cuda"
    loader = iter(
        DataLoader(data, batch_sampler=batches, num_workers=workers, pin_memory=pinned, worker_init_fn=detach_worker)
    )
    held = tuple(map(torch.stack, zip(*held_out, strict=True))) if len(held_out) else None
    stop, one = StopSignal(accelerator), torch.ones((), device=accelerator.device)
    progress = tqdm(
        total=settings.max_steps, initial=start, disable=not main_process, unit="step", desc="Training", mininterval=1
    )
    for step in range(start + 1, settings.max_steps + 1):
        running += torch.stack((trainer.step(step, loader), one))
        progress.update()
        last = step == settings.max_steps
        if step == settings.max_steps // 2:
            trainer.tracker.reset()  # the figure is of the second half: what the first steps were like hides the rest
        if step % options.output.logging_steps == 0 or last:
            total, count = accelerator.reduce(running, "mean").tolist()
            loss = total / count
            running.zero_()
            log.write(step, loss=loss, lr=trainer.learning_rate(step), seconds=time.perf_counter() - began)
            progress.set_postfix(loss=f"{loss:.4f}")
        if held and (last or (options.output.validation_steps and step % options.output.validation_steps == 0)):
            log.write_validation(step, trainer.validate(held))
        signal = stop()
        every = options.output.checkpointing_steps
        if signal or (every and (last or step % every == 0)):
            seconds = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
            checkpoints.save(step, {**trainer.state(running), "seconds": seconds})
        if signal:
            accelerator.print(f"Stopped by signal {signal} after step {step}; go on with --resume latest.")
            accelerator.end_training()
            raise SystemExit(128 + signal)
    progress.close()
    stop.restore()
    finish(options, trainer, data, log, seconds=time.perf_counter() - began)
    accelerator.end_training()
    return trainer


def finish(options: Options, trainer: Trainer, data: Subset, log: MetricsLog, seconds: float) -> None:
    """Write model, samples, figures and results, all of the averaged weights."""
    output, accelerator = Path(options.run.output_dir), trainer.accelerator
    trainer.save_model(output / "model")
    unet = UNet2DModel.from_pretrained(output / "model" / "unet")
    count = min(options.output.num_samples, len(data) // 2)
    denoiser = trainer.process.wrap(unet.to(accelerator.device).eval())
    samples = sample_images(
        trainer.process,
        denoiser,
        (count, options.data.channels, options.data.resolution, options.data.resolution),
        noise=lambda i: generator(options.run.seed, SAMPLES, i),
        steps=options.output.num_inference_steps,
        classes=options.model.num_classes,
        guidance_scale=options.output.guidance_scale,
        batch_size=options.output.eval_batch_size,
        accelerator=accelerator,
    )
    trainer.tracker.sync()
    if not accelerator.is_main_process:
        return
    trainer.tracker.save(output / "tracker.safetensors")
    figure = plots.plot_loss_by_noise(trainer.tracker.compute(), log.validations())
    plots.save(figure, output / "loss_by_noise.png")
    image_grid(samples[:100]).save(output / "samples.png")
    results = metrics.compare(
        samples,
        data,
        features=options.output.features,
        order=generator(options.run.seed, MEASURE),
        batch_size=options.output.eval_batch_size,
        device=accelerator.device,
        weights=options.output.inception_weights,
    )
    save_results(
        output / "results.json",
        method=options.weight.method,
        hyperparameters=parse_settings(options.weight.set),
        steps=options.optimizer.max_steps,
        seed=options.run.seed,
        training_seconds=round(seconds, 1),
        **results,
    )
    shown = ", ".join(f"{key} {value:.4g}" for key, value in results.items() if "error" not in key)
    print(f"{shown}. Everything is in {output}/")


if __name__ == "__main__":
    try:
        main()
    except CheckpointError as error:
        raise SystemExit(str(error)) from None
