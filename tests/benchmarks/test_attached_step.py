"""A training step with `snrweights.attach` against the same step without, interleaved in one process.

In one process and on one model. Before every step something is attached, outside the time measured, and for the plain
ones detached again, so that all steps have the same past; what the hook does for the first time counts.
"""

import random
import statistics
import time

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel

import snrweights

ROUNDS = 80
SCHEDULER = DDPMScheduler()


class Untrained(torch.nn.Module):
    """A denoiser that costs nearly nothing, so that the hook's own time shows."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, sample, t):
        return sample * self.scale


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def attach(model, track=False, **options):
    """Attach as it is after the audit's first steps."""
    return snrweights.attach(
        model, SCHEDULER, "min_snr", gamma=5.0, track=track, on_double_weighting="ignore", **options
    )


def test_an_attached_step_costs_at_most_one_percent_more_and_a_tracked_one_two():
    model = UNet2DModel(
        sample_size=32,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
    )
    optimizer = torch.optim.AdamW(model.parameters())
    images = torch.randn(7, 3, 32, 32)

    def step():
        noise, t = torch.randn_like(images), torch.randint(0, 1000, (len(images),))
        F.mse_loss(model(SCHEDULER.add_noise(images, noise, t), t).sample, noise).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def timed(kind):
        handle = attach(model, track=kind == "tracked")
        if kind.startswith("plain"):
            handle.detach()
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        assert handle.weighted == (not kind.startswith("plain"))
        handle.detach()
        return seconds

    kinds = ["plain", "attached", "tracked", "plain again"]
    order = random.Random(0)
    rounds = []
    for _ in range(ROUNDS + 2):
        order.shuffle(kinds)
        rounds.append({kind: timed(kind) for kind in kinds})
    del rounds[:2]
    # of two single steps, whose median stragglers do not move, as they move the mean of several
    ratios = {
        kind: [times[kind] / times[plain] for times in rounds for plain in ("plain", "plain again")]
        for kind in ("attached", "tracked")
    }
    # what the machine does to the measurement
    ratios["plain again"] = [times["plain again"] / times["plain"] for times in rounds]
    print(f"\nplain step: {statistics.median(times['plain'] for times in rounds) * 1e3:.0f} ms")
    for kind, values in ratios.items():
        low, median, high = statistics.quantiles(values, n=4)
        print(f"{kind}: {median:.4f} times a plain step (quartiles {low:.4f} to {high:.4f}, {len(values)} pairs)")
    assert statistics.median(ratios["attached"]) <= 1.01
    assert statistics.median(ratios["tracked"]) <= 1.02


def test_microseconds_that_the_hook_takes():
    """Measured and printed only."""
    models = {kind: Untrained() for kind in ("plain", "attached", "tracked")}
    for kind in ("attached", "tracked"):
        attach(models[kind], kind == "tracked", timestep=lambda sample, t: t)
    sample, t = torch.randn(7, 3, 32, 32), torch.randint(0, 1000, (7,))

    def seconds(model, calls=20):
        start = time.perf_counter()
        for _ in range(calls):
            model(sample, t).square().mean().backward()
        return (time.perf_counter() - start) / calls

    for model in models.values():
        seconds(model, 200)
    rounds = [[seconds(model) for model in models.values()] for _ in range(200)]
    plain = statistics.median(plain for plain, _, _ in rounds)
    attached = statistics.median(attached - plain for plain, attached, _ in rounds)
    tracked = statistics.median(tracked - plain for plain, _, tracked in rounds)
    print(f"\nhook: {attached * 1e6:.0f} µs a step, with tracking {tracked * 1e6:.0f} µs (bare: {plain * 1e6:.0f} µs)")
