"""Two gloo processes against one process with the same global batch."""

import json

import pytest
import torch
from fsdp_on_cpu import shard
from PIL import Image
from safetensors.torch import load_file
from training import TINY, final_state, main, run_two

pytestmark = pytest.mark.slow
STEPS = 4
COMMON = [*TINY, "--dropout", "0", "--max-steps", str(STEPS), "--checkpointing-steps", "2", "--num-samples", "6"]
COMMON += ["--eval-batch-size", "2", "--random-flip", "--logging-steps", "1", "--lr-warmup-steps", "100"]
COMMON += ["--evaluation-steps", "2", "--evaluation-samples", "5"]
IMPORTANCE = ["--importance", "gradient", "--importance-refresh", "2", "--draws", "stratified"]


def two(output, *argv, before=None):
    """Run train.py on two processes."""
    output.parent.mkdir(exist_ok=True)
    run_two([*COMMON, "--output-dir", str(output), *argv], output.parent, before=before)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    output = tmp_path_factory.mktemp("one") / "run"
    main([*COMMON, *IMPORTANCE, "--train-batch-size", "8", "--output-dir", str(output)])
    return output


@pytest.fixture(scope="module", params=[None, shard], ids=["ddp", "fsdp"])
def both(request, tmp_path_factory):
    output = tmp_path_factory.mktemp("two") / "run"
    two(output, *IMPORTANCE, "--train-batch-size", "4", before=request.param)
    return output, request.param


def log(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_losses_weights_and_statistics_are_equal_to_float_tolerance(one, both):
    first, second = final_state(one, STEPS), final_state(both[0], STEPS)
    assert first.keys() == second.keys()
    for name in first:
        if name.startswith("sampler."):  # a row for each process, all of which know what both have seen
            second[name] = second[name][:1]
        # Adam turns rounding of gradients near 0 into steps of up to the learning rate: 2e-4 over the four
        torch.testing.assert_close(
            first[name], second[name], rtol=1e-4, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
    torch.testing.assert_close(first["tracker.moments"], second["tracker.moments"], rtol=1e-5, atol=1e-5)
    for a, b in zip(log(one), log(both[0]), strict=True):
        for name in a.keys() & {"loss", "validation_loss", "lr", "step"}:
            assert a[name] == pytest.approx(b[name], rel=1e-5), name


def test_the_weights_moved(one):
    start, end = (load_file(one / "checkpoints" / f"step-{step:08d}" / "state.safetensors") for step in (2, 4))
    moved = [float((end[name] - start[name]).abs().max()) for name in start if name.startswith("model.")]
    assert sorted(moved)[len(moved) // 2] > 1e-4  # the comparison above is not one of two untouched models


def test_samples_are_the_same_images(one, both):
    pictures = [Image.open(run / "samples.png") for run in (one, both[0])]
    assert pictures[0].size == pictures[1].size
    differences = torch.tensor([abs(a - b) for a, b in zip(*(p.convert("L").tobytes() for p in pictures), strict=True)])
    assert differences.max() <= 1  # the models differ by rounding


def test_evaluations_over_training_are_equal_to_float_tolerance(one, both):
    lines = [[line for line in log(run) if "fd_pixels_5" in line] for run in (one, both[0])]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]] == [2, STEPS]
    for a, b in zip(*lines, strict=True):
        assert a["fd_pixels_5"] == pytest.approx(b["fd_pixels_5"], rel=1e-3)
    assert lines[0][0]["fd_pixels_5"] != lines[0][1]["fd_pixels_5"]


def test_resumed_it_ends_bit_equal(both, tmp_path):
    run, before = both
    resumed = tmp_path / "run"
    (resumed / "checkpoints").mkdir(parents=True)
    (resumed / "checkpoints" / "step-00000002").symlink_to(run / "checkpoints" / "step-00000002")
    (resumed / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    two(resumed, *IMPORTANCE, "--train-batch-size", "4", "--resume", "latest", before=before)
    first, second = final_state(run, STEPS), final_state(resumed, STEPS)
    different = [name for name in first if not torch.equal(first[name], second[name])]
    # a process's share of the statistics and of the running loss is summed in another order
    assert different in ([], ["tracker.moments"])
    torch.testing.assert_close(first["tracker.moments"], second["tracker.moments"], rtol=1e-12, atol=0)


OF_THE_BATCH = ["--process", "edm", "--time-density", "log_normal", "--density-mean", "-1.2", "--density-std", "1.2"]
OF_THE_BATCH += ["--method", "alsr", "--set", "center=batch", "--learned-uncertainty", "--lr-warmup-steps", "1"]
OF_THE_BATCH += ["--max-steps", "2", "--num-samples", "2"]


@pytest.fixture(scope="module")
def one_of_the_batch(tmp_path_factory):
    output = tmp_path_factory.mktemp("batch") / "run"
    main([*COMMON, *OF_THE_BATCH, "--train-batch-size", "8", "--output-dir", str(output)])
    return output


@pytest.mark.parametrize("before", [None, shard], ids=["ddp", "fsdp"])
def test_centre_and_uncertainty_are_of_the_batches_of_both(one_of_the_batch, tmp_path, before):
    two(tmp_path / "run", *OF_THE_BATCH, "--train-batch-size", "4", before=before)
    first, second = (final_state(run, 2) for run in (one_of_the_batch, tmp_path / "run"))
    torch.testing.assert_close(first["weight.sums"], second["weight.sums"], rtol=1e-9, atol=0)
    losses = [[line["loss"] for line in log(run) if "loss" in line] for run in (one_of_the_batch, tmp_path / "run")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    learnt = [load_file(run / "uncertainty.safetensors")["weight"] for run in (one_of_the_batch, tmp_path / "run")]
    assert learnt[0].abs().max() > 1e-4
    torch.testing.assert_close(learnt[1], learnt[0], rtol=1e-4, atol=1e-6)


def test_sampling_alone_gives_bit_equal_images_and_distances_on_one_and_two_processes(one, tmp_path):
    """From one model the images do not depend on the number of processes at all."""
    resumed = tmp_path / "run"
    (resumed / "checkpoints").mkdir(parents=True)
    (resumed / "checkpoints" / "step-00000004").symlink_to(one / "checkpoints" / "step-00000004")
    two(resumed, *IMPORTANCE, "--train-batch-size", "4", "--resume", "latest")
    assert (resumed / "samples.png").read_bytes() == (one / "samples.png").read_bytes()
    results = [json.loads((run / "results.json").read_text()) for run in (one, resumed)]
    distances = [{k: v for k, v in values.items() if k.startswith(("fd", "kid"))} for values in results]
    assert distances[0] == distances[1]
    assert distances[0].keys() >= {"fd_pixels_5", "fd_pixels_6", "fd_pixels_6_real_vs_real"}
