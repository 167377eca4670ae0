"""snrweights.attach on two gloo processes by torchrun, in every wrapper, against one process with whole batches."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import attach_worker as worker
import pytest
import torch
from safetensors.torch import load_file

from snrweights import LossVarianceTracker

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
CASES = [(name, when) for name in worker.WRAPPINGS for when in worker.WHEN]
explicit = functools.cache(worker.explicit)
attached = functools.cache(worker.attached)


def torchrun(*argv):
    """Run on two processes; return stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *map(str, argv)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def assert_equal(one, other):
    assert largest_difference(one, other) < 1e-10


def assert_different(one, other):
    assert largest_difference(one, other) > 1e-2


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What all cases came to on either process: one launch, since most of its time is imports."""
    output = tmp_path_factory.mktemp("attached")
    torchrun(HERE / "attach_worker.py", output)
    tensors = [load_file(output / f"tensors-{rank}.safetensors") for rank in (0, 1)]
    return tensors, [json.loads((output / f"facts-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(params=CASES, ids=["-".join(case) for case in CASES])
def case(request, trained):
    """The wrapping, when it was attached, and of either process the parameters, the moments and the facts."""
    (name, when), (tensors, facts) = request.param, trained
    own, prefix = [each[f"{name}-{when}"] for each in facts], f"{name}-{when}/"
    for fact in own:
        assert "error" not in fact, fact["error"]
    parameters = [{k.removeprefix(prefix): v for k, v in each.items() if k.startswith(prefix)} for each in tensors]
    moments = [each.pop("moments", None) for each in parameters]
    return worker.WRAPPINGS[name], when, parameters, moments, own


def test_two_processes_train_as_one_does(case):
    wrapping, when, parameters, moments, facts = case
    plain, _ = explicit(wrapping.kind, ())
    weighted, losses = explicit(wrapping.kind)
    assert_different(weighted, plain)
    if when == "midway":
        expected, _ = explicit(wrapping.kind, worker.MIDWAY)
        assert_different(expected, plain)
        assert_different(expected, weighted)
    else:
        expected = weighted
        assert_equal(attached(wrapping.kind), expected)
    for own in parameters:
        assert_equal(own, expected)
    if when == "before":
        torch.testing.assert_close(sum(moments), losses, rtol=1e-10, atol=1e-10)
        assert all(own[0].sum() == worker.STEPS * worker.GLOBAL_BATCH // 2 for own in moments)
    # it was what it is called
    for fact in facts:
        assert fact["weighted"]
        assert bool(fact["graphs"]) == (wrapping.kind == "small")
        assert bool(fact["checkpointed"]) == (wrapping.reentrant is not None)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    output = tmp_path_factory.mktemp("launched")
    options = [word for name in ("method", "gamma") for word in ("--set", f"{name}={worker.METHOD[name]}")][2:]
    options += ["--method", worker.METHOD["method"], "--track", output / "track", "--report", output / "report.json"]
    said = torchrun("-m", "snrweights.integrations.launch", *options, HERE / "unmodified_script.py", output)
    return output, said


def test_launched_two_processes_train_as_one_does(launched):
    output, _ = launched
    expected, _ = explicit("condition", dtype=torch.float32)  # launch's weights
    plain, _ = explicit("condition", ())
    for rank in (0, 1):
        parameters = load_file(output / f"tensors-{rank}.safetensors")
        assert_equal(parameters, expected)
        assert_different(parameters, plain)


def test_launched_processes_write_one_tracker(launched):
    """Though the script has left its process group by then."""
    output, _ = launched
    _, losses = explicit("condition", dtype=torch.float32)
    assert [file.name for file in (output / "track").iterdir()] == ["tracker.safetensors"]
    tracker = LossVarianceTracker.load(output / "track" / "tracker.safetensors")
    moments = tracker.state_dict()["moments"][: worker.LOSS_ROWS]
    torch.testing.assert_close(moments, losses, rtol=1e-10, atol=1e-10)
    assert moments[0].sum() == worker.STEPS * worker.GLOBAL_BATCH


def test_the_first_launched_process_reports(launched):
    output, said = launched
    report = json.loads((output / "report.json").read_text())
    assert report["script"] == [str(HERE / "unmodified_script.py"), str(output)]
    assert report["passed_over"] == {}
    (attached_to,) = report["attached"]
    assert attached_to["model"] == "UNet2DConditionModel"
    assert attached_to["method"] == "MinSNR(gamma=0.1)"
    assert attached_to["weighted"] is True
    assert attached_to["reason"] is None
    assert (
        sum(row["count"] for row in attached_to["loss"]["bins"]) == worker.STEPS * worker.GLOBAL_BATCH // 2
    )  # its own share
    assert said.count("snrweights: <attached UNet2DConditionModel") == 1
