"""Smoothed-KL against its definition, and its cross-walks to Min-SNR and Soft-Min-SNR."""

import math
import re

import numpy as np
import pytest
import torch

from snrweights import DiscreteSchedule, EDMSchedule, FlowSchedule, get_weighting, match
from snrweights.predictions import PREDICTION_TYPES
from snrweights.weightings.clipped import MinSNR, SmoothedKL, SoftMinSNR

ALPHA_SIGMA = {
    "vp": lambda log_snr: (1 / math.sqrt(1 + math.exp(-log_snr)), 1 / math.sqrt(1 + math.exp(log_snr))),
    "ve": lambda log_snr: (1.0, math.exp(-log_snr / 2)),
    "flow": lambda log_snr: (1 / (1 + math.exp(-log_snr / 2)), 1 / (1 + math.exp(log_snr / 2))),
}
LINEAR = DiscreteSchedule.from_name("linear")
COSINE = DiscreteSchedule.from_name("squaredcos_cap_v2")
LOG_SNR = torch.linspace(-9, 9, 37, dtype=torch.float64)


def w_epsilon(name, log_snr, schedule=LINEAR, **hp):
    curve = get_weighting(name, **hp).over_log_snr(schedule, prediction_type="epsilon")
    return curve(torch.as_tensor(log_snr, dtype=torch.float64))


