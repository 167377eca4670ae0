"""The course of a run, the same for every script: data, the loop with its checkpoints and evaluations, and the end."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from base_trainer import BaseTrainer
from evaluation import Evaluator
from options import FREE
from snrweights.integrations.checkpoint import CheckpointError, Checkpoints, StopSignal
from snrweights.integrations.clock import Clock
from snrweights.integrations.config import changed_options, save_options
from snrweights.integrations.data import ImageTensors, SeededBatches, detach_worker, load_images, split
from snrweights.integrations.dry_run import shrink, stand_in, what_it_costs
from snrweights.integrations.results import MetricsLog, commit_of, save_results
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from snrweights.settings import parse_settings

WAIT = timedelta(hours=3)  # for the main process, which alone takes distances and the optimal loss

T = TypeVar("T", bound=BaseTrainer[Any])
Begin = Callable[[Any, Accelerator, Subset[Any]], tuple[T, Evaluator[T]]]
Finish = Callable[[T, MetricsLog], dict[str, Any]]


def run_or_try(options: Any, begin: Begin[T], finish: Finish[T]) -> None:
    """Train as the options say, or touch every part once and say what the run would cost."""
    try:
        if options.run.dry_run:
            with shrink(options) as small:
                trainer = train(small, begin, finish)
                print(what_it_costs(options, trainer))
        else:
            train(options, begin, finish)
    except CheckpointError as error:
        raise SystemExit(str(error)) from error


def load_data(options: Any) -> tuple[Subset[Any], Subset[Any]]:
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
    return split(images, data.validation_images, options.run.seed)


def check_launch(accelerator: Accelerator) -> None:
    """Refuse processes that do not know of each other: they would train apart, into one folder."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise SystemExit(
            f"{launched} processes were launched, but accelerate sees {accelerator.num_processes}: without a GPU, use "
            "`ACCELERATE_USE_CPU=true torchrun`."
        )


def train(options: Any, begin: Begin[T], finish: Finish[T]) -> T:
    """Train as the options say; return the trainer.

    Args:
        options: with the sections run, data, model, weight, optimizer and output.
        begin: from options, accelerator and training images to trainer and evaluator.
        finish: writes, on the main process, what the trainer leaves; returns facts for results.json.
    """
    output = Path(options.run.output_dir)
    settings = options.optimizer
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        dynamo_backend="inductor" if options.model.compile else None,
        log_with="tensorboard",
        project_dir=output,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)],
    )
    check_launch(accelerator)
    main_process = accelerator.is_main_process
    commit = commit_of(Path(__file__).parent) if main_process else None  # now: the files may change during a long run
    global_batch = settings.train_batch_size * accelerator.num_processes
    saved = output / "config.yaml"
    if saved.exists() and not (options.run.resume or options.run.overwrite):
        raise SystemExit(f"{output} holds a run: go on with --resume latest, begin anew with --overwrite.")
    try:
        data, held_out = load_data(options)
        trainer, evaluator = begin(options, accelerator, data)
    except (ValueError, ImportError) as error:  # an option that cannot be, or wants an extra: it says so
        raise SystemExit(str(error)) from error
    options = trainer.options  # where something was measured, they have it
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
        trainer.plot_weights(output / "weights.png")
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
            more = trainer.describe(step)
            log.write(step, loss=loss, lr=trainer.learning_rate(step), **more, seconds=clock.seconds)
            progress.set_postfix(loss=f"{loss:.4f}")
        if held and (last or (options.output.validation_steps and step % options.output.validation_steps == 0)):
            with clock.paused():
                trainer.validate(held, step, log)
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
    trainer.save_model(output / "model")
    evaluator.after(settings.max_steps)
    facts = finish(trainer, log)
    if main_process:
        end(options, log, commit=commit, **facts)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return trainer


def end(options: Any, log: MetricsLog, **facts: Any) -> None:
    """Write results.json, and say where everything is."""
    output = Path(options.run.output_dir)
    results = log.evaluations()[options.optimizer.max_steps]
    seconds = results.pop("seconds")
    save_results(
        output / "results.json",
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
