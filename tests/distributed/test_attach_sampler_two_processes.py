"""snrweights.attach(sampler=...) on two gloo processes by torchrun: one q, draws that share the strata."""

from pathlib import Path

import attach_sampler_worker as worker
import pytest
import torch
from safetensors.torch import load_file
from test_attach_two_processes import torchrun

pytestmark = pytest.mark.slow


def test_two_processes_draw_apart_from_one_q(tmp_path):
    torchrun(Path(__file__).with_name("attach_sampler_worker.py"), tmp_path)
    one, other = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    # before anything is learned: every eighth of the timesteps once, over both
    first = torch.cat((one["timesteps"][:10], other["timesteps"][:10]), 1)
    assert (first * 2 * worker.ROWS // 1000).sort(1).values.tolist() == [list(range(2 * worker.ROWS))] * 10
    assert not (one["timesteps"] == other["timesteps"]).all(1).any()
    # what both have learned
    assert one["evidence.moments"][0].sum() > 1.5 * worker.STEPS * worker.ROWS  # of both, faded
    for name in set(one) - {"timesteps"}:
        assert torch.equal(one[name], other[name]), name
    assert one["tilt"].max() > 1.05 * one["tilt"].min()
