"""Weights against the block of diffusers' train_text_to_image, and the cost of the import.

Outside the default run, which ignores this folder: `pytest -o addopts= -s tests/benchmarks`. Each ratio is of two
things timed in turn in one process, or in turn in fresh ones, so that what drifts on the machine cancels.
"""

import statistics
import subprocess
import sys
import time

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from snrweights import get_weighting, loss_weight

GAMMA = 5.0
SCHEDULER = DDPMScheduler()
TIMESTEPS = torch.randint(0, 1000, (128,), generator=torch.Generator().manual_seed(0))
BOUND = get_weighting("min_snr", gamma=GAMMA).bind(SCHEDULER)


def pasted(timesteps):
    """What train_text_to_image does at every step with --snr_gamma."""
    snr = compute_snr(SCHEDULER, timesteps)
    mse_loss_weights = torch.stack([snr, GAMMA * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
    if SCHEDULER.config.prediction_type == "epsilon":
        mse_loss_weights = mse_loss_weights / snr
    elif SCHEDULER.config.prediction_type == "v_prediction":
        mse_loss_weights = mse_loss_weights / (snr + 1)
    return mse_loss_weights


def looked_up(timesteps):
    return loss_weight(timesteps, SCHEDULER, "min_snr", gamma=GAMMA)


def seconds(function, calls):
    start = time.perf_counter()
    for _ in range(calls):
        function(TIMESTEPS)
    return (time.perf_counter() - start) / calls


@pytest.mark.parametrize(("ours", "least"), [(BOUND, 8.0), (looked_up, 3.0)], ids=["bound weighting", "loss_weight"])
def test_weights_against_the_pasted_block(ours, least, benchmark, request):
    torch.testing.assert_close(ours(TIMESTEPS), pasted(TIMESTEPS), rtol=3e-4, atol=0)
    seconds(ours, 500), seconds(pasted, 500)
    rounds = [(seconds(pasted, 100), seconds(ours, 400)) for _ in range(60)]
    ratio = statistics.median(theirs / own for theirs, own in rounds)
    theirs, own = (1e6 * statistics.median(times) for times in zip(*rounds, strict=True))
    print(f"\n{request.node.callspec.id}: {own:.1f} µs, pasted block {theirs:.1f} µs: {ratio:.1f} times as fast")
    benchmark.extra_info["ratio"] = ratio
    benchmark(ours, TIMESTEPS)
    assert ratio >= least


def test_the_import_costs_little_more_than_that_of_torch():
    def imported(module):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
        return time.perf_counter() - start

    imported("torch"), imported("snrweights")
    rounds = [(imported("snrweights"), imported("torch")) for _ in range(9)]
    ratio = statistics.median(ours for ours, _ in rounds) / statistics.median(theirs for _, theirs in rounds)
    print(f"\nimport snrweights: {ratio:.3f} times import torch")
    assert ratio <= 1.15
