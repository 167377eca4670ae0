"""The optimal loss on two gloo processes by torchrun, against one process."""

import os
import subprocess
import sys
from pathlib import Path

import optimal_two_worker as worker
import pytest
import torch

from snrweights.cli import main
from snrweights.optimal import OptimalLossCurve, optimal_loss

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


def torchrun(*argv):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *map(str, argv)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    output = tmp_path_factory.mktemp("two")
    torchrun(HERE / "optimal_two_worker.py", output)
    return output


def of(folder, case, rank):
    return OptimalLossCurve.load(folder / f"{case}-{rank}.safetensors")


def assert_same(one, other):
    assert torch.equal(one.value, other.value)
    assert torch.equal(one.stderr, other.stderr)
    assert (one.how, one.made) == (other.how, other.made)


@pytest.mark.parametrize("case", worker.CASES)
def test_two_processes_have_what_one_has(two, case):
    given = worker.CASES[case]()
    one = optimal_loss(given.pop("data"), worker.SIGMAS, **given, **worker.OPTIONS)
    both = [of(two, case, rank) for rank in (0, 1)]
    assert_same(*both)
    torch.testing.assert_close(both[0].value, one.value, rtol=1e-11, atol=0)
    torch.testing.assert_close(both[0].stderr, one.stderr, rtol=1e-8, atol=0)
    assert torch.equal(both[0].confused, one.confused)
    assert (both[0].how, both[0].made) == (one.how, one.made)
    assert set(one.how) == {"pairs", "importance"}


def test_there_is_one_reduction_for_each_of_three_stages(two):
    assert [(two / f"calls-{rank}").read_text() for rank in (0, 1)] == [str(3 * len(worker.CASES))] * 2


def test_resumed_on_two_processes_it_has_the_same_bits(two):
    for rank in (0, 1):
        assert_same(of(two, "resumed", rank), of(two, "floats", rank))
    states = {path.name for path in (two / "state").iterdir()}
    assert {f"{stage}.{rank}.safetensors" for stage in ("draws", "pairs") for rank in (0, 1)} < states


def test_the_command_shares_the_work_and_writes_once(tmp_path):
    options = ["digits", "--sigmas", "0.3", "1.0", "--draws", "32", "--device", "cpu", "-o"]
    command = Path(sys.executable).with_name("snrweights")
    said = torchrun("--no-python", command, "optimal-loss", *options, tmp_path / "two.safetensors")
    assert said.count("Wrote") == 1
    assert main(["optimal-loss", *options, str(tmp_path / "one.safetensors")]) == 0
    two, one = (OptimalLossCurve.load(tmp_path / f"{name}.safetensors") for name in ("two", "one"))
    torch.testing.assert_close(two.value, one.value, rtol=1e-10, atol=0)
    assert (two.how, two.made) == (one.how, one.made)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.safetensors", "two.safetensors"]
