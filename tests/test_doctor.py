"""Every finding of the doctor, where it must be found and where it must not."""

import json
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

import snrweights
from snrweights.cli import main
from snrweights.doctor import doctor
from snrweights.findings import CHECKS, WEIGHT_FLAGS
from snrweights.plots import plot_diagnosis


def find(name, *arguments, **options):
    """The finding of this name, or None."""
    found = [finding for finding in doctor(*arguments, **options).findings if finding.name == name]
    assert len(found) <= 1
    return found[0] if found else None


def test_zero_terminal_snr_names_the_timesteps():
    zero = DDPMScheduler(rescale_betas_zero_snr=True)
    found = find("zero-terminal-snr", zero)
    assert found.severity == "error"
    assert found.figures["timesteps"][-1] == 999
    assert "v_prediction" in found.remedy
    assert find("zero-terminal-snr", zero, prediction_type="v_prediction") is None
    assert find("zero-terminal-snr", DDPMScheduler()) is None
    assert find("zero-terminal-snr", "flow") is None  # its velocity has a meaning there


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_table_in_half_precision_is_found_with_its_error(dtype):
    scheduler = DDPMScheduler()
    exact = scheduler.alphas_cumprod.double()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(dtype)
    rounded = scheduler.alphas_cumprod.double()
    error = (rounded / (1 - rounded) * (1 - exact) / exact - 1).abs()
    found = find("half-precision-table", scheduler)
    assert found.severity == "error"
    assert found.figures["infinite"] == int((~error.isfinite()).sum())
    assert found.figures["largest_error_percent"] == pytest.approx(100 * float(error[error.isfinite()].max()), rel=1e-2)
    assert found.figures["largest_error_percent"] > 5
    assert find("half-precision-table", DDPMScheduler()) is None


def test_a_bare_table_in_half_precision_is_found():
    table = DDPMScheduler().alphas_cumprod
    assert find("half-precision-table", table.bfloat16(), prediction_type="epsilon") is not None
    assert find("half-precision-table", table, prediction_type="epsilon") is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
def test_a_table_that_noising_does_not_use_is_found():
    solver = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    solver.set_timesteps(20)
    found = find("table-is-not-what-noises", solver)
    assert found.severity == "error"
    assert found.figures["log_snr_difference"] > 0.5
    for scheduler in (DDPMScheduler(), EulerDiscreteScheduler(), CogVideoXDPMScheduler()):
        assert find("table-is-not-what-noises", scheduler) is None


def test_a_table_that_was_replaced_is_found():
    class Other(DDPMScheduler):
        def add_noise(self, original_samples, noise, timesteps):
            return original_samples * 0.5 + noise

    assert find("table-is-not-what-noises", Other()) is not None


def test_a_scheduler_that_is_refused_for_training_is_a_finding():
    found = find("scheduler-cannot-train", DPMSolverMultistepScheduler())
    assert "set_timesteps" in found.message
    with pytest.raises(TypeError, match="Cannot read a noise schedule"):
        doctor(snrweights.DiscreteSchedule)  # nothing to go by
    assert find("scheduler-cannot-train", DDPMScheduler()) is None


@pytest.mark.parametrize("flag", WEIGHT_FLAGS)
@pytest.mark.parametrize("spelling", ["--{}", "--{}=5"])
def test_a_second_weighting_by_the_script_is_found(flag, spelling):
    arguments = ["--train_batch_size", "4", spelling.format(flag), "5"]
    assert find("second-weighting", "linear", "min_snr", prediction_type="epsilon", script_args=arguments)
    assert find("second-weighting", "linear", prediction_type="epsilon", script_args=arguments) is None
    assert find("second-weighting", "linear", "min_snr", prediction_type="epsilon", script_args=["--lr=1"]) is None


def test_a_flag_that_flow_ignores_is_found():
    flow = FlowMatchEulerDiscreteScheduler()
    assert find("flag-ignored-on-flow", flow, script_args=["--min_snr_gamma=5"]).severity == "error"
    assert find("flag-ignored-on-flow", flow) is None
    assert find("flag-ignored-on-flow", DDPMScheduler(), script_args=["--min_snr_gamma=5"]) is None


def test_a_non_monotone_objective_has_its_negative_mass():
    found = find("non-monotone-objective", "squaredcos_cap_v2", "min_snr", prediction_type="epsilon")
    expected = snrweights.objective("squaredcos_cap_v2", "min_snr", prediction_type="epsilon").negative_mass
    assert found.figures["negative_mass"] == expected > 0.01
    assert found.severity == "note"
    assert find("non-monotone-objective", "cosine", "sigmoid", prediction_type="epsilon", bias=0.0) is None


def test_a_mean_weight_far_from_one_is_found():
    found = find("loss-scale", "linear", "min_snr", prediction_type="v_prediction")
    curve = snrweights.get_weighting("min_snr").over_log_snr("linear", prediction_type="v_prediction")
    assert found.figures["mean_weight"] == pytest.approx(curve.mean())
    assert "SGD" in found.message
    assert find("loss-scale", "linear", "min_snr", prediction_type="v_prediction", normalize="mean") is None
    assert find("loss-scale", "linear", "min_snr", prediction_type="epsilon") is None  # 0.91
    assert find("loss-scale", "linear", prediction_type="v_prediction") is None


def test_a_density_that_misses_the_objective_is_found():
    found = find("density-does-not-cover", "flow", "elbo")
    assert (found.severity, found.figures["effective_share"]) == ("error", 0.0)
    narrow = snrweights.densities.log_normal_sigma(3.0, 0.8)
    found = find("density-does-not-cover", "edm", "laplace", prediction_type="epsilon", density=narrow)
    assert found.figures["effective_share"] < 0.1
    assert find("density-does-not-cover", "cosine", "sigmoid", prediction_type="epsilon") is None
    assert find("density-does-not-cover", "linear", "min_snr", prediction_type="epsilon") is None


