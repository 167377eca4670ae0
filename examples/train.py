"""Train a diffusion model with a chosen loss weighting.

accelerate launch examples/train.py
accelerate launch examples/train.py --preset digits-edm --method min_snr --set gamma=5 --output-dir runs/x
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from evaluation import Evaluator
from options import FREE, Options, check_options
from snrweights.integrations.accelerate import log_loss_by_noise
from snrweights.integrations.checkpoint import CheckpointError, Checkpoints, StopSignal
from snrweights.integrations.clock import Clock
from snrweights.integrations.config import changed_options, parse_options, save_options
from snrweights.integrations.data import ImageTensors, SeededBatches, detach_worker, load_images, split
from snrweights.integrations.dry_run import shrink, stand_in, what_it_costs
from snrweights.integrations.floor import FILE, floor_of
from snrweights.integrations.processes import PROCESSES
from snrweights.integrations.results import MetricsLog, commit_of, save_results
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from trainer import UNCERTAINTY, Trainer, make_weighting

import snrweights
from snrweights import plots
from snrweights.optimal import OptimalLossCurve
from snrweights.settings import parse_settings

PRESETS = Path(__file__).parent / "configs"


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
    try:
        return split(images, data.validation_images, options.run.seed)
    except ValueError as error:
        raise SystemExit(str(error)) from None


def with_measured(options: Options, data: Subset, accelerator: Accelerator, curve: OptimalLossCurve | None) -> Options:
    """Fill in what is to be measured, if anything is: sigma_data and the method's ``data_variance``, in one pass."""
    weighting = make_weighting(options, curve)
    if options.process.sigma_data is not None and getattr(weighting, "data_variance", 0) is not None:
        return options
    loader = DataLoader(data, batch_size=256, num_workers=options.data.dataloader_num_workers)
    batches = (images for images, _ in tqdm(loader, "Measuring the data", disable=not accelerator.is_main_process))
    if options.data.random_flip:
        batches = (torch.cat((images, images.flip(-1))) for images in batches)
    variance = broadcast_object_list([snrweights.data_variance(batches) if accelerator.is_main_process else None])[0]
    accelerator.print(f"Mean variance of the data: {variance:.6g}.")
    options = copy.deepcopy(options)
    if options.process.sigma_data is None:
        options.process.sigma_data = math.sqrt(variance)
    if getattr(weighting, "data_variance", 0) is None:
        options.weight.set = (*options.weight.set, f"data_variance={variance!r}")
    return options


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
    commit = commit_of(Path(__file__).parent) if main_process else None  # now: the files may change during a long run
    global_batch = settings.train_batch_size * accelerator.num_processes
    saved = output / "config.yaml"
    if saved.exists() and not (options.run.resume or options.run.overwrite):
        raise SystemExit(f"{output} holds a run: go on with --resume latest, begin anew with --overwrite.")
    data, held_out = load_data(options)
    curve = floor_of(options.output.optimal_loss, output / FILE, data, options, accelerator)
    options = with_measured(options, data, accelerator, curve)
    trainer = Trainer(options, accelerator, PROCESSES[options.process.process](options.process), curve)
    accelerator.print(f"Drawing timesteps with {trainer.sampler}.")
    evaluator = Evaluator(options, trainer, data)  # features that are missing are named now and not at the end
    checkpoints = Checkpoints(output / "checkpoints", options.output.checkpoints_total_limit, accelerator)

    # sum and number of the losses since the last line: read when logged only, so that no step waits for the device
    start, running, seconds = 0, torch.zeros(2, device=accelerator.device), 0.0
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
            seconds = state["seconds"].item()
            accelerator.print(f"Resuming from {found}, step {start}.")
        else:
            accelerator.print(f"No checkpoint in {output}: starting at step 0.")
    accelerator.wait_for_everyone()  # all have read what is there
    if main_process:
        if not options.run.resume:
            checkpoints.clear()
        (output / "results.json").unlink(missing_ok=True)  # there again when the run has ended
        output.mkdir(parents=True, exist_ok=True)
        save_options(options, saved, global_batch=global_batch)
        process = trainer.process
        choices = {"prediction_type": process.prediction_type, "density": trainer.sampler.density}
        labelled = {options.weight.method: trainer.weight.curve.weighting}
        plots.save(plots.plot_weights(process.schedule, labelled, **choices), output / "weights.png")
    log = MetricsLog(output / "metrics.jsonl", accelerator, keep_until=start)
    clock = Clock(accelerator.device, seconds)
    evaluator.go_on(log, clock)
    evaluator.after(start)  # where the run ended between a checkpoint and the evaluation after the same step

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
        if step % options.output.logging_steps == 0 or last:
            total, count = accelerator.reduce(running, "mean").tolist()
            loss = total / count
            running.zero_()
            log_loss_by_noise(accelerator, trainer.tracker, step, since=(step - 1) * trainer.accumulation)
            gap = trainer.gap(since=(step - 1) * trainer.accumulation)
            log.write(step, loss=loss, lr=trainer.learning_rate(step), **gap, seconds=clock.seconds)
            progress.set_postfix(loss=f"{loss:.4f}")
        if held and (last or (options.output.validation_steps and step % options.output.validation_steps == 0)):
            with clock.paused():
                log.write_validation(step, trainer.validate(held))
        signal = stop()
        every = options.output.checkpointing_steps
        if signal or (every and (last or step % every == 0)):
            now = torch.tensor(clock.seconds, dtype=torch.float64)
            checkpoints.save(step, {**trainer.state(running), "seconds": now})
        if signal:
            accelerator.print(f"Stopped by signal {signal} after step {step}; go on with --resume latest.")
            accelerator.end_training()
            raise SystemExit(128 + signal)
        if not last:
            evaluator.after(step)
    progress.close()
    stop.restore()
    finish(options, trainer, evaluator, log, commit)
    accelerator.end_training()
    return trainer


