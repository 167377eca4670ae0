"""The objective that a schedule, a weight, a target and a density amount to."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMWuerstchenScheduler
from scipy import integrate

from snrweights import CosineSchedule, DiscreteSchedule, EDMSchedule, FlowSchedule, get_weighting, objective

LINEAR = DiscreteSchedule.from_name("linear")
COSINE = DiscreteSchedule.from_name("squaredcos_cap_v2")
ZERO_SNR = DiscreteSchedule.from_name("linear", rescale_betas_zero_snr=True)
EPSILON = {"prediction_type": "epsilon"}


def uniform_density(schedule):
    """The p(log_snr) of uniform timesteps: one over T times the spacing, ascending in log-SNR."""
    log_snr = schedule.log_snr_table.numpy()
    return log_snr[::-1], 1 / (len(log_snr) * -np.gradient(log_snr))[::-1]


def assert_objective(result, log_snr, w_kg):
    np.testing.assert_allclose(result.log_snr, log_snr, rtol=1e-12)
    np.testing.assert_allclose(result.w_kg, w_kg / w_kg.max(), rtol=1e-9)


# w_KG -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_w_kg_is_density_times_epsilon_weight(schedule):
    log_snr, p = uniform_density(schedule)
    assert_objective(objective(schedule, "min_snr", **EPSILON), log_snr, p * np.minimum(1, 5 / np.exp(log_snr)))
    assert_objective(objective(schedule, "debiased", **EPSILON), log_snr, p * np.exp(-log_snr / 2))
    assert_objective(objective(schedule, "native", **EPSILON), log_snr, p)


@pytest.mark.parametrize("target", ["sample", "v_prediction", "flow_prediction"])
def test_native_weight_one_on_another_target_is_another_objective(target):
    log_snr, p = uniform_density(COSINE)
    snr = np.exp(log_snr)
    on_epsilon = {"sample": 1 / snr, "v_prediction": (1 + snr) / snr, "flow_prediction": (1 + np.sqrt(snr)) ** 2 / snr}
    assert_objective(objective(COSINE, "native", prediction_type=target), log_snr, p * on_epsilon[target])


@pytest.mark.parametrize("method", ["min_snr", "smoothed_kl", "edm"])
def test_the_objective_of_a_gradient_field_does_not_depend_on_the_target(method):
    results = [objective(LINEAR, method, prediction_type=y).w_kg for y in ("epsilon", "sample", "v_prediction")]
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=0)
    torch.testing.assert_close(results[2], results[0], rtol=1e-9, atol=0)


def test_continuous_schedules():
    result = objective(CosineSchedule(), "native", **EPSILON)
    assert_objective(result, result.log_snr.numpy(), 1 / np.cosh(result.log_snr.numpy() / 2))
    assert result.log_snr.isfinite().all()
    assert (result.log_snr.diff() > 0).all()
    flow = objective(FlowSchedule(), "native")  # uniform time, weight 1 on the velocity: exp(-l / 2)
    assert_objective(flow, flow.log_snr.numpy(), np.exp(-flow.log_snr.numpy() / 2))
    edm = objective(EDMSchedule(), "native", prediction_type="edm")
    x = edm.log_snr.numpy()
    assert_objective(edm, x, np.exp(-((x - 2.4) ** 2) / (2 * 2.4**2)) * (1 + 4 * np.exp(-x)))


def test_a_given_density_replaces_the_schedules_own():
    result = objective(LINEAR, "native", density="laplace", **EPSILON)
    assert_objective(result, LINEAR.log_snr_table.flip(0), np.exp(-np.abs(LINEAR.log_snr_table.flip(0).numpy()) / 0.5))


def test_an_atom_at_zero_snr_is_left_out():
    result = objective(ZERO_SNR, "min_snr", **EPSILON)
    assert len(result.log_snr) == 999
    assert result.w_kg.isfinite().all()


def test_timesteps_clamped_to_one_log_snr_leave_an_objective():
    result = objective(DDPMWuerstchenScheduler(), "native")
    assert result.w_kg.isfinite().all()
    assert result.w_kg.max() == 1


# monotonicity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [LINEAR, COSINE, CosineSchedule(), FlowSchedule(), EDMSchedule()])
@pytest.mark.parametrize("method", ["elbo", "sigmoid", "flow", "indi", "edm_monotonic"])
def test_objectives_that_do_not_increase_are_monotone_under_any_density(method, schedule):
    result = objective(schedule, method, **EPSILON)
    assert result.monotone
    assert result.negative_mass < 1e-9


@pytest.mark.parametrize("method", ["ddpm", "min_snr", "soft_min_snr", "smoothed_kl"])
def test_bounded_weights_are_not_monotone_under_a_cosine_density(method):
    for schedule in (COSINE, CosineSchedule()):
        assert not objective(schedule, method, **EPSILON).monotone


def test_iddpm_and_laplace_are_not_monotone():
    assert objective(LINEAR, "iddpm", **EPSILON).negative_mass == pytest.approx(1, abs=0.02)
    assert objective(LINEAR, "laplace", **EPSILON).negative_mass == pytest.approx(1, abs=1e-3)


def test_the_negative_mass_of_min_snr_under_a_cosine_density():
    # w_KG = sech(l/2) min(1, 5 e^-l) rises until l = 0, from almost nothing to its maximum
    result = objective(CosineSchedule(), "min_snr", **EPSILON)
    assert result.negative_mass == pytest.approx(1 - result.w_kg[0].item(), rel=1e-12)
    assert result.negative_mass == pytest.approx(1, abs=0.01)


def test_the_negative_mass_is_the_integral_of_the_rises():
    def wavy(log_snr):
        return torch.exp(-0.3 * log_snr) * (2 + torch.sin(2 * log_snr))

    schedule = EDMSchedule(sigma_min=0.05, sigma_max=20.0)
    result = objective(schedule, wavy, density="log_uniform", **EPSILON)
    x = np.linspace(result.log_snr[0].item(), result.log_snr[-1].item(), 200_001)
    w = np.exp(-0.3 * x) * (2 + np.sin(2 * x))
    slope = np.exp(-0.3 * x) * (2 * np.cos(2 * x) - 0.3 * (2 + np.sin(2 * x)))
    expected = integrate.trapezoid(np.maximum(slope, 0), x) / w.max()
    assert expected > 0.1
    assert result.negative_mass == pytest.approx(expected, rel=1e-3)  # a grid of 1001 points


# numbers of the training loop -----------------------------------------------------------------------------------------


def test_mean_weight_is_the_loss_scale():
    snr = np.exp(LINEAR.log_snr_table.numpy())
    assert objective(LINEAR, "smoothed_kl", tau=0.2, **EPSILON).mean_weight == pytest.approx(
        np.mean(1 / (1.2 + 0.2 * snr))
    )
    on_v = objective(LINEAR, "min_snr", prediction_type="v_prediction").mean_weight
    assert on_v == pytest.approx(np.mean(np.minimum(snr, 5) / (snr + 1)))
    assert objective(FlowSchedule(), "native").mean_weight == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize(("schedule", "share"), [(LINEAR, 0.130), (COSINE, 0.261)], ids=["linear", "cosine"])
def test_the_headroom_above_snr_five(schedule, share):
    result = objective(schedule, "smoothed_kl", **EPSILON)
    assert result.headroom == pytest.approx(share, abs=5e-4)
    assert result.headroom == pytest.approx(np.mean(np.exp(schedule.log_snr_table.numpy()) > 5), rel=1e-12)
    assert objective(schedule, headroom_snr=1.0, **EPSILON).headroom > share


def test_the_headroom_of_a_continuous_density():
    # cosine: SNR > s for u < (2 / pi) atan(1 / sqrt(s))
    expected = 2 / math.pi * math.atan(1 / math.sqrt(5))
    assert objective(CosineSchedule(), "ddpm", **EPSILON).headroom == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("target", ["epsilon", "v_prediction"])
def test_the_cubed_weight_is_that_of_the_epsilon_error(target):
    snr = np.exp(LINEAR.log_snr_table.numpy())
    w = np.minimum(1, 5 / snr)
    result = objective(LINEAR, "min_snr", prediction_type=target)
    assert result.cubed_weight == pytest.approx(np.mean(w**3), rel=1e-9)
    assert result.cubed_weight_at_equal_mean == pytest.approx(np.mean(w**3) / np.mean(w) ** 3, rel=1e-9)
    assert result.cubed_weight_at_equal_mean > 1


def test_ddpm_is_the_unit_of_the_cubed_weight():
    result = objective(LINEAR, "ddpm", **EPSILON)
    assert result.cubed_weight == pytest.approx(1, rel=1e-12)
    assert result.cubed_weight_at_equal_mean == pytest.approx(1, rel=1e-12)


# bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "minsnr"}, "Unknown weighting 'minsnr'; choose one of ['ddpm', "),
        ({"gama": 5}, "Weighting 'min_snr' has no hyperparameter 'gama'; it takes ['gamma']."),
        ({"prediction_type": "eps"}, "Unknown prediction_type 'eps'; choose one of ["),
        ({"density": "gauss"}, "Unknown density 'gauss'; choose one of ["),
        ({"headroom_snr": 0}, "`headroom_snr` must be > 0, got 0."),
    ],
)
def test_a_bad_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=r"Unknown|hyperparameter|headroom_snr") as raised:
        objective(**{"schedule": "linear", "method": "min_snr", **EPSILON, **arguments})
    assert str(raised.value).startswith(message)


def test_an_objective_without_mass_is_refused():
    nothing = get_weighting(lambda log_snr: torch.zeros_like(log_snr))
    with pytest.raises(ValueError, match="has no finite objective"):
        objective(LINEAR, nothing, **EPSILON)