def test_prior_preservation_is_found():
    options = {"prediction_type": "epsilon", "prior_preservation": True}
    assert find("prior-preservation", "linear", "min_snr", **options).severity == "warning"
    assert find("prior-preservation", "linear", script_args=["--snr_gamma=5"], **options).severity == "error"
    assert find("prior-preservation", "linear", "min_snr", sample_mask=True, **options) is None
    assert find("prior-preservation", "linear", "min_snr", prediction_type="epsilon") is None


def test_micro_batches_matter_to_a_weight_of_the_batch():
    def micro_batches(center="batch", **options):
        return find("micro-batches", "edm", "alsr", prediction_type="edm", center=center, **options)

    found = micro_batches(accumulation=4, batch_size=16)
    assert found.severity == "warning"
    assert found.figures == pytest.approx(
        {"batch_size": 16, "accumulation": 4, "stray": 1 / 4, "stray_of_step": 1 / 8, "stray_in_log_snr": 2.4 / 4}
    )
    assert "±0.6 " in found.message
    assert "4 of those" in found.message
    assert 'center="fixed"' in found.remedy
    assert "no weight" in micro_batches(batch_size=1).message
    assert micro_batches(batch_size=15).figures["stray"] == pytest.approx(15**-0.5)
    assert "√9 = 3 times" in micro_batches(accumulation=9).message
    assert micro_batches(batch_size=16) is None
    assert micro_batches("fixed", batch_size=1, accumulation=8) is None
    assert micro_batches("ema", batch_size=1, accumulation=8) is None
    assert find("micro-batches", "linear", "min_snr", prediction_type="epsilon", accumulation=8, batch_size=1) is None
    zero = DDPMScheduler(rescale_betas_zero_snr=True)  # its last timestep is at no finite log-SNR
    options = {"prediction_type": "v_prediction", "batch_size": 4}
    figures = find("micro-batches", zero, "alsr", center="batch", **options).figures
    log_snr = snrweights.as_schedule(zero).log_snr_table
    log_snr = log_snr[log_snr.isfinite()]
    assert figures["stray_in_log_snr"] == pytest.approx(float(log_snr.std(correction=0)) / 2)


def test_a_shift_that_moves_the_objective_is_found_with_how_far():
    found = find("shifted-objective", FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert found.figures["displacement"] == pytest.approx(-2 * math.log(3))
    assert 0 < found.figures["overlap"] < 1
    further = find("shifted-objective", FlowMatchEulerDiscreteScheduler(shift=9.0))
    assert further.figures["overlap"] < found.figures["overlap"]
    assert find("shifted-objective", FlowMatchEulerDiscreteScheduler()) is None
    assert find("shifted-objective", FlowMatchEulerDiscreteScheduler(shift=3.0), density="logit_normal") is None
    cosine = snrweights.CosineSchedule(resolution=256, t_min=0.01, t_max=0.99, prediction_type="v_prediction")
    assert find("shifted-objective", cosine).figures["displacement"] == pytest.approx(2 * math.log(1 / 4))
    assert find("shifted-objective", cosine, "sigmoid") is None  # w_KG / p: the shift cancels


def test_findings_are_sorted_and_every_one_is_in_the_guide():
    diagnosis = doctor(DDPMScheduler(rescale_betas_zero_snr=True), "min_snr", prior_preservation=True)
    severities = [finding.severity for finding in diagnosis.findings]
    assert severities == sorted(severities, key=["error", "warning", "note"].index)
    assert not diagnosis.healthy
    guide = (Path(__file__).parents[1] / "examples" / "guides" / "doctor.md").read_text()
    assert set(re.findall(r"^### (.+)$", guide, re.MULTILINE)) == set(CHECKS)


def test_a_plain_configuration_is_healthy():
    diagnosis = doctor("linear", "ddpm", prediction_type="epsilon")
    assert diagnosis.healthy
    assert json.loads(json.dumps(diagnosis.as_dict(), allow_nan=False))["healthy"] is True


def test_the_figure_has_the_configuration_and_the_three_beside_it():
    ax = plot_diagnosis(doctor("scaled_linear", "min_snr", prediction_type="v_prediction")).axes[0]
    assert next(text.get_text() for text in ax.get_legend().get_texts()) == "your configuration"
    assert len(ax.lines) == 4
    for line in ax.lines:
        x, y = line.get_data()
        assert float(y[abs(x).argmin()]) == pytest.approx(1)


def test_the_command_prints_draws_and_exits_by_what_it_found(tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        DDPMScheduler(rescale_betas_zero_snr=True).save_pretrained(tmp_path / "pipeline" / "scheduler")
    figure = tmp_path / "objective.png"
    arguments = ["doctor", "--scheduler", str(tmp_path / "pipeline"), "--method", "min_snr", "--set", "gamma=5"]
    assert main([*arguments, "-o", str(figure)]) == 1
    assert "zero-terminal-snr" in capsys.readouterr().out
    assert figure.stat().st_size > 10_000
    assert main([*arguments, "--prediction-type", "v_prediction", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["healthy"] is True
    assert main(["doctor", "--scheduler", str(tmp_path / "pipeline" / "scheduler")]) == 1
    assert main(["doctor", "--scheduler", "linear", "--prediction-type", "epsilon", "--script-args=--snr_gamma 5"]) == 0


@pytest.mark.parametrize("name", ["no_such", "a/b/c", "."])
def test_a_scheduler_that_is_not_there_is_said_so(name, capsys):
    assert main(["doctor", "--scheduler", name]) == 2
    assert "scheduler_config.json" in capsys.readouterr().err
