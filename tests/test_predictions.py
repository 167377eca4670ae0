"""The conversion table against predictions written out in every target."""

import math

import pytest
import torch

from snrweights.predictions import LIMIT, PREDICTION_TYPES, convert_log_weight, log_error_ratio

SIGMA_DATA = 0.7
LOG_SNR = torch.tensor([-12.0, -3.0, 0.0, 1.7, 12.0], dtype=torch.float64)


def targets(x0, eps, alpha, sigma):
    """Every target of one noisy sample, in variance-preserving coordinates; `flow_prediction` in its own."""
    x, sigma_hat = x0 + sigma / alpha * eps, sigma / alpha  # rescaled by 1 / alpha: EDM's coordinates
    total = sigma_hat**2 + SIGMA_DATA**2
    c_skip, c_out = SIGMA_DATA**2 / total, sigma_hat * SIGMA_DATA / total**0.5
    return {
        "sample": x0,
        "epsilon": eps,
        "v_prediction": alpha * eps - sigma * x0,
        "flow_prediction": eps - x0,
        "edm": (x0 - c_skip * x) / c_out,
    }


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_error_ratio_is_that_of_one_prediction_written_in_two_targets(prediction_type):
    generator = torch.Generator().manual_seed(0)
    for log_snr in LOG_SNR:
        x0, x0_hat, eps = torch.randn(3, 1000, generator=generator, dtype=torch.float64)
        sigma, alpha = torch.sigmoid(-log_snr).sqrt(), torch.sigmoid(log_snr).sqrt()
        if prediction_type == "flow_prediction":
            alpha, sigma = alpha / (alpha + sigma), sigma / (alpha + sigma)
        # the same noisy sample, read as x0_hat and the noise that then must be in it
        eps_hat = eps + alpha / sigma * (x0 - x0_hat)
        truth = targets(x0, eps, alpha, sigma)[prediction_type]
        prediction = targets(x0_hat, eps_hat, alpha, sigma)[prediction_type]
        ratio = (truth - prediction).square().sum() / (x0 - x0_hat).square().sum()
        expected = log_error_ratio(prediction_type, log_snr, SIGMA_DATA).exp()
        torch.testing.assert_close(ratio, expected, rtol=1e-12, atol=0)


def test_the_table_at_snr_one():
    zero = torch.zeros((), dtype=torch.float64)
    ratios = {name: log_error_ratio(name, zero, 0.5).exp().item() for name in PREDICTION_TYPES}
    expected = {"epsilon": 1, "sample": 1, "v_prediction": 2, "flow_prediction": 4, "edm": 5}
    assert ratios == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("source", PREDICTION_TYPES)
@pytest.mark.parametrize("target", PREDICTION_TYPES)
def test_conversion_there_and_back(source, target):
    log_weight = torch.linspace(-2, 3, 5, dtype=torch.float64)
    there = convert_log_weight(log_weight, LOG_SNR, source, target, SIGMA_DATA)
    back = convert_log_weight(there, LOG_SNR, target, source, SIGMA_DATA)
    torch.testing.assert_close(back, log_weight, rtol=0, atol=1e-14)
    weights_of_x0 = there + log_error_ratio(target, LOG_SNR, SIGMA_DATA)
    torch.testing.assert_close(weights_of_x0, log_weight + log_error_ratio(source, LOG_SNR, SIGMA_DATA))


def test_the_clamped_ends_stand_for_infinite_log_snr():
    ends = torch.tensor([-LIMIT, LIMIT], dtype=torch.float64)
    at_no_signal = {"epsilon": 0.0, "sample": 1.0, "v_prediction": 1.0, "flow_prediction": 1.0, "edm": 4.0}
    for name in PREDICTION_TYPES:
        ratio = log_error_ratio(name, ends, 0.5)
        assert ratio[0].exp().item() == pytest.approx(at_no_signal[name], rel=1e-15)
        if name != "sample":  # every other error is the noise's there, R = SNR
            assert (ratio[1] - LIMIT).item() == pytest.approx(0, abs=1e-12)
        assert (ratio[1].exp() == math.inf) == (name != "sample")


def test_edm_without_sigma_data_says_what_is_missing():
    with pytest.raises(ValueError, match=r"`prediction_type='edm'` needs the schedule's `sigma_data`, got None"):
        log_error_ratio("edm", LOG_SNR)


def test_an_unknown_target_lists_the_choices():
    with pytest.raises(ValueError, match=r"Unknown prediction_type 'eps'; choose one of \['epsilon', 'sample'"):
        convert_log_weight(LOG_SNR, LOG_SNR, "epsilon", "eps")
