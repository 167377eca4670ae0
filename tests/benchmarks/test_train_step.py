"""One training step of examples/train.py against a bare loop on the same model, interleaved in one process."""

import itertools
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler
from snrweights.integrations.config import load_preset

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
import train  # noqa: E402


def test_training_step_costs_at_most_two_percent():
    options = load_preset(train.Options, EXAMPLES / "configs", "digits")
    trainer = train.Trainer(options, Accelerator(cpu=True), train.PROCESSES["discrete"](options.process))
    images = torch.rand(options.optimizer.train_batch_size, 1, 8, 8) * 2 - 1
    batches = itertools.repeat((images, torch.zeros(len(images), dtype=torch.long)))
    scheduler, model, optimizer = DDPMScheduler(), trainer.model, trainer.optimizer.optimizer

    def bare(step):
        noise, t = torch.randn_like(images), torch.randint(0, 1000, (len(images),))
        loss = F.mse_loss(model(scheduler.add_noise(images, noise, t), t), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        trainer.ema.step(model.parameters())

    def timed(function, step):
        start = time.perf_counter()
        function(step)
        return time.perf_counter() - start

    def ours(step):
        trainer.step(step, batches)

    for step in range(1, 7):
        timed(ours, step), timed(bare, step)
    # each step of ours against the mean of its neighbours: what drifts on the machine cancels
    times = [timed(bare if i % 2 == 0 else ours, i) for i in range(301)]
    ratio = statistics.median(2 * times[i] / (times[i - 1] + times[i + 1]) for i in range(1, len(times) - 1, 2))
    print(f"\ntraining step: {ratio:.4f} times a bare loop of {statistics.median(times[::2]) * 1e3:.0f} ms")
    assert ratio <= 1.02
