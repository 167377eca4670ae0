"""The training schedule of the optimal loss: its weighting, and the rule that draws by the gap."""

import math
import pickle

import pytest
import torch
from cases import SCHEDULES, gaussian_curve

from snrweights import EDMSchedule, ImportanceSampler, get_weighting, loss_weight
from snrweights.optimal import OptimalLossCurve, optimal_loss
from snrweights.optimal.rule import gap_rule

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


# the rule -------------------------------------------------------------------------------------------------------------


def sampler_of(schedule, prediction_type, density=None, method="edm", **options):
    bound = get_weighting(method).bind(schedule, prediction_type=prediction_type, density=density)
    options = {"bins": 8, "warm_up": 1, "refresh_every": 1, **options}
    return bound, ImportanceSampler(schedule, gap_rule(CURVE, bound), density=density, **options)


@pytest.mark.parametrize(
    ("schedule", "prediction_type"),
    [("linear", "epsilon"), ("linear", "v_prediction"), ("flow", "flow_prediction"), ("edm", "edm")],
)
def test_it_draws_by_the_weighted_gap_of_any_target(schedule, prediction_type):
    schedule = SCHEDULES[schedule]
    bound, sampler = sampler_of(schedule, prediction_type, method="soft_min_snr")
    t, _ = sampler.draw(40_000)
    log_snr = schedule.log_snr(t).double()
    floor = CURVE.log_value(log_snr).exp() / 4
    extra = 0.02 * torch.sigmoid(log_snr)  # on x0
    ratio = (bound.curve.log_weight(log_snr, "sample") - bound.curve.log_weight(log_snr)).exp()  # R_y
    sampler.update(t, (floor + extra) * ratio, weight=bound(t))
    sampler.draw(1)
    bin = torch.bucketize(log_snr, sampler.evidence.edges[1:-1])
    gap = torch.zeros(8).double().index_add_(0, bin, extra * ratio * bound(t).double()) / len(t)
    p, q = sampler.probabilities()
    torch.testing.assert_close(q, 0.1 * p + 0.9 * gap / gap.sum(), rtol=0.02, atol=2e-3)


def test_below_the_floor_it_draws_its_share_of_the_base_alone():
    _, sampler = sampler_of(EDMSchedule(), "edm", "log_uniform", bins=2)
    t = torch.tensor([0.01, 0.02, 10.0, 20.0])
    sampler.update(t, torch.tensor([0.0, 0.0, 5.0, 5.0]))
    sampler.draw(1)
    torch.testing.assert_close(sampler.probabilities()[1], torch.tensor([0.95, 0.05]).double(), rtol=1e-6, atol=0)


def test_a_model_at_the_floor_everywhere_is_drawn_for_as_before():
    _, sampler = sampler_of(EDMSchedule(), "edm", "log_uniform", bins=2)
    sampler.update(torch.tensor([0.01, 10.0]), torch.zeros(2))
    sampler.draw(1)
    p, q = sampler.probabilities()
    assert torch.equal(p, q)


@pytest.mark.parametrize(("mode", "power"), [("resample", 1), ("uncorrected", 0)])
def test_corrected_it_keeps_the_objective_and_uncorrected_it_does_not(mode, power):
    _, sampler = sampler_of(EDMSchedule(), "edm", "log_uniform", bins=2, mode=mode)
    sampler.update(torch.tensor([0.05, 3.0]), torch.tensor([5.0, 50.0]))
    t, factor = sampler.draw(200_000)
    p, q = sampler.probabilities()
    assert (p - q).abs().max() > 0.2
    noisy = t > math.sqrt(0.002 * 80)
    drawn = torch.stack([noisy.double().mean(), 1 - noisy.double().mean()])
    torch.testing.assert_close(drawn, q, rtol=0, atol=5e-3)
    shares = torch.stack([factor[noisy].sum(), factor[~noisy].sum()]).double() / len(t)
    torch.testing.assert_close(shares, p if power else q, rtol=0, atol=5e-3)


def test_uncorrected_its_effective_sample_size_is_whole():
    _, sampler = sampler_of(EDMSchedule(), "edm", "log_uniform", bins=2, mode="uncorrected")
    sampler.update(torch.tensor([0.05, 3.0]), torch.tensor([5.0, 50.0]))
    sampler.draw(1)
    assert sampler.predicted().effective_sample_size == pytest.approx(1)
    assert sampler.predicted().of == "the mean gap to the optimal loss"


def test_a_sampler_with_the_rule_can_be_pickled():
    _, sampler = sampler_of(EDMSchedule(), "edm", "log_uniform")
    sampler.update(torch.tensor([0.05, 3.0]), torch.tensor([5.0, 50.0]))
    again = pickle.loads(pickle.dumps(sampler))
    assert torch.equal(again.draw(9)[0], sampler.draw(9)[0])
