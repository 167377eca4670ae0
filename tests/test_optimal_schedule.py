"""The weighting of the optimal loss, and the curve beyond its levels."""

import math

import pytest
import torch
from cases import gaussian_curve

from snrweights import EDMSchedule, get_weighting, loss_weight
from snrweights.optimal import OptimalLossCurve, optimal_loss
from snrweights.predictions import PREDICTION_TYPES

V = 0.25
CURVE = gaussian_curve(V)
SIGMAS = torch.logspace(-3, 3, 61, dtype=torch.float64)
LOG_SNR = -2 * SIGMAS.log()


def j(sigmas):
    """The optimal loss of a dimension of Gaussian data."""
    return V * sigmas**2 / (V + sigmas**2)


# the curve beyond its levels ------------------------------------------------------------------------------------------


def test_inside_its_levels_it_is_the_curve():
    inside = (SIGMAS > 0.0101) & (SIGMAS < 99)
    torch.testing.assert_close(CURVE.log_value(LOG_SNR[inside]).exp(), CURVE.at(SIGMAS[inside]), rtol=1e-12, atol=0)


def test_above_its_levels_it_becomes_the_variance_as_the_data_do():
    narrow = gaussian_curve(V, high=10.0)
    above = SIGMAS[SIGMAS > 10]
    missing = 1 - narrow.log_value(-2 * above.log()).exp() / (4 * V)
    torch.testing.assert_close(missing, V / (V + above**2), rtol=3e-3, atol=0)
    assert narrow.log_value(torch.tensor([-4096.0])).exp().item() == 4 * V


def test_below_its_levels_it_is_no_less_than_the_data_have():
    points = torch.tensor([[-0.5], [0.5]], dtype=torch.float64)
    levels = torch.tensor([0.1, 0.15, 0.2, 0.4, 0.8], dtype=torch.float64)
    made = {"dim": 1, "variance": 0.25}
    exact = torch.tensor([2.232050107230354e-07, 0.0, 4.737961718335191e-03, 0.02, 0.1], dtype=torch.float64)
    exact[1] = optimal_loss(points, [0.15], draws=200_000).value[0]
    cut = OptimalLossCurve(levels[1:], exact[1:], 0 * exact[1:], ("pairs",) * 4, exact[1:], made)
    below = cut.log_value(torch.tensor([-2 * math.log(0.1), -2 * math.log(0.01), 4096.0])).exp()
    assert exact[0] < below[0] < exact[1]
    assert 0 <= below[1] < below[0]
    assert below[2] == 0


def test_it_is_continuous_at_its_ends():
    narrow = gaussian_curve(V, low=0.1, high=10.0)
    for end in (0.1, 10.0):
        at = -2 * torch.tensor([end * (1 - 1e-9), end * (1 + 1e-9)], dtype=torch.float64).log()
        low, high = narrow.log_value(at).tolist()
        assert low == pytest.approx(high, abs=1e-7)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_it_is_the_loss_of_any_target(prediction_type):
    inside = (SIGMAS > 0.0101) & (SIGMAS < 99)
    expected = CURVE.at(SIGMAS[inside], prediction_type, "mean", 0.5)
    torch.testing.assert_close(CURVE.mean_loss(LOG_SNR[inside], prediction_type, 0.5), expected, rtol=1e-12, atol=0)
    at_zero_snr = {"sample": V, "epsilon": 0.0, "v_prediction": V, "flow_prediction": V, "edm": V / 0.25}
    ends = CURVE.mean_loss(torch.tensor([-math.inf, math.inf]), prediction_type, 0.5)
    assert ends[0].item() == pytest.approx(at_zero_snr[prediction_type], rel=1e-12)


# the weighting --------------------------------------------------------------------------------------------------------


def weight(log_snr=LOG_SNR, **hp):
    return get_weighting("optimal_loss", **{"curve": CURVE, **hp}).log_weight(log_snr).exp()


def test_it_is_its_formula():
    hp = {"w_max": 30.0, "mu": -1.0, "var": 0.5, "sigma_star": 0.4, "scale": 0.02}
    first = 0.02 * (1 / j(SIGMAS)).clamp_max(30.0)
    bump = torch.exp(-((SIGMAS.log() + 1) ** 2) / (2 * 0.5)) / math.sqrt(2 * math.pi * 0.5)
    inside = (SIGMAS >= 0.0101) & (SIGMAS < 99)
    expected = (first + torch.where(SIGMAS < 0.4, bump, 0.0))[inside]
    torch.testing.assert_close(weight(**hp)[inside], expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(weight(**hp)[SIGMAS < 0.0101], (0.02 * 30 + bump)[SIGMAS < 0.0101], rtol=1e-12, atol=0)


def test_its_defaults_make_both_terms_as_high_and_end_the_second_at_one_per_cent():
    made = get_weighting("optimal_loss", curve=CURVE, w_max=50.0, var=0.7)
    assert made.scale * 50.0 == pytest.approx(1 / math.sqrt(2 * math.pi * 0.7), rel=1e-12)
    assert made.sigma_star == CURVE.sigmas[CURVE.value > 0.01 * 4 * V][0]
    assert j(made.sigma_star) == pytest.approx(0.01 * V, rel=0.05)


def test_a_models_loss_at_the_floor_is_one_under_the_first_term():
    alone = weight(w_max=1e9, mu=-50.0, scale=1.0)
    inside = (SIGMAS >= 0.0101) & (SIGMAS < 99)
    torch.testing.assert_close((alone * j(SIGMAS))[inside], torch.ones(int(inside.sum())).double(), rtol=1e-7, atol=0)


def test_a_file_is_as_good_as_the_curve(tmp_path):
    CURVE.save(tmp_path / "curve.safetensors")
    assert torch.equal(weight(curve=tmp_path / "curve.safetensors"), weight())
    t = torch.tensor([0.3])
    options = {"prediction_type": "edm", "curve": str(tmp_path / "curve.safetensors")}
    expected = get_weighting("optimal_loss", curve=CURVE).bind(EDMSchedule(), prediction_type="edm")(t)
    assert torch.equal(loss_weight(t, EDMSchedule(), "optimal_loss", **options), expected)


@pytest.mark.parametrize(
    ("hp", "error", "message"),
    [
        ({"curve": None}, TypeError, r"`OptimalLoss\(curve=...\)` must be an OptimalLossCurve or the path.*got None"),
        ({"curve": 3.0}, TypeError, "got 3.0: make one of the training data with `snrweights optimal-loss`"),
        ({"curve": "nowhere.safetensors"}, FileNotFoundError, "nowhere.safetensors"),
        ({"w_max": 0.0}, ValueError, r"`OptimalLoss\(w_max=...\)` must be > 0, got 0.0"),
        (
            {"curve": gaussian_curve(V, high=0.02)},
            ValueError,
            r"`OptimalLoss\(sigma_star=...\)` must be given: on no level of OptimalLossCurve\(401 levels, sigma 0.01 "
            r"to 0.02, dim 4\) is J over 1% of its limit",
        ),
    ],
)
def test_what_it_cannot_use_is_named(hp, error, message):
    with pytest.raises(error, match=message):
        weight(**hp)
