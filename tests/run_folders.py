"""Folders as runs leave them, made without training."""

import json

import torch
import yaml
from snrweights.integrations.results import image_grid

from snrweights import LossVarianceTracker
from snrweights.settings import parse_settings

PROCESS = {
    "process": "discrete",
    "prediction_type": "epsilon",
    "beta_schedule": "linear",
    "num_train_timesteps": 1000,
    "rescale_betas_zero_snr": False,
}


def make_tracker(path, seed=0, unit="epsilon", updates=40, snapshot_every=10):
    """Write a tracker that saw losses which grow with log-SNR and fall over the updates."""
    stream = torch.Generator().manual_seed(seed)
    tracker = LossVarianceTracker(unit=unit, snapshot_every=snapshot_every)
    for i in range(updates):
        log_snr = 4 * torch.randn(64, generator=stream)
        loss = log_snr.sigmoid() * (1 + 1 / (1 + i)) * torch.rand(64, generator=stream)
        tracker.update(loss, log_snr)
    path.mkdir(parents=True, exist_ok=True)
    tracker.save(path / "tracker.safetensors")
    return tracker


def make_run(path, method="min_snr", settings=("gamma=5",), seed=0, **tracker):
    """Write everything that a run leaves and a report reads."""
    make_tracker(path, seed, **tracker)
    config = {
        "preset": "digits",
        "run": {"seed": seed, "resume": None},
        "data": {"dataset": "digits"},
        "process": PROCESS,
        "weight": {"method": method, "set": list(settings), "normalize": "mean", "clamp_max": None},
        "optimizer": {"max_steps": 40, "learning_rate": 0.002},
        "global_batch": 64,
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    lines = [{"step": n, "loss": 1 / n + 0.01 * seed, "lr": 0.002 / n, "seconds": 0.1 * n} for n in range(10, 41, 10)]
    held_out = {"log_snr": [-4.0, 0.0, 4.0], "validation_loss_by_log_snr": [0.01, 0.2, 0.9]}
    lines += [{"step": n, "validation_loss": 0.37 + 1 / n, **held_out} for n in (20, 40)]
    lines += [{"step": n, "evaluation_seconds": 1.0, "fd_pixels_100": 90 / n, "kid_pixels_100": 0.5} for n in (20, 40)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = {
        "method": method,
        "hyperparameters": parse_settings(settings),
        "count": 100,
        "fd_pixels_100": 4.386123456 + seed,
        "fd_pixels_100_real_vs_real": 3.06,
        "kid_pixels_100": 0.0979,
        "kid_pixels_100_standard_error": 0.0024,
        "_timestamp": "2026-01-01T00:00:00",
    }
    (path / "results.json").write_text(json.dumps(results))
    pixels = torch.randint(256, (20, 1, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    image_grid(pixels, scale_to=8).save(path / "samples.png")
    return path
