"""The reference script, run as a user runs it and checked down to its files."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DDPMPipeline
from PIL import Image

import snrweights

SCRIPT = Path(__file__).parents[1] / "examples" / "train.py"
QUICK = ["--max-steps", "3", "--logging-steps", "2", "--num-samples", "6", "--num-inference-steps", "2"]


@pytest.fixture(scope="module")
def train():
    spec = importlib.util.spec_from_file_location("train", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train"] = module
    spec.loader.exec_module(module)
    return module


def launch(*argv, cwd):
    command = [sys.executable, "-m", "accelerate.commands.launch", str(SCRIPT), *argv]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    done = launch(*QUICK, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "digits-smoothed_kl", done


@pytest.mark.slow
def test_launched_without_a_flag_it_says_where_everything_is(run):
    output, done = run
    assert "runs/digits-smoothed_kl" in done.stdout
    assert "Fréchet distance (pixels, n=6)" in done.stdout
    assert {path.name for path in output.iterdir()} == {
        *("config.yaml", "metrics.jsonl", "samples.png", "loss_by_noise.png", "weights.png", "tracker.safetensors"),
        *("model", "results.json", "tensorboard"),
    }


@pytest.mark.slow
def test_configuration_and_metrics(run):
    config = yaml.safe_load((run[0] / "config.yaml").read_text())
    assert (config["method"], config["set"], config["normalize"]) == ("smoothed_kl", ["tau=0.2"], "mean")
    lines = [json.loads(line) for line in (run[0] / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3]
    assert all(0 < line["loss"] < 10 for line in lines)
    assert lines[-1]["lr"] == pytest.approx(1e-3 * 3 / 100)


@pytest.mark.slow
def test_tracker_saw_every_sample_of_the_second_half(run):
    assert snrweights.LossVarianceTracker.load(run[0] / "tracker.safetensors").compute().count.sum() == 2 * 64


@pytest.mark.slow
def test_model_loads_and_samples(run):
    pipeline = DDPMPipeline.from_pretrained(run[0] / "model")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.beta_schedule == "linear"
    assert 6e5 < sum(p.numel() for p in pipeline.unet.parameters()) < 8e5
    assert pipeline(batch_size=1, num_inference_steps=2).images[0].size == (8, 8)


@pytest.mark.slow
def test_results(run):
    results = json.loads((run[0] / "results.json").read_text())
    assert results["features"] == "pixels"
    assert results["count"] == 6
    assert results["frechet_distance"] > results["frechet_distance_real_vs_real"] > 0
    assert "_interpreter_path" not in results
    assert str(sys.prefix) not in json.dumps(results)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["samples.png", "loss_by_noise.png", "weights.png"])
def test_pictures_show_something(run, name):
    picture = Image.open(run[0] / name).convert("L")
    assert min(picture.size) > 60
    assert len(set(picture.resize((64, 64)).tobytes())) > 8


@pytest.mark.slow
def test_a_run_is_not_overwritten_unasked(run):
    again = launch(*QUICK, cwd=run[0].parents[1])
    assert again.returncode != 0
    assert "holds a run already" in again.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--prediction-type", "v_prediction", "--rescale-betas-zero-snr", "--method", "min_snr", "--set", "gamma=3"],
        ["--prediction-type", "sample", "--random-flip", "--normalize", "none", "--gradient-accumulation-steps", "2"],
        ["--mixed-precision", "bf16", "--dataloader-num-workers", "1", "--lr-scheduler", "cosine"],
    ],
)
def test_options(train, tmp_path, options):
    train.main([*QUICK, "--train-batch-size", "16", "--output-dir", str(tmp_path / "run"), *options])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["frechet_distance"] > 0


@pytest.mark.slow
def test_a_bad_weighting_is_said_before_any_work(train, tmp_path):
    argv = ["--method", "snr_plus_one", "--rescale-betas-zero-snr", "--output-dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match=r"'snr_plus_one' for prediction_type 'epsilon' is not finite at t = 999"):
        train.main(argv)
    assert not (tmp_path / "run").exists()


def test_draws_do_not_depend_on_the_number_of_processes(train):
    class Process:
        device = torch.device("cpu")

        def __init__(self, rank, world):
            self.process_index, self.num_processes = rank, world

    config = train.Config(random_flip=True)
    images = torch.randn(8, 1, 4, 4)
    whole = train.draw(config, Process(0, 1), images, 5)
    parts = [train.draw(config, Process(rank, 2), images[4 * rank : 4 * rank + 4], 5) for rank in range(2)]
    for one, two in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(one, torch.cat(two))
