"""One training step of examples/train.py against a bare loop on the same model, interleaved in one process."""

import importlib.util
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from snrweights.integrations.config import load_preset

import snrweights

SCRIPT = Path(__file__).parents[2] / "examples" / "train.py"


def test_training_step_costs_at_most_two_percent():
    spec = importlib.util.spec_from_file_location("train", SCRIPT)
    train = importlib.util.module_from_spec(spec)
    sys.modules["train"] = train
    spec.loader.exec_module(train)
    config = load_preset(train.Config, SCRIPT.parent / "configs", "digits")
    accelerator = Accelerator(cpu=True)
    scheduler = train.make_noise_scheduler(config)
    weight = snrweights.get_weighting("smoothed_kl").bind(scheduler, normalize="mean")
    tracker = snrweights.LossVarianceTracker()
    model = train.make_model(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    ema = EMAModel(model.parameters(), foreach=True)
    images = torch.rand(config.train_batch_size, 1, 8, 8) * 2 - 1

    def ours(step):
        return train.training_loss(model, scheduler, weight, tracker, *train.draw(config, accelerator, images, step))

    def bare(step):
        noise, t = torch.randn_like(images), torch.randint(0, 1000, (len(images),))
        return F.mse_loss(model(scheduler.add_noise(images, noise, t), t).sample, noise)

    def timed(loss, step):
        start = time.perf_counter()
        loss(step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        return time.perf_counter() - start

    for step in range(6):
        timed(ours, step), timed(bare, step)
    # each step of ours against the mean of its neighbours: what drifts on the machine cancels
    times = [timed(bare if i % 2 == 0 else ours, i) for i in range(161)]
    ratio = statistics.median(2 * times[i] / (times[i - 1] + times[i + 1]) for i in range(1, len(times) - 1, 2))
    print(f"\ntraining step: {ratio:.4f} times a bare loop")
    assert ratio <= 1.02
