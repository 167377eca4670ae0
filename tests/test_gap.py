"""The gap of tracked losses to the optimal loss, and the floor that a run of train.py keeps."""

import json
import math

import pytest
import torch
from snrweights.integrations.floor import FILE
from test_page import read
from training import TINY, main

import snrweights
from snrweights.densities import Normal
from snrweights.optimal import OptimalLossCurve, floor_by_bin, gap_by_bin

LEVELS = torch.logspace(-4, 4, 65, base=math.e, dtype=torch.float64)


def curve(stderr=0.0):
    """Of Gaussian data of variance 1 in 4 dimensions: J / D = s² / (1 + s²)."""
    value = 4 * LEVELS**2 / (1 + LEVELS**2)
    return OptimalLossCurve(LEVELS, value, stderr * value, ("pairs",) * len(LEVELS), LEVELS, {"dim": 4, "variance": 4})


@pytest.mark.parametrize("target", ["epsilon", "v_prediction", "flow_prediction", "edm"])
def test_the_ideal_denoiser_has_no_gap_and_a_known_excess_is_found(target):
    density = Normal(0.5, 1.5)
    log_snr = density.icdf((torch.arange(2_000_000, dtype=torch.float64) + 0.5) / 2_000_000)
    ideal = log_snr.sigmoid()  # J_eps / D = SNR s² / (1 + s²)
    for factor in (1.0, 1.25):
        tracker = snrweights.LossVarianceTracker(unit="epsilon")
        tracker.update(factor * ideal, log_snr)
        seen = tracker.compute()
        gap = gap_by_bin(seen, curve(), density, target, sigma_data=0.5)
        inside = (seen.count > 20_000) & gap.value.isfinite()
        assert inside.sum() > 7
        expected = (factor - 1) * gap.floor
        torch.testing.assert_close(gap.value[inside], expected[inside], rtol=2e-3, atol=1e-4)
        assert gap.mean()[0] == pytest.approx((factor - 1) * float((gap.floor * gap.mass).nansum()), rel=2e-3, abs=1e-4)


def test_errors_of_the_loss_and_of_the_curve_add_up():
    tracker = snrweights.LossVarianceTracker(bins=2, low=-2, high=2, unit="epsilon")
    tracker.update(torch.tensor([1.0, 3.0, 5.0, 7.0]), torch.tensor([-1.0, -1.0, 1.0, 1.0]))
    gap = gap_by_bin(tracker.compute(), curve(0.1))
    torch.testing.assert_close(gap.floor_stderr, 0.1 * gap.floor)
    torch.testing.assert_close(gap.stderr, (1 + (0.1 * gap.floor) ** 2).sqrt())  # std √2 of two, over √2
    mean, stderr = gap.mean()
    assert mean == pytest.approx(4 - float(gap.floor.mean()))
    assert stderr == pytest.approx((0.5 + (0.1 * float(gap.floor.mean())) ** 2) ** 0.5)


def test_outside_of_the_curve_or_without_losses_nothing_is_said():
    floor = floor_by_bin(torch.tensor([-9.0, -7.0, 0.0, 8.5]), curve())
    assert floor.isnan().tolist() == [True, False, True]
    tracker = snrweights.LossVarianceTracker(bins=1, low=-2, high=2, unit="epsilon")
    tracker.update(torch.ones(1), torch.zeros(1))
    gap = gap_by_bin(tracker.compute(), curve())
    assert gap.value.isfinite().all()
    assert all(math.isnan(value) for value in gap.mean())
    with pytest.raises(ValueError, match="without a unit"):
        gap_by_bin(snrweights.LossVarianceTracker().compute(), curve())


@pytest.mark.slow
def test_a_run_measures_its_floor_logs_the_gap_and_reads_the_same_again(tmp_path):
    output = tmp_path / "run"
    argv = [*TINY, "--logging-steps", "2", "--checkpointing-steps", "2", "--output-dir", str(output)]
    main([*argv, "--max-steps", "4", "--optimal-loss", "measure"])
    before = (output / FILE).read_bytes()
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "gap" in line]
    assert [line["step"] for line in logged] == [2, 4]
    tracker = snrweights.LossVarianceTracker.load(output / "tracker.safetensors")
    density = snrweights.samplers.as_density(None, snrweights.as_schedule("linear"))
    gap = gap_by_bin(tracker.since(2), OptimalLossCurve.load(output / FILE), density)
    assert (logged[-1]["gap"], logged[-1]["gap_stderr"]) == pytest.approx(gap.mean(), rel=1e-3)
    charts = read(output).charts()
    assert any("Gap to the optimal loss" in chart for chart in charts)
    assert "optimal" in read(output).text

    main([*argv, "--max-steps", "5", "--optimal-loss", "measure", "--resume", "latest"])
    assert (output / FILE).read_bytes() == before
    other = ["--seed", "1", "--output-dir", str(tmp_path / "other")]
    with pytest.raises(SystemExit, match=r"is not the optimal loss of the training images \(data:"):
        main([*TINY, *other, "--max-steps", "2", "--optimal-loss", str(output / FILE)])
    with pytest.raises(SystemExit, match="`--optimal-loss nowhere`"):
        main([*TINY, *other, "--max-steps", "2", "--optimal-loss", "nowhere"])
