"""Trackers on two gloo processes by torchrun, saved and resumed there, against one process with all samples."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tracker_worker as worker
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from snrweights import LossVarianceTracker

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
CASES = (*worker.OPTIONS, worker.FEWER)


def torchrun(*argv, check=True):
    """Run on two processes; return exit code and stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *map(str, argv)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """The folder, and what one process has: from the start, resumed from its own state and from that of two."""
    output = tmp_path_factory.mktemp("tracked")
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 1
    whole, _ = worker.run(accelerator, range(worker.UPDATES), save_to=output / "saved-on-1")
    torchrun(HERE / "tracker_worker.py", output, output / "saved-on-1")
    fresh = output / "fresh"  # processes that have seen nothing but the state
    fresh.mkdir()
    torchrun(HERE / "tracker_worker.py", fresh, output / "saved-on-2")
    one = {"whole": whole}
    for state in ("saved-on-1", "saved-on-2"):
        one[state], _ = worker.run(accelerator, range(worker.SAVED_AT, worker.UPDATES), state=output / state)
    return output, one


def of_two(folder, run, case):
    return [LossVarianceTracker.load(folder / f"{run}-{case}-{rank}.safetensors") for rank in (0, 1)]


def assert_same(one, other):
    """To the bit."""
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def assert_equal(found, expected):
    """To 1e-12."""
    assert found.updates == expected.updates
    pairs = [(found.compute(), expected.compute())]
    for (step, snapshot), (expected_step, expected_snapshot) in zip(found.history(), expected.history(), strict=True):
        assert step == expected_step
        pairs.append((snapshot, expected_snapshot))
    for own, other in pairs:
        for name in ("count", "mean", "variance", "second_moment", "gradient_square", "nonfinite"):
            torch.testing.assert_close(
                getattr(own, name), getattr(other, name), rtol=1e-12, atol=1e-12, equal_nan=True, msg=name
            )


@pytest.mark.parametrize("case", CASES)
def test_two_processes_see_what_one_does(tracked, case):
    output, one = tracked
    two = of_two(output, "whole", case)
    assert_same(*two)
    assert_equal(two[0], one["whole"][case])
    statistics = one["whole"][case].compute()
    assert float(statistics.nonfinite.sum()) > 1
    assert int(statistics.gradient_square.isfinite().sum()) > 10
    assert len(two[0].history()) == worker.UPDATES // worker.OPTIONS.get(case, {}).get("snapshot_every", 100)


@pytest.mark.parametrize("case", CASES)
def test_resumed_on_as_many_processes_it_ends_bit_equal(tracked, case):
    output, one = tracked
    assert_same(one["saved-on-1"][case], one["whole"][case])
    two = of_two(output / "fresh", "saved-on-2", case)
    assert_same(*two)
    assert_same(two[0], of_two(output, "whole", case)[0])


@pytest.mark.parametrize("case", CASES)
def test_resumed_on_another_number_of_processes_it_is_equal(tracked, case):
    output, one = tracked
    two = of_two(output, "saved-on-1", case)
    assert_same(*two)
    for resumed in (one["saved-on-2"][case], two[0]):
        assert_equal(resumed, one["whole"][case])


def test_a_state_is_one_file_a_tracker_and_holds_the_sums(tracked):
    output, _ = tracked
    for folder in ("saved-on-1", "saved-on-2"):
        assert {f"{case}.safetensors" for case in CASES} <= {path.name for path in (output / folder).iterdir()}
    state = load_file(output / "saved-on-2" / "plain.safetensors")
    shares = [worker.share(update, rank)[0] for update in range(worker.SAVED_AT) for rank in range(worker.WORLD)]
    assert state["moments"][0].sum() == sum(int(loss.isfinite().sum()) for loss in shares)


def test_a_sync_is_one_collective_and_an_update_none(tracked):
    output, _ = tracked
    for rank in (0, 1):
        updates, syncs = map(int, (output / f"whole-{rank}.txt").read_text().split())
        assert updates == 0
        assert syncs == len(CASES) * worker.UPDATES // worker.SYNC_EVERY


# snrweights launch ----------------------------------------------------------------------------------------------------


def launch(folder, *argv):
    options = ["--method", "none", "--track", folder]
    return torchrun(
        "-m", "snrweights.integrations.launch", *options, HERE / "ending_script.py", folder, *argv, check=False
    )


def test_a_launched_script_that_fails_on_both_processes_leaves_one_file(tmp_path):
    LossVarianceTracker(bins=3).save(tmp_path / "tracker.safetensors")  # of an earlier run
    LossVarianceTracker(bins=3).save(tmp_path / "tracker.rank-0-of-2.safetensors")
    LossVarianceTracker(bins=3).save(tmp_path / "tracker.rank-5-of-8.safetensors")
    code, said = launch(tmp_path, "0", "1")
    assert code == 1
    assert said.count("RuntimeError: the script's own") == 2
    assert "could not write" not in said
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == ["tracker-1.safetensors", "tracker.safetensors"]
    for file in files:  # one a model
        assert LossVarianceTracker.load(tmp_path / file).compute().count.sum() == 2 * 3 * 4


def test_a_launched_script_that_fails_on_one_process_ends(tmp_path):
    LossVarianceTracker(bins=3).save(tmp_path / "tracker.safetensors")  # of an earlier run
    code, said = launch(tmp_path, "1")
    assert code == 1
    assert said.count("RuntimeError: the script's own") == 1
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == ["tracker-1.rank-1-of-2.safetensors", "tracker.rank-1-of-2.safetensors"]
    assert LossVarianceTracker.load(tmp_path / files[-1]).compute().count.sum() == 3 * 4
