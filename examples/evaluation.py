"""How the scripts evaluate: images sampled from the averaged weights, and their distances to the data."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate.utils import broadcast_object_list
from base_trainer import MEASURE, SAMPLES, BaseTrainer
from snrweights.integrations.clock import Clock
from snrweights.integrations.comparison import Comparison, counted
from snrweights.integrations.features import DISTANCE_NAMES
from snrweights.integrations.results import MetricsLog, image_grid, save_image
from snrweights.integrations.sampling import sample_images
from torch import Tensor
from torch.utils.data import Subset
from trainer import Trainer

from snrweights.seeds import generator

T = TypeVar("T", bound=BaseTrainer[Any])


class Evaluator(ABC, Generic[T]):
    """Evaluates a run at its evaluation steps and at the end; each leaves a line in metrics.jsonl.

    The same images of the data and the same noise every time, so that distances differ by the weights alone. The model
    that is trained, the global random numbers and the clock of training are left as they are.
    """

    how: tuple[str, ...] = ("num_inference_steps", "guidance_scale")  # options of sampling, which every line has

    def __init__(self, options: Any, trainer: T, data: Subset[Any]) -> None:
        self.options, self.trainer = options, trainer
        output = options.output
        self.during = sorted(set(output.evaluation_samples or (output.num_samples,)))
        self.at_the_end = sorted({output.num_samples, *(self.during if output.evaluation_steps else ())})
        if self.at_the_end[-1] > len(data):
            raise SystemExit(
                f"{self.at_the_end[-1]} samples are to be compared with as many of {len(data)} images: give fewer by "
                "`--num-samples` and `--evaluation-samples`."
            )
        self.made = {name: getattr(output, name) for name in self.how}
        with torch.random.fork_rng(devices=()):  # networks of features are drawn before their weights are read
            self.comparison = Comparison(
                data,
                features=output.features,
                order=generator(options.run.seed, MEASURE),
                batch_size=output.eval_batch_size,
                device=trainer.accelerator.device,
                weights=output.inception_weights,
            )

    def go_on(self, log: MetricsLog, clock: Clock) -> None:
        """Write to a run's log from here on; what stands in it already, made in the same way, is not repeated."""
        self.log, self.clock = log, clock
        lines = log.evaluations().items() if self.trainer.accelerator.is_main_process else ()
        self.done = broadcast_object_list([[step for step, line in lines if self.has_all(step, line)]])[0]

    def counts(self, step: int) -> list[int]:
        """Return how many samples are compared after a step, ascending."""
        return self.at_the_end if step == self.options.optimizer.max_steps else self.during

    def has_all(self, step: int, line: dict[str, float]) -> bool:
        """Whether a line has what an evaluation after that step would write."""
        features = [DISTANCE_NAMES[kind][0] for kind in self.options.output.features]
        names = {counted(name, count) for name in features for count in self.counts(step)}
        return names <= line.keys() and self.made.items() <= line.items()

    def after(self, step: int) -> None:
        """Evaluate the averaged weights after a step, if it is one to evaluate at; every process calls it."""
        last = step == self.options.optimizer.max_steps
        if step in self.done or not (last or step in self.options.output.evaluation_steps):
            return
        with self.clock.paused():
            began = time.perf_counter()
            counts = self.counts(step)
            samples = self.sample(counts[-1])
            if self.trainer.accelerator.is_main_process:
                values = self.comparison.distances(samples, counts)
                values |= self.comparison.floors(counts) if last else {}
                self.write(step, samples, evaluation_seconds=time.perf_counter() - began, **self.made, **values)
        self.done.append(step)

    @abstractmethod
    def sample(self, count: int) -> Tensor:
        """Sample so many images from the averaged weights, on every process: uint8 (count, C, H, W)."""

    def write(self, step: int, samples: Tensor, **values: float) -> None:
        """Write the first hundred samples, then the line, with the seconds of training so far."""
        try:
            save_image(image_grid(samples[:100]), Path(self.options.run.output_dir) / "samples.png")
            self.log.write(step, seconds=self.clock.seconds, **values)
        except OSError as error:
            message = f"The evaluation after step {step} could not be written: {error}."
            raise SystemExit(f"{message} Make room and go on with --resume latest.") from None


class ImageEvaluator(Evaluator[Trainer]):
    """Samples with the process's own sampler, from noise that is each image's own."""

    def sample(self, count: int) -> Tensor:
        """Sample so many images from the averaged weights, on every process: uint8 (count, C, H, W)."""
        data, output, process = self.options.data, self.options.output, self.trainer.process
        return sample_images(
            process,
            self.trainer.averaged()[0].eval(),
            (count, data.channels, data.resolution, data.resolution),
            noise=lambda i: generator(self.options.run.seed, SAMPLES, i),
            steps=output.num_inference_steps,
            classes=self.options.model.num_classes,
            guidance_scale=output.guidance_scale,
            batch_size=output.eval_batch_size,
            accelerator=self.trainer.accelerator,
        )
