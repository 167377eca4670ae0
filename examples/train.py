"""Train a diffusion model with a chosen loss weighting.

accelerate launch examples/train.py
accelerate launch examples/train.py --preset digits-edm --method min_snr --set gamma=5 --output-dir runs/x
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from evaluation import Evaluator, ImageEvaluator
from loop import run_or_try
from options import Options, check_options
from snrweights.integrations.config import parse_options
from snrweights.integrations.floor import FILE, floor_of
from snrweights.integrations.processes import PROCESSES
from snrweights.integrations.results import MetricsLog
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from trainer import UNCERTAINTY, Trainer, make_weighting

import snrweights
from snrweights import plots
from snrweights.optimal import OptimalLossCurve

PRESETS = Path(__file__).parent / "configs"


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
    run_or_try(options, begin, finish)


def begin(options: Options, accelerator: Accelerator, data: Subset) -> tuple[Trainer, Evaluator[Trainer]]:
    """Measure what is to be measured; return what trains and what evaluates."""
    curve = floor_of(options.output.optimal_loss, Path(options.run.output_dir) / FILE, data, options, accelerator)
    options = with_measured(options, data, accelerator, curve)
    trainer = Trainer(options, accelerator, PROCESSES[options.process.process](options.process), curve)
    accelerator.print(f"Drawing timesteps with {trainer.sampler}.")
    return trainer, ImageEvaluator(options, trainer, data)  # features that are missing are named now, not at the end


def finish(trainer: Trainer, log: MetricsLog) -> dict[str, Any]:
    """Write figures and statistics of the loss by noise level; return facts of the sampler."""
    options = trainer.options
    output = Path(options.run.output_dir)
    trainer.tracker.sync()
    trainer.sampler.sync()
    if not trainer.accelerator.is_main_process:
        return {}
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
    if not isinstance(trainer.sampler, snrweights.ImportanceSampler):
        return {}
    predicted = trainer.sampler.predicted()
    print(f"Drawn by importance: {predicted}.")
    return {"sampling": asdict(predicted)}


if __name__ == "__main__":
    main()
