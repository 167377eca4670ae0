"""A tracker's update against a training step of about 200 ms, interleaved in one process."""

import statistics
import time

import pytest
import torch

from snrweights import LossVarianceTracker

BATCH = 64


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@pytest.mark.parametrize(
    "options",
    [{}, {"decay": 0.999}, {"snapshot_every": 1}, {"unit": "epsilon"}],
    ids=["plain", "decay", "snapshots", "unit"],
)
def test_an_update_costs_at_most_one_percent_of_a_step(options):
    tracker, loss, log_snr = LossVarianceTracker(**options), torch.rand(BATCH), 4 * torch.randn(BATCH)
    prediction_type = "v_prediction" if tracker.unit else None
    weights = torch.nn.Linear(1024, 1024)
    images = torch.randn(512, 1024)

    def pass_of_a_model():
        weights(images).square().mean().backward()

    def update():
        tracker.update(loss, log_snr, prediction_type=prediction_type, gradient_square=loss)

    pass_of_a_model(), update()
    passes = max(1, round(0.2 / min(seconds(pass_of_a_model) for _ in range(5))))
    rounds = [(seconds(lambda: [pass_of_a_model() for _ in range(passes)]), seconds(update)) for _ in range(15)]
    step, cost = (statistics.median(times) for times in zip(*rounds, strict=True))
    ratio = statistics.median(own / whole for whole, own in rounds)
    print(f"\nupdate: {1e6 * cost:.0f} µs, {100 * ratio:.3f} % of a step of {1e3 * step:.0f} ms")
    assert 0.1 < step < 0.5
    assert ratio <= 0.01
