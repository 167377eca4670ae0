"""What the trainers of the scripts share: optimizer, schedule, average, the optimizer step, and its state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from snrweights.integrations.checkpoint import (
    copy_whole,
    load_model_and_optimizer_state,
    model_and_optimizer_state,
    whole,
)
from snrweights.integrations.results import MetricsLog
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from snrweights.seeds import seed_of

NOISE, VALIDATION, SAMPLES, MEASURE, _, DROPOUT = range(1, 7)  # streams of random numbers, beside the seed
Images = tuple[Tensor, Tensor]  # (B, C, H, W) in [-1, 1], and classes (B,)
D = TypeVar("D")  # what is drawn for a forward pass ahead of it


class BaseTrainer(ABC, Generic[D]):
    """A model with its optimizer and the average of its weights, and one optimizer step.

    A step is a function of (seed, step); a trainer says what is drawn and what the loss is.
    """

    def __init__(self, options: Any, accelerator: Accelerator) -> None:
        self.options, self.accelerator = options, accelerator
        self.accumulation: int = options.optimizer.gradient_accumulation_steps

    def prepare(self, model: nn.Module, groups: list[dict[str, Any]]) -> None:
        """Set up the optimizer of these groups of parameters, its schedule, and the average of the weights."""
        settings = self.options.optimizer
        optimizer = torch.optim.Adam(groups, lr=settings.learning_rate)
        schedule = get_scheduler(
            settings.lr_scheduler,
            optimizer,
            num_warmup_steps=settings.lr_warmup_steps,
            num_training_steps=settings.max_steps + 1,  # so that the last step is not one of rate 0
        )
        self._lr_factor = schedule.lr_lambdas[0]
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        fused = not isinstance(self.model, FSDPModule)  # sharded tensors have no fused copy
        self.ema = EMAModel(self.model.parameters(), decay=settings.ema_decay, foreach=fused)
        self.ema.to(self.accelerator.device)

    @abstractmethod
    def draw_timesteps(self, passes: range) -> list[D]:
        """Draw the noise levels of all forward passes of a step."""

    @abstractmethod
    def losses_of_pass(self, images: Tensor, labels: Tensor, forward: int, drawn: D) -> tuple[Tensor, Tensor]:
        """Return the loss to report and the one to descend, both means, of forward pass number ``forward``."""

    @abstractmethod
    def example_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return a loss of these images, for a dry run to count what it costs."""

    @abstractmethod
    def describe(self, step: int) -> dict[str, float]:
        """Return what the log has of the last step beside its loss; every process calls it."""

    @abstractmethod
    def validate(self, held_out: Images, step: int, log: MetricsLog) -> None:
        """Measure the averaged weights on held-out images, and log it."""

    @abstractmethod
    def plot_weights(self, path: Path) -> None:
        """Draw the weight."""

    def step(self, step: int, batches: Iterator[Images]) -> Tensor:
        """Make optimizer step number ``step``, from 1; return the weighted loss, on the device."""
        accumulate, device = self.accumulation, self.accelerator.device
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        total = torch.zeros((), device=device)
        passes = range((step - 1) * accumulate, step * accumulate)
        for forward, drawn in zip(passes, self.draw_timesteps(passes), strict=True):
            images, labels = (part.to(device, non_blocking=True) for part in next(batches))
            if self.options.model.dropout:
                torch.manual_seed(seed_of(self.options.run.seed, DROPOUT, forward, self.accelerator.process_index))
            with self.accelerator.accumulate(self.model):
                told, loss = self.losses_of_pass(images, labels, forward, drawn)
                total += told / accumulate
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.options.optimizer.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.ema.step(self.model.parameters())
        return total

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of step number ``step``, from 1."""
        return self.options.optimizer.learning_rate * self._lr_factor(step)

    def flipped_and_dropped(self, images: Tensor, labels: Tensor, flip: Tensor, drop: Tensor) -> tuple[Tensor, Tensor]:
        """Flip images and drop labels, as uniform numbers (B,) and the options have it."""
        if self.options.data.random_flip:
            images = torch.where(flip[:, None, None, None] < 0.5, images.flip(-1), images)
        labels = torch.where(drop < self.options.model.class_dropout, self.options.model.num_classes, labels)
        return images, labels

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Have the averaged weights in the model, in evaluation mode, inside the block."""
        self.ema.store(self.model.parameters())
        self.ema.copy_to(self.model.parameters())
        self.model.eval()
        yield
        self.model.train()
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # without a backward it still holds the whole weights
        self.ema.restore(self.model.parameters())

    def copy_average(self, modules: nn.Module) -> None:
        """Fill modules whose parameters are those of the model, in its order, with the average; every process calls it.

        The values are whole on each process, however the model that is trained is sharded.
        """
        for parameter, value in zip(modules.parameters(), self.ema.shadow_params, strict=True):
            parameter.data = whole(value).clone()

    def state(self, running: Tensor) -> dict[str, Tensor]:
        """Return everything that a step changes, whole tensors; every process calls it."""
        averages = {f"ema.{i}": whole(value) for i, value in enumerate(self.ema.shadow_params)}
        scaler = self.accelerator.scaler
        scale = {f"scaler.{key}": torch.tensor(value) for key, value in (scaler.state_dict() if scaler else {}).items()}
        learnt = model_and_optimizer_state(self.model, self.optimizer.optimizer)
        return {**learnt, **averages, **scale, "running": self.accelerator.reduce(running, "mean")}

    def restore(self, step: int, state: dict[str, Tensor]) -> Tensor:
        """Take over the state of a checkpoint; return the running loss."""
        load_model_and_optimizer_state(self.model, self.optimizer.optimizer, state)
        if self.accelerator.scaler:
            scale = {name: value.item() for name, value in under("scaler.", state).items()}
            self.accelerator.scaler.load_state_dict(scale)
        self.ema.optimization_step = step
        for i, value in enumerate(self.ema.shadow_params):
            copy_whole(value, state[f"ema.{i}"])
        return state["running"].to(self.accelerator.device)


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the part of a state under a prefix."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
