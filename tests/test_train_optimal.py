"""Training by the optimal loss: the weighting and the draws of preset digits-edm-optimal."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from snrweights.integrations.floor import FILE
from training import TINY, final_state, main

from snrweights import EDMSchedule, get_weighting
from snrweights.densities import LogUniform
from snrweights.optimal import OptimalLossCurve
from snrweights.runs import read_runs

PRESET = ["--preset", "digits-edm-optimal", *TINY, "--train-batch-size", "128", "--importance-refresh", "2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("optimal") / "run"
    main([*PRESET, "--max-steps", "6", "--checkpointing-steps", "3", "--output-dir", str(folder)])
    return folder


def test_resumed_it_ends_with_the_same_bits(run, tmp_path):
    resumed = tmp_path / "run"
    shutil.copytree(run / "checkpoints" / "step-00000003", resumed / "checkpoints" / "step-00000003")
    shutil.copy(run / FILE, resumed)
    flags = ["--max-steps", "6", "--checkpointing-steps", "3", "--resume", "latest"]
    main([*PRESET, *flags, "--output-dir", str(resumed)])
    whole, again = final_state(run, 6), final_state(resumed, 6)
    assert whole.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_it_draws_by_the_weighted_gap_over_ln_sigma_and_does_not_correct_for_it(run):
    state = load_file(run / "checkpoints" / "step-00000006" / "state.safetensors")
    tilt = state["sampler.tilt"][0]
    assert tilt.min() >= 0.1 - 1e-9
    assert tilt.max() > 1.2
    sampling = json.loads((run / "results.json").read_text())["sampling"]
    assert sampling["of"] == "the weighted gap to the optimal loss"
    assert sampling["effective_sample_size"] == pytest.approx(1)


def test_its_weight_is_that_of_the_runs_own_curve(run):
    weighting = get_weighting("optimal_loss", curve=run / FILE)
    expected = weighting.bind(EDMSchedule(), prediction_type="edm", density=LogUniform(0.002, 80.0), normalize="mean")
    (read,) = read_runs([run])
    sigmas = torch.tensor([0.01, 0.3, 5.0])
    found = read.curve.normalized()(-2 * sigmas.double().log())
    torch.testing.assert_close(found.float(), expected(sigmas), rtol=1e-5, atol=0)
    assert OptimalLossCurve.load(run / FILE).made["points"] == 1797 - 4


def test_the_gap_is_logged(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["gap"]) and line["gap_stderr"] > 0 for line in lines if "gap" in line)
    assert any("gap" in line for line in lines)


@pytest.mark.parametrize(
    "flags",
    [
        ["--method", "optimal_loss"],
        ["--importance", "gap"],
        ["--method", "optimal_loss", "--importance", "gap", "--optimal-loss", "none"],
    ],
)
def test_without_a_curve_it_says_what_to_give(flags, tmp_path):
    with pytest.raises(SystemExit, match="needs the optimal loss: give --optimal-loss measure"):
        main(["--preset", "digits-edm", *TINY, *flags, "--output-dir", str(tmp_path / "run")])


def test_corrected_its_draws_carry_their_factors(tmp_path):
    flags = ["--importance-mode", "resample", "--max-steps", "4", "--output-dir", str(tmp_path / "run")]
    main([*PRESET, *flags])
    sampling = json.loads((tmp_path / "run" / "results.json").read_text())["sampling"]
    assert sampling["effective_sample_size"] < 1


def test_a_dry_run_measures_a_few_images(capsys):
    main(["--preset", "digits-edm-optimal", "--dry-run"])
    assert "Dry run: every part works." in capsys.readouterr().out