def smoothed_kl(mean_p, mean_q, sigma, tau):
    """KL of two Gaussians of standard deviation sigma, each convolved with N(0, tau), by sums over a fine grid."""
    reach = 9 * math.sqrt(sigma**2 + tau) + abs(mean_p - mean_q)
    step = reach / 1500
    x = (mean_p + mean_q) / 2 + step * np.arange(-1500, 1501)

    def normal(x, variance):
        return np.exp(-(x**2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)

    kernel = normal(step * np.arange(-1500, 1501), tau)
    p, q = (np.convolve(normal(x - mean, sigma**2), kernel, mode="same") * step for mean in (mean_p, mean_q))
    return np.sum(p * np.log(p / q)) * step


@pytest.mark.parametrize("tau", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("log_snr", [-4.0, 0.0, 3.0])
@pytest.mark.parametrize("coords", ["vp", "ve", "flow"])
def test_the_weight_is_that_of_two_gaussians_smoothed_and_compared(coords, log_snr, tau):
    alpha, sigma = ALPHA_SIGMA[coords](log_snr)
    x0, x0_hat = 0.3, 0.3 + 0.8 * sigma / alpha  # an epsilon error of 0.8
    e_epsilon = alpha * (x0 - x0_hat) / sigma
    divergence = smoothed_kl(alpha * x0, alpha * x0_hat, sigma, tau)
    weight = w_epsilon("smoothed_kl", log_snr, tau=tau, coords=coords).item()
    assert divergence == pytest.approx(weight * e_epsilon**2 / 2, rel=1e-9)


@pytest.mark.parametrize(("coords", "schedule"), [("vp", LINEAR), ("ve", EDMSchedule()), ("flow", FlowSchedule())])
def test_native_coordinates_are_those_of_the_schedule(coords, schedule):
    native = w_epsilon("smoothed_kl", LOG_SNR, schedule, coords="native")
    assert torch.equal(native, w_epsilon("smoothed_kl", LOG_SNR, schedule, coords=coords))
    others = {"vp", "ve", "flow"} - {coords}
    assert not any(torch.allclose(native, w_epsilon("smoothed_kl", LOG_SNR, schedule, coords=c)) for c in others)


def test_vp_coordinates_are_the_default_everywhere():
    expected = 1 / (1 + 0.2 * (1 + LOG_SNR.exp()))
    for schedule in (LINEAR, EDMSchedule(), FlowSchedule()):
        torch.testing.assert_close(w_epsilon("smoothed_kl", LOG_SNR, schedule), expected, rtol=1e-12, atol=0)


def test_without_smoothing_it_is_ddpm():
    torch.testing.assert_close(
        w_epsilon("smoothed_kl", LOG_SNR, tau=1e-12), torch.ones_like(LOG_SNR), rtol=1e-7, atol=0
    )


# cross-walks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.05, 0.2, 1.0])
def test_in_vp_it_is_soft_min_snr_times_a_constant(tau):
    smoothed, soft = (
        w_epsilon("smoothed_kl", LOG_SNR, tau=tau),
        w_epsilon("soft_min_snr", LOG_SNR, gamma=(1 + tau) / tau),
    )
    torch.testing.assert_close(smoothed, soft / (1 + tau), rtol=1e-12, atol=0)


def test_in_ve_it_is_soft_min_snr():
    smoothed = w_epsilon("smoothed_kl", LOG_SNR, tau=0.2, coords="ve")
    torch.testing.assert_close(smoothed, w_epsilon("soft_min_snr", LOG_SNR, gamma=5.0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("tau", [0.1, 0.2, 0.5])
def test_against_min_snr_the_tails_agree_and_the_knee_does_not(tau):
    def ratio(snr):
        log_snr = math.log(snr)
        return (w_epsilon("smoothed_kl", log_snr, tau=tau) / w_epsilon("min_snr", log_snr, gamma=1 / tau)).item()

    assert ratio(1e12) == pytest.approx(1, abs=1e-10)  # clean: equal
    assert ratio(1e-12) == pytest.approx(1 / (1 + tau), abs=1e-10)  # noisy: equal up to 1 + tau
    assert ratio(1 / tau) == pytest.approx(1 / (2 + tau), rel=1e-12)


def test_the_two_gammas_are_off_by_one():
    soft = match("smoothed_kl", to="soft_min_snr", schedule="linear", tau=0.2)
    hard = match("smoothed_kl", to="min_snr", schedule="linear", tau=0.2)
    assert (soft.exact, hard.exact) == (True, False)
    assert soft.counterpart.gamma == pytest.approx(6, rel=1e-15)
    assert hard.counterpart.gamma == pytest.approx(5, rel=1e-15)
    assert soft.weighting == hard.weighting == SmoothedKL(tau=0.2)


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2", "flow"])
def test_an_exact_match_deviates_by_rounding(schedule):
    found = match("smoothed_kl", to="soft_min_snr", schedule=schedule, tau=0.3)
    assert found.max_deviation < 1e-12
    assert found.mean_deviation < 1e-12
    back = match("soft_min_snr", to="smoothed_kl", schedule=schedule, gamma=found.counterpart.gamma)
    assert back.counterpart.tau == pytest.approx(0.3, rel=1e-12)
    assert back.max_deviation < 1e-12


def test_a_leading_order_match_reports_how_far_apart_the_normalised_weights_are():
    found = match("min_snr", to="smoothed_kl", schedule=LINEAR, gamma=5.0)
    assert found.counterpart == SmoothedKL(tau=0.2)
    snr = np.exp(LINEAR.log_snr_table.numpy())
    hard, smooth = np.minimum(1, 5 / snr), 1 / (1.2 + 0.2 * snr)
    difference = np.abs(hard / hard.mean() - smooth / smooth.mean())
    assert found.max_deviation == pytest.approx(difference.max(), rel=1e-9)
    assert found.mean_deviation == pytest.approx(difference.mean(), rel=1e-9)
    assert "(leading order; weights of mean 1 differ by at most 0.4" in str(found)


def test_coordinates_enter_the_cross_walk():
    ve = match("smoothed_kl", to="soft_min_snr", schedule="edm", tau=0.2, coords="native")
    assert ve.counterpart == SoftMinSNR(gamma=5.0)
    assert ve.max_deviation < 1e-12
    assert match("smoothed_kl", to="min_snr", schedule="edm", tau=0.2, coords="ve").counterpart == MinSNR(gamma=5.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"method": "ddpm", "to": "min_snr"},
            "No cross-walk from 'ddpm' to 'min_snr'; choose one of [('smoothed_kl', ",
        ),
        (
            {"method": "soft_min_snr", "to": "smoothed_kl", "gamma": 1.0},
            "`SoftMinSNR(gamma=...)` must be > 1 to have a",
        ),
        (
            {"method": "smoothed_kl", "to": "soft_min_snr", "coords": "flow"},
            "`SmoothedKL(coords='flow')` has no Soft-Min-SNR counterpart; choose one of ['vp', 've'].",
        ),
        (
            {"method": "smoothed_kl", "to": "min_snr", "gamma": 5},
            "Weighting 'smoothed_kl' has no hyperparameter 'gamma'",
        ),
    ],
)
def test_what_has_no_counterpart_says_so(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        match(**arguments, schedule="linear")


# the loss scale -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "smoothed", "clipped"), [(LINEAR, 0.710, 0.913), (COSINE, 0.597, 0.824)], ids=["linear", "cosine"]
)
def test_the_mean_weights_over_uniform_timesteps(schedule, smoothed, clipped):
    means = [w_epsilon(name, schedule.log_snr_table).mean().item() for name in ("smoothed_kl", "min_snr")]
    assert means == pytest.approx([smoothed, clipped], abs=5e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_at_mean_one_the_exact_match_is_the_same_weight_for_every_target(prediction_type):
    schedule, options = EDMSchedule(), {"prediction_type": prediction_type, "normalize": "mean", "density": "laplace"}
    smoothed = get_weighting("smoothed_kl", tau=0.25).over_log_snr(schedule, **options)
    soft = get_weighting("soft_min_snr", gamma=5.0).over_log_snr(schedule, **options)
    torch.testing.assert_close(smoothed(LOG_SNR), soft(LOG_SNR), rtol=1e-12, atol=0)
