"""`auto`: the sigmoid objective with its bias measured, drawn where the weight on EDM's network is constant."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from cases import SCHEDULES
from scipy import integrate, stats

from snrweights import CosineSchedule, EDMSchedule, FlowSchedule, TimestepSampler, get_weighting, objective
from snrweights.densities import Cosine, FlowUniform, Laplace, Logistic, Normal
from snrweights.drawn import mean_under

LOG_SNR = torch.linspace(-20, 20, 81, dtype=torch.float64)
VARIANCES = [0.06, 0.25, 1.0, 7.3]


@pytest.mark.parametrize("v", VARIANCES)
@pytest.mark.parametrize("density", [None, Logistic(0.7), Normal(0.0, 6.0), Laplace(0.0, 5.0)], ids=str)
def test_density_times_weight_on_edms_network_is_the_logistic_density(v, density):
    curve = get_weighting("auto").over_log_snr(EDMSchedule(sigma_data=v**0.5), prediction_type="edm", density=density)
    product = curve.density.log_prob(LOG_SNR) + curve.log_weight(LOG_SNR)
    logistic = stats.logistic(-math.log(v), 1).logpdf(LOG_SNR.numpy())
    np.testing.assert_allclose(np.exp(product.numpy() - logistic), 1, rtol=1e-12)


@pytest.mark.parametrize("v", VARIANCES)
def test_the_density_that_it_asks_for_makes_that_weight_one(v):
    schedule = EDMSchedule(sigma_data=v**0.5)
    auto = get_weighting("auto").for_draws(schedule, FlowUniform())
    density = auto.own_density("edm")
    assert density.loc == pytest.approx(-math.log(v), rel=1e-14)
    assert density.scale == 1
    weight = auto.over_log_snr(schedule, prediction_type="edm", density=density)(LOG_SNR)
    np.testing.assert_allclose(weight, 1, rtol=1e-12)
    for other in ("epsilon", "v_prediction", "sample", "flow_prediction"):
        assert auto.own_density(other) is None


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("v", [0.25, 2.0])
def test_it_is_the_sigmoid_of_the_measured_bias(name, v):
    schedule = SCHEDULES[name]
    for target in ("epsilon", "v_prediction", "sample", "edm"):
        auto, sigmoid = (
            get_weighting(method, **hp).over_log_snr(schedule, prediction_type=target)
            for method, hp in (("auto", {"data_variance": v}), ("sigmoid", {"bias": -math.log(v)}))
        )
        torch.testing.assert_close(auto(LOG_SNR), sigmoid(LOG_SNR), rtol=1e-12, atol=0)


def test_its_objective_is_monotone_and_that_of_the_formula():
    result = objective(CosineSchedule(), "auto", prediction_type="v_prediction", data_variance=0.25)
    expected = 1 / (1 + 0.25 * np.exp(result.log_snr.numpy()))
    np.testing.assert_allclose(result.w_kg, expected / expected.max(), rtol=1e-9)
    assert result.monotone


def test_the_derivation_gaussian_data_shrinks_an_error_of_x0_like_that():
    # the linear denoiser's gain d x0_hat / d x at s is v / (v + s²); w_KG is that gain on errors of epsilon
    v, s = 0.25, torch.exp(-LOG_SNR / 2)
    auto = get_weighting("auto", data_variance=v).log_weight(LOG_SNR).exp()
    torch.testing.assert_close(auto, s**2 / (v + s**2), rtol=1e-12, atol=0)


def field(log_snr):
    """The gradients of a model's epsilon errors at a noise level, two of them."""
    return torch.stack((torch.exp(-((log_snr - 1) ** 2) / 8), torch.tanh(log_snr) * torch.exp(-log_snr.abs() / 2)))


EXPECTED = [
    integrate.quad(
        lambda x, i=i: float(field(torch.tensor(x))[i] / (1 + 0.25 * math.exp(x))), -60, 60, points=[0], limit=400
    )[0]
    for i in (0, 1)
]
DENSITIES = [Cosine(), Cosine(-2.8), FlowUniform(3.0), Logistic(-math.log(0.25)), Normal(0.0, 6.0), Laplace(0.0, 3.0)]


@pytest.mark.parametrize("density", DENSITIES, ids=str)
@pytest.mark.parametrize("target", ["epsilon", "v_prediction", "edm"])
def test_the_expected_gradient_does_not_depend_on_the_density(density, target):
    schedule = EDMSchedule(sigma_data=0.5)
    curve = get_weighting("auto").over_log_snr(schedule, prediction_type=target, density=density)

    def on_epsilon(log_snr, i):
        return (curve.log_weight(log_snr, "epsilon").exp() * field(log_snr))[i]

    for i in (0, 1):
        assert mean_under(density, lambda log_snr, i=i: on_epsilon(log_snr, i)) == pytest.approx(EXPECTED[i], rel=1e-6)


@pytest.mark.parametrize("density", DENSITIES, ids=str)
@pytest.mark.parametrize("schedule", [FlowSchedule(sigma_data=0.5), EDMSchedule(), CosineSchedule(sigma_data=0.5)])
def test_draws_with_its_weights_have_that_expected_gradient(density, schedule):
    sampler = TimestepSampler(schedule, density, draws="independent", seed=3)
    t, weight = sampler.draw(100_000)
    curve = get_weighting("auto").over_log_snr(schedule, prediction_type="v_prediction", density=density)
    log_snr = schedule.log_snr(t)
    # the gradient of the error of v is that of epsilon times 1 + 1 / SNR
    terms = curve(log_snr) * weight * field(log_snr) * (1 + torch.exp(-log_snr))
    error = terms.std(1) / math.sqrt(len(t))
    assert (error < 0.05).all()
    assert ((terms.mean(1) - torch.tensor(EXPECTED)).abs() <= 4.5 * error).all()


# bad input ------------------------------------------------------------------------------------------------------------


def test_it_needs_a_number_where_the_schedule_has_no_sigma_data():
    auto = get_weighting("auto")
    message = "`Auto(data_variance=...)` must be given on a schedule without sigma_data, got None: measure it with "
    for call in (
        lambda: auto.bind("linear", prediction_type="epsilon"),
        lambda: auto.over_log_snr(EDMSchedule(sigma_data=None), prediction_type="v_prediction"),
        lambda: auto.log_weight(LOG_SNR),
    ):
        with pytest.raises(ValueError, match="data_variance") as raised:
            call()
        assert str(raised.value) == message + "`snrweights.data_variance(data)`."


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "half"])
def test_a_variance_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match=r"`Auto\(data_variance=...\)` must be"):
        get_weighting("auto", data_variance=value)


def test_a_given_number_goes_before_that_of_the_schedule():
    schedule = EDMSchedule(sigma_data=0.5)
    assert get_weighting("auto").for_draws(schedule, FlowUniform()).data_variance == 0.25
    given = get_weighting("auto", data_variance=3.0)
    assert given.for_draws(schedule, FlowUniform()) is given
    assert dataclasses.asdict(get_weighting("auto")) == {"data_variance": None}