def finish(options: Options, trainer: Trainer, evaluator: Evaluator, log: MetricsLog, commit: str | None) -> None:
    """Write model, samples, figures and results, all of the averaged weights."""
    output, accelerator = Path(options.run.output_dir), trainer.accelerator
    trainer.save_model(output / "model")
    evaluator.after(options.optimizer.max_steps)
    trainer.tracker.sync()
    trainer.sampler.sync()
    if not accelerator.is_main_process:
        return
    trainer.tracker.save(output / "tracker.safetensors")
    # of the second half: what the first steps were like hides the rest
    second_half = trainer.tracker.since(options.optimizer.max_steps * trainer.accumulation // 2)
    floor = trainer.floor(second_half)
    plots.save(plots.plot_loss_by_noise(second_half, log.validations(), floor), output / "loss_by_noise.png")
    history = [(update // trainer.accumulation, statistics) for update, statistics in trainer.tracker.history()]
    if len(history) > 1:
        plots.save(plots.plot_history(history), output / "loss_history.png")
    if options.weight.learned_uncertainty:
        learnt = snrweights.LearnedUncertainty.load(output / UNCERTAINTY)
        figure = plots.plot_uncertainty(learnt, second_half, trainer.weight.curve)
        plots.save(figure, output / "uncertainty.png")
    results = log.evaluations()[options.optimizer.max_steps]
    seconds = results.pop("seconds")
    facts = {}
    if isinstance(trainer.sampler, snrweights.ImportanceSampler):
        facts["sampling"] = asdict(trainer.sampler.predicted())
        print(f"Drawn by importance: {trainer.sampler.predicted()}.")
    save_results(
        output / "results.json",
        commit=commit,
        method=options.weight.method,
        hyperparameters=parse_settings(options.weight.set),
        steps=options.optimizer.max_steps,
        seed=options.run.seed,
        training_seconds=round(seconds, 1),
        **facts,
        **results,
    )
    shown = ", ".join(
        f"{key} {value:.4g}"
        for key, value in results.items()
        if key.startswith(("fid", "fd_", "kid")) and "error" not in key
    )
    print(f"{shown}. Everything is in {output}/")


if __name__ == "__main__":
    try:
        main()
    except CheckpointError as error:
        raise SystemExit(str(error)) from None
