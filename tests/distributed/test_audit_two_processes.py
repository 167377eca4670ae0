"""The audit on two gloo processes by torchrun: it ends on both, changes nothing, and finds a weight of the script's."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import audit_worker as worker
import pytest

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
STATIC, HOOK = "DDP's static_graph takes the first pass", "has a hook of its own on the output"
NOT_READ = {
    "ddp-static-graph": STATIC,
    "ddp-static-graph-checkpointing-reentrant": STATIC,
    "fsdp1": HOOK,
    "fsdp2": HOOK,
}


def torchrun(*argv):
    """Run on two processes; return exit code, stdout and stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *map(str, argv)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """What all cases came to on either process."""
    output = tmp_path_factory.mktemp("audited")
    code, _, err = torchrun(HERE / "audit_worker.py", output)
    assert code == 0, err[-3000:]
    return [json.loads((output / f"facts-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", worker.CASES)
def test_an_audit_ends_on_both_processes_and_changes_nothing(name, facts):
    for rank in (0, 1):
        fact = facts[rank][name]
        assert "error" not in fact, fact["error"]
        assert fact["equal"]
        assert fact["trained"] > 0.01
        assert fact["weighted"]
        assert not fact["auditing"]
        found, warnings = fact["audit"], fact["warnings"]
        if name in NOT_READ:
            assert (found["steps"], found["weight"]) == (0, [])
            assert NOT_READ[name] in found["not_read"][0]
            [warning] = warnings
            assert "Could not look whether" in warning
            assert NOT_READ[name] in warning
        else:
            assert (found["steps"], len(found["weight"]), found["not_read"]) == (worker.AUDITED, 4, [])
            assert (found["is_mse"], found["constant"], found["target_as_expected"]) == (True, True, True)
            assert warnings == []


LAUNCH = ["-m", "snrweights.integrations.launch"]


def test_a_second_weight_ends_both_processes(tmp_path):
    code, _, err = torchrun(*LAUNCH, HERE / "weighted_script.py", tmp_path, 0, 1)
    assert code != 0
    said = [(tmp_path / f"error-{rank}.txt").read_text() for rank in (0, 1)]
    for text in said:
        assert text.startswith("0 DoubleWeightingError: The script's loss is weighted already: ")
    assert "min_snr(gamma=0.05)" in said[1]  # the first process's samples are all on one side of gamma
    assert len(set(re.findall(r"\[rank(\d)\]: snrweights\S*DoubleWeightingError", err))) == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_a_second_weight_that_one_process_sees_ends_both(tmp_path):
    code, _, err = torchrun(*LAUNCH, HERE / "weighted_script.py", tmp_path, 1)
    assert code != 0
    assert "DoubleWeightingError" in err
    assert [file.name for file in tmp_path.iterdir()] == ["error-1.txt"]


def test_audit_by_torchrun_reports_once_and_ends_both_processes(tmp_path):
    script = [HERE / "weighted_script.py", tmp_path / "trained", 0, 1]
    options = ["--steps", 3, "--json", tmp_path / "audit.json"]
    code, out, err = torchrun("--no-python", Path(sys.executable).with_name("snrweights"), "audit", *options, *script)
    assert code == 0, err
    assert out.count("audit of 3 steps, 12 samples") == 1
    assert "weight     min_snr(gamma=0.05)" in out
    found = json.loads((tmp_path / "audit.json").read_text())
    assert (found["steps"], found["constant"], found["target_as_expected"]) == (3, False, True)
    assert [file.name for file in tmp_path.iterdir()] == ["audit.json"]
