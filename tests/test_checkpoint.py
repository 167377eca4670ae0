"""Runs that are interrupted in every way end as if they had not been."""

import json
import os
import random
import resource
import shutil
import signal
import time

import pytest
from training import TINY, assert_bit_equal, final_state, main, start

pytestmark = pytest.mark.slow
STEPS = 9
SAMPLER = ["--importance", "gradient", "--importance-refresh", "2", "--draws", "stratified"]
EVERY_THREE = [*TINY, *SAMPLER, "--max-steps", str(STEPS), "--checkpointing-steps", "3"]
EVERY_THREE += ["--checkpoints-total-limit", "2", "--logging-steps", "1"]  # the tracker's snapshots follow the log


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without interruption."""
    output = tmp_path_factory.mktemp("whole") / "run"
    main([*EVERY_THREE, "--output-dir", str(output)])
    return output


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def names(output):
    return sorted(path.name for path in (output / "checkpoints").iterdir())


def test_the_last_checkpoints_are_kept_and_hold_no_pickle(whole):
    assert names(whole) == ["step-00000006", "step-00000009"]
    files = {path.name for path in (whole / "checkpoints" / "step-00000009").iterdir()}
    assert files == {"state.safetensors", "manifest.json"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("to_group", "workers"), [(True, 0), (True, 2), (False, 0)])
def test_signals_leave_a_checkpoint_and_the_run_resumes(whole, tmp_path, number, to_group, workers):
    argv = [*TINY, *SAMPLER, "--max-steps", str(STEPS), "--output-dir", str(tmp_path / "run"), "--logging-steps", "1"]
    argv += ["--dataloader-num-workers", str(workers)]
    child = start(argv)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2)
    (os.killpg if to_group else os.kill)(child.pid, number)
    child.join(60)
    assert child.exitcode == 128 + number
    (checkpoint,) = names(tmp_path / "run")
    assert 1 < int(checkpoint.removeprefix("step-")) < STEPS
    main([*EVERY_THREE, "--output-dir", str(tmp_path / "run"), "--resume_from_checkpoint", "latest"])
    assert_bit_equal(final_state(tmp_path / "run", STEPS), final_state(whole, STEPS))


def test_a_history_of_losses_resumes_to_the_same_bits(tmp_path):
    argv = [*TINY, "--importance", "loss_second_moment", "--max-steps", "4", "--checkpointing-steps", "2"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    main([*argv, "--output-dir", str(whole)])
    shutil.copytree(whole / "checkpoints" / "step-00000002", resumed / "checkpoints" / "step-00000002")
    main([*argv, "--output-dir", str(resumed), "--resume", "latest"])
    assert_bit_equal(final_state(resumed, 4), final_state(whole, 4))


def test_killed_at_twenty_random_moments_it_ends_bit_equal(whole, tmp_path):
    argv = [*EVERY_THREE, "--output-dir", str(tmp_path / "run"), "--resume", "latest"]
    moments, killed = random.Random(0), 0
    while killed < 20:
        child = start(argv)
        child.join(moments.uniform(0.1, 4.0))
        if child.exitcode is None:
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            killed += 1
        else:
            assert child.exitcode == 0  # it had the time to finish: begin again
            os.rename(tmp_path / "run", tmp_path / f"finished-{killed}")
    child = start(argv)
    child.join()
    assert child.exitcode == 0
    runs = [tmp_path / "run", *tmp_path.glob("finished-*")]
    for run in runs:
        assert_bit_equal(final_state(run, STEPS), final_state(whole, STEPS))
        assert names(run) == names(whole)
        assert losses(run) == losses(whole)


def test_what_a_kill_kept_from_being_pruned_is_pruned_by_the_next_run(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    last = run / "checkpoints" / names(whole)[-1]
    shutil.copytree(run / "checkpoints" / names(whole)[0], run / "checkpoints" / "step-00000001")
    child = start([*EVERY_THREE, "--output-dir", str(run), "--resume", "latest"])
    child.join()
    assert child.exitcode == 0
    assert last.is_dir()
    assert names(run) == names(whole)


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("loss"), line.get("validation_loss")) for line in lines]


@pytest.mark.parametrize("name", ["state.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(whole, tmp_path, name, capsys):
    output = copy(whole, tmp_path)
    damaged = output / "checkpoints" / "step-00000009" / name
    damaged.write_bytes(damaged.read_bytes()[:-7])
    for i, broken in enumerate(
        ["[]", "null", '{"files": null}', '{"files": {}}', '{"files": {"state.safetensors": 1}}']
    ):
        folder = output / "checkpoints" / f"step-000000{10 + i}"
        folder.mkdir()
        (folder / "manifest.json").write_text(broken)
    main([*EVERY_THREE, "--output-dir", str(output), "--resume", "latest"])
    said = capsys.readouterr()
    assert "step-00000009 is damaged" in said.err
    assert name in said.err
    assert "Resuming from" in said.out
    assert "step-00000006, step 6" in said.out
    assert names(output) == ["step-00000006", "step-00000009"]
    assert_bit_equal(final_state(output, STEPS), final_state(whole, STEPS))
    with pytest.raises(SystemExit, match=r"step-00000003 cannot be used: no readable manifest\.json"):
        main([*EVERY_THREE, "--output-dir", str(output), "--resume", str(output / "checkpoints" / "step-00000003")])


def copy(run, folder):
    return shutil.copytree(run, folder / "run")


def test_other_options_than_the_runs_are_refused_by_name(whole, tmp_path):
    output = copy(whole, tmp_path)
    with pytest.raises(SystemExit, match=r"optimizer.learning_rate: 0.002 -> 0.1"):
        main([*EVERY_THREE, "--output-dir", str(output), "--resume", "latest", "--learning-rate", "0.1"])
    with pytest.raises(SystemExit, match=r"run.seed: 0 -> 7"):
        main([*EVERY_THREE, "--output-dir", str(output), "--resume", "latest", "--seed", "7"])
    with pytest.raises(SystemExit, match=r"global batch: 4 -> 8"):
        main([*EVERY_THREE, "--output-dir", str(output), "--resume", "latest", "--train-batch-size", "8"])


def test_a_loss_logged_after_resuming_is_the_mean_since_the_last_line(whole, tmp_path):
    every_step = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    output = tmp_path / "run"
    argv = [*EVERY_THREE, "--output-dir", str(output), "--logging-steps"]
    main([*argv, "5", "--lr-scheduler", "constant_with_warmup", "--max-steps", "6"])
    main([*argv, "8", "--lr-scheduler", "constant_with_warmup", "--max-steps", "9", "--resume", "latest"])
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    logged = {line["step"]: line for line in lines if "loss" in line}
    assert list(logged) == [5, 6, 8, 9]
    assert 0.3 < logged[8]["loss"] / logged[6]["loss"] < 3  # a mean over two steps, not a sum of two over eight
    assert logged[9]["seconds"] > logged[6]["seconds"]
    assert every_step


def limit_file_size():
    """Let no file grow beyond half a checkpoint: to a writer the same as a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))


def test_a_disk_that_is_full_leaves_a_message_and_the_earlier_checkpoints(whole, tmp_path):
    output = copy(whole, tmp_path)
    assert (output / "checkpoints" / "step-00000009" / "state.safetensors").stat().st_size > 800_000
    argv = [*EVERY_THREE, "--output-dir", str(output), "--resume", "latest", "--max-steps", "12"]
    child = start(argv, before=limit_file_size, output=tmp_path / "said")
    child.join()
    assert child.exitcode == 1
    said = (tmp_path / "said").read_text()
    assert "step-00000012 could not be written" in said
    assert "Kept: ['step-00000006', 'step-00000009']" in said
    assert names(output) == ["step-00000006", "step-00000009"]
