"""What examples/train_masked.py trains: the transformer, the weight over mask ratios, the loss of a forward pass."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import torch
from accelerate import Accelerator
from base_trainer import NOISE, SAMPLES, VALIDATION, BaseTrainer, Images
from evaluation import Evaluator
from masked_model import PixelTransformer, to_images, to_tokens
from masked_options import Options
from matplotlib.figure import Figure
from snrweights.integrations.masked_sampling import SAMPLERS
from snrweights.integrations.results import MetricsLog
from snrweights.integrations.sampling import guided, labels_of, shared_out
from torch import Tensor

from snrweights import plots
from snrweights.masked import (
    MaskedSchedule,
    draw_times,
    get_masked_schedule,
    mask_tokens,
    masked_loss,
    masked_weight,
    negative_elbo,
)
from snrweights.seeds import generator
from snrweights.settings import parse_settings

TIMES = 7  # a stream of random numbers, beside those of base_trainer


def make_network(options: Options) -> PixelTransformer:
    """Return the network, its weights drawn from the global random numbers."""
    data, model = options.data, options.model
    network = PixelTransformer(
        resolution=data.resolution,
        channels=data.channels,
        levels=data.levels,
        patch_size=model.patch_size,
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        dropout=model.dropout,
        num_classes=model.num_classes,
    )
    if model.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    return network


class MaskedWeight:
    """The weight of a method over mask ratios, scaled as the options say.

    Args:
        options: of the run.
        schedule: of the masks.
    """

    points = 4096

    def __init__(self, options: Options, schedule: MaskedSchedule) -> None:
        self.method, self.settings = options.weight.method, parse_settings(options.weight.set)
        self.schedule, self.counts, self.scale = schedule, options.masking.counts, 1.0
        if options.weight.normalize == "mean":
            # midpoints in an angle, whose sine squared is the ratio: that takes the root off either end
            angle = (torch.arange(self.points, dtype=torch.float64) + 0.5) * (math.pi / 2 / self.points)
            mean = (self(angle.sin().square()) * (2 * angle).sin()).mean() * (math.pi / 2)
            self.scale = 1 / mean.item()

    def __call__(self, ratio: Tensor) -> Tensor:
        """Return the weight at mask ratios in (0, 1)."""
        t = self.schedule.time(1 - ratio)
        return self.scale * masked_weight(t, self.schedule, self.method, **self.settings)

    def losses(self, logits: Tensor, tokens: Tensor, mask: Tensor, t: Tensor) -> Tensor:
        """Return the weighted loss of each sequence, in nats per token: (B,)."""
        options = {"counts": self.counts, "reduction": "none", **self.settings}
        losses = masked_loss(logits, tokens, mask, t, self.schedule, self.method, **options)
        return losses * (self.scale / tokens.shape[1])


class MaskedTrainer(BaseTrainer[Tensor]):
    """Model, weight and optimizer of masked diffusion.

    Times and masks are drawn for the global batch, of which every process takes its slice.
    """

    def __init__(self, options: Options, accelerator: Accelerator) -> None:
        super().__init__(options, accelerator)
        self.schedule = get_masked_schedule(options.masking.schedule)
        self.weight = MaskedWeight(options, self.schedule)
        self.mask_id = options.data.levels
        torch.manual_seed(options.run.seed)
        model = make_network(options)
        self.prepare(model, [{"params": [*model.parameters()]}])

    def draw_timesteps(self, passes: range) -> list[Tensor]:
        """Draw the times of a step together; return those of the global batch for each of its forward passes."""
        count = self.options.optimizer.train_batch_size * self.accelerator.num_processes
        stream = generator(self.options.run.seed, TIMES, passes.start, device=self.accelerator.device)
        times = draw_times(count * len(passes), draws=self.options.masking.draws, generator=stream)
        return list(times.split(count))

    def draw(self, images: Tensor, labels: Tensor, forward: int, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Flip images, drop labels, and mask for forward pass number ``forward``: tokens, mask, labels and times."""
        rank, device = self.accelerator.process_index, self.accelerator.device
        here = slice(len(images) * rank, len(images) * (rank + 1))
        stream = generator(self.options.run.seed, NOISE, forward, device=device)
        flip, drop = torch.rand((2, len(t)), generator=stream, device=device)[:, here]
        images, labels = self.flipped_and_dropped(images, labels, flip, drop)
        tokens = to_tokens(images, self.options.data.levels)
        everywhere = tokens.new_zeros(len(t), tokens.shape[1])
        counts = self.options.masking.counts
        _, mask = mask_tokens(everywhere, t, self.schedule, self.mask_id, counts=counts, generator=stream)
        return tokens, mask[here], labels, t[here]

    def predict(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return logits (B, L, levels) of the model that is trained."""
        classes = {"class_labels": labels} if self.options.model.num_classes else {}
        return self.model(tokens, **classes)

    def losses_of_pass(self, images: Tensor, labels: Tensor, forward: int, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean weighted loss, twice, of forward pass number ``forward``."""
        tokens, mask, labels, t = self.draw(images, labels, forward, drawn)
        logits = self.predict(tokens.masked_fill(mask, self.mask_id), labels)
        loss = self.weight.losses(logits, tokens, mask, t).mean()
        return loss.detach(), loss

    def example_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of images that are half masked."""
        tokens = to_tokens(images, self.options.data.levels)
        mask = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens) % 2 == 0
        t = self.schedule.time(torch.full((len(tokens),), 0.5, device=tokens.device, dtype=torch.float64))
        logits = self.predict(tokens.masked_fill(mask, self.mask_id), labels)
        return self.weight.losses(logits, tokens, mask, t).mean()

    def describe(self, step: int) -> dict[str, float]:
        """Return nothing: the log has the loss."""
        return {}

    def validate(self, held_out: Images, step: int, log: MetricsLog) -> None:
        """Measure the negative ELBO of the averaged weights on held-out images, with the same masks every time."""
        images, labels = (part.to(self.accelerator.device) for part in held_out)
        batch_size = self.options.optimizer.train_batch_size
        labels_of_batch = itertools.cycle(labels.split(batch_size))
        with self.averaged_weights():
            found = negative_elbo(
                lambda tokens: self.predict(tokens, next(labels_of_batch)),
                to_tokens(images, self.options.data.levels),
                self.mask_id,
                draws=self.options.output.elbo_draws,
                batch_size=batch_size,
                generator=generator(self.options.run.seed, VALIDATION),
            )
        bits = 1 / (found.length * math.log(2))
        values = {"negative_elbo": found.nats, "negative_elbo_standard_error": found.error}
        values |= {"bits_per_dim": found.bits_per_token, "bits_per_dim_standard_error": found.error * bits}
        log.write(step, **values)

    def plot_weights(self, path: Path) -> None:
        """Draw the weight over the mask ratio, beside that of the ELBO."""
        ratio = torch.linspace(0, 1, 1001, dtype=torch.float64)[1:-1]
        weights = {"elbo": torch.ones_like(ratio), self.weight.method: self.weight(ratio)}
        figure = Figure(figsize=(5.2, 3.4), layout="constrained", dpi=150)
        axes = figure.subplots()
        for style, (label, weight) in zip(("--", "-"), weights.items(), strict=False):
            axes.plot(ratio, weight, style, lw=2, label=label)
        axes.set_xlabel("mask ratio   (clean  ←   → all masked)")
        axes.set_ylabel("weight")
        axes.set_ylim(0, 1.1 * float(torch.stack(list(weights.values())).quantile(0.98)))  # some are infinite at 1
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        plots.save(figure, path)

    def averaged(self) -> PixelTransformer:
        """Return the network with averaged weights; every process calls it.

        The model that is trained, and the global random numbers, are left as they are.
        """
        with torch.random.fork_rng(devices=()):
            network = make_network(self.options).to(self.accelerator.device)
        self.copy_average(network)
        return network

    def save_model(self, folder: Path) -> None:
        """Save the averaged weights; every process calls it."""
        network = self.averaged()
        if self.accelerator.is_main_process:
            network.save_pretrained(folder)
        self.accelerator.wait_for_everyone()


class TokenEvaluator(Evaluator[MaskedTrainer]):
    """Samples tokens, from random numbers that are each image's own, and compares the images that they are."""

    how = (*Evaluator.how, "sampler", "sampling_schedule", "temperature", "choice_temperature")

    def sample(self, count: int) -> Tensor:
        """Sample so many images from the averaged weights, on every process: uint8 (count, C, H, W)."""
        data, output, classes = self.options.data, self.options.output, self.options.model.num_classes
        model, mask_id, device = self.trainer.averaged().eval(), self.trainer.mask_id, self.trainer.accelerator.device
        choices = {"choice_temperature": output.choice_temperature} if output.sampler == "confidence" else {}
        schedule = get_masked_schedule(output.sampling_schedule)

        def make(numbers: range) -> Tensor:
            labels = labels_of(numbers, classes, device)
            tokens = SAMPLERS[output.sampler](
                guided(model, labels, output.guidance_scale, classes),
                torch.full((len(numbers), data.channels * data.resolution**2), mask_id, device=device),
                mask_id,
                schedule,
                output.num_inference_steps,
                generators=[generator(self.options.run.seed, SAMPLES, i) for i in numbers],
                temperature=output.temperature,
                **choices,
            )
            return to_images(tokens, data.levels, data.channels, data.resolution)

        shape = (count, data.channels, data.resolution, data.resolution)
        return shared_out(make, shape, output.eval_batch_size, self.trainer.accelerator)
