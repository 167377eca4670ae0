"""Importance sampling on two gloo processes by torchrun: one q on both, that of one process, kept by a resume."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sampler_worker as worker
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    output = tmp_path_factory.mktemp("drawn")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("sampler_worker.py")), str(output)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [load_file(output / f"{rank}.safetensors") for rank in (0, 1)]


@pytest.fixture(scope="module")
def one():
    return worker.results()


@pytest.mark.parametrize("rule", worker.RULES)
def test_both_processes_hold_one_q(rule, both):
    assert torch.equal(both[0][f"{rule}.q"], both[1][f"{rule}.q"])
    assert float(both[0][f"{rule}.q"].max() / both[0][f"{rule}.q"].min()) > 3


@pytest.mark.parametrize("rule", worker.RULES)
def test_a_resumed_run_draws_bit_equal(rule, both):
    for result in both:
        assert torch.equal(result[f"{rule}.drawn"], result[f"{rule}.resumed"])


@pytest.mark.parametrize("rule", ["gradient", "variance", "gap"])  # a history is of each process's own last losses
def test_they_draw_what_one_process_draws(rule, both, one):
    together = torch.cat((both[0][f"{rule}.drawn"], both[1][f"{rule}.drawn"]), 1)
    assert torch.equal(together, one[f"{rule}.drawn"])
    torch.testing.assert_close(both[0][f"{rule}.q"], one[f"{rule}.q"], rtol=0, atol=1e-12)
