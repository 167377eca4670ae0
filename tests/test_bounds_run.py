"""``snrweights bounds``: trained models in folders."""

import json
import math

import pytest
from PIL import Image
from training import TINY, main

from snrweights import list_weightings
from snrweights.bounds import NO_RANKING
from snrweights.cli import main as cli
from snrweights.optimal import OptimalLossCurve

QUICK = ("--levels", "9", "--draws", "32")
PRESETS = ("digits", "digits-edm")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Tiny runs of a table of timesteps and of EDM, and the curve of the digits."""
    folder = tmp_path_factory.mktemp("runs")
    for preset in PRESETS:
        main(["--preset", preset, *TINY, "--max-steps", "10", "--output-dir", str(folder / preset)])
    levels = ("--sigmas", "41", "--sigma-min", "0.05", "--draws", "256")
    assert cli(["optimal-loss", "digits", *levels, "-o", str(folder / "curve.safetensors")]) == 0
    return folder


def bounds(runs, preset, output, *options, curve=None):
    """Run the command on a model and the curve; return its exit code and what it wrote."""
    known = ["--data", "digits", "--curve", str(curve or runs / "curve.safetensors")]
    code = cli(["bounds", str(runs / preset / "model"), *known, *QUICK, "-o", str(output), *options])
    return code, found_in(output)


def found_in(folder):
    return json.loads((folder / "bounds.json").read_text())


@pytest.mark.parametrize("preset", PRESETS)
def test_no_improved_bound_of_a_trained_model_exceeds_the_gap_of_its_elbo(runs, preset, tmp_path, capsys):
    code, facts = bounds(runs, preset, tmp_path)
    out = capsys.readouterr().out
    assert code == 0
    assert sorted(facts["weightings"]) == sorted(list_weightings())
    levels = facts["bounds"]
    gap = levels[-1]["nats"]
    assert [row["nats"] for row in levels] == sorted(row["nats"] for row in levels)
    assert 0 < facts["prior"] == levels[0]["nats"] < gap
    monotone = {name: row for name, row in facts["weightings"].items() if row["monotone"]}
    assert {"elbo", "sigmoid", "auto", "edm_monotonic"} <= set(monotone) < set(facts["weightings"])
    assert all(facts["prior"] <= row["nats"] <= gap * (1 + 1e-4) for row in monotone.values())
    assert monotone["elbo"]["nats"] == pytest.approx(gap)
    assert all(
        row["nats"] is None and row["negative_mass"] > 1e-4
        for name, row in facts["weightings"].items()
        if name not in monotone
    )
    assert -facts["elbo"][0] == pytest.approx(facts["decoder"] + facts["information"] + gap)
    assert facts["bits_per_dim"][0] == pytest.approx(-facts["elbo"][0] / (64 * math.log(2)))
    assert NO_RANKING in out
    assert (tmp_path / "table.md").read_text() in out
    with Image.open(tmp_path / "bounds.png") as figure:
        assert figure.size[0] > 1000


def test_weightings_and_the_density_are_those_asked_for(runs, tmp_path, capsys):
    options = ["--methods", "sigmoid:bias=2", "ddpm", "--density", "laplace"]
    code, facts = bounds(runs, "digits-edm", tmp_path / "first", *options)
    assert code == 0
    assert facts["range"] == pytest.approx([-2 * math.log(80), -2 * math.log(0.05)])  # what curve and schedule reach
    assert list(facts["weightings"]) == ["ddpm", "sigmoid:bias=2"]
    assert facts["weightings"]["ddpm"]["negative_mass"] == pytest.approx(1, rel=1e-2)  # the density rises to 0
    table = capsys.readouterr().out

    kept = OptimalLossCurve.load(runs / "curve.safetensors")
    made = {name: value for name, value in kept.made.items() if name != "second_moment"}  # as an older version left it
    older = tmp_path / "older.safetensors"
    OptimalLossCurve(kept.sigmas, kept.value, kept.stderr, kept.how, kept.confused, made).save(older)
    code, again = bounds(runs, "digits-edm", tmp_path / "second", *options, curve=older)
    assert code == 0
    assert again["prior"] == pytest.approx(facts["prior"], rel=1e-6)
    assert capsys.readouterr().out.split("Wrote")[0] == table.split("Wrote")[0]


def test_a_curve_of_other_data_is_found_out(runs, tmp_path, capsys):
    curve = tmp_path / "curve.safetensors"
    levels = ("--sigmas", "30", "--sigma-min", "0.1", "--draws", "256")
    assert cli(["optimal-loss", "digits", *levels, "--flips", "-o", str(curve)]) == 0
    assert bounds(runs, "digits-edm", tmp_path / "out", "--draws", "256", curve=curve)[0] == 1
    assert "Something does not match. The curve is of other data" in capsys.readouterr().out


def test_an_output_that_is_a_file_is_refused_before_anything_is_measured(runs, tmp_path, capsys):
    (tmp_path / "out").touch()
    assert cli(["bounds", str(runs / "digits"), "--draws", "100000000", "-o", str(tmp_path / "out")]) == 2
    assert "is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no folder"),
        (["{run}", "--methods", "sigmoids"], "Unknown weighting 'sigmoids'; choose one of"),
        (["{run}", "--methods", "sigmoid:gamma=1"], "Weighting 'sigmoid' has no hyperparameter 'gamma'"),
        (["{run}", "--levels", "1"], "`--levels` must be at least 2, got 1"),
        (["{run}", "--log-snr", "20", "30"], "has not two noise levels at log-SNR 20.0 to 30.0"),
    ],
)
def test_what_has_no_bounds_is_named(runs, arguments, message, tmp_path, capsys):
    filled = [word.format(run=runs / "digits") for word in arguments]
    assert cli(["bounds", *filled, "--draws", "32", "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
