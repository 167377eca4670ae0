"""Weights of masked diffusion: formulas, limits, refusals, and the objective on a joint solved exactly."""

import doctest
import inspect
import math
import re
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from joints import LENGTH, MASK_ID, MASKS, TOKENS, Joint, every_case, exact_negative_elbo, sums_by_count
from scipy import integrate, stats

import snrweights
from snrweights import get_weighting, masked
from snrweights.masked import (
    CosineSchedule,
    LinearSchedule,
    PolynomialSchedule,
    count_factor,
    draw_times,
    elbo_from_token_mean,
    get_masked_schedule,
    get_masked_weighting,
    is_monotone,
    list_masked_weightings,
    mask_tokens,
    masked_factor,
    masked_loss,
    masked_weight,
    negative_elbo,
    negative_mass,
    register_masked_weighting,
    token_mean,
)
from snrweights.masked.schedules import Product
from snrweights.masked.weights import _REGISTRY, MaskedWeighting

SCHEDULES = [LinearSchedule(), CosineSchedule(), PolynomialSchedule(), PolynomialSchedule(0.5), PolynomialSchedule(3.0)]
METHODS = list_masked_weightings()
INF = math.inf
# from the formulas as published, in the digits of a context of mpmath: the mask ratio, -alpha', and the weights of both
RATIO = {
    LinearSchedule: lambda m, t, p: t,
    CosineSchedule: lambda m, t, p: m.sin(m.pi * t / 2),
    PolynomialSchedule: lambda m, t, p: t**p,
}
FALL = {
    LinearSchedule: lambda m, t, p: m.mpf(1),
    CosineSchedule: lambda m, t, p: m.pi / 2 * m.sin(m.pi * (1 - t) / 2),
    PolynomialSchedule: lambda m, t, p: p * t ** (p - 1),
}


def log_odds(m, r):
    return m.log((1 - r) / r)


def normal(m, x, mean, deviation):
    return m.exp(-(((x - mean) / deviation) ** 2) / 2) / (deviation * m.sqrt(2 * m.pi))


def published_edm(m, log_snr):
    return normal(m, log_snr, m.mpf(12) / 5, m.mpf(12) / 5) * (m.exp(-log_snr) + m.mpf(1) / 4)


WEIGHTS = {
    "elbo": lambda m, r, fall: m.mpf(1),
    "simple": lambda m, r, fall: r / fall,
    "flow": lambda m, r, fall: m.sqrt(r / (1 - r)),
    "sigmoid": lambda m, r, fall: r / (1 - (1 - m.exp(-2)) * (1 - r)),  # bias 2
    "iddpm": lambda m, r, fall: 2 * m.sqrt(r * (1 - r)),
    "edm": lambda m, r, fall: published_edm(m, log_odds(m, r)),
}
HP = {"sigmoid": {"bias": 2.0}}
DIGITS = mpmath.mp.clone()
DIGITS.dps = 60


def published(t, schedule, method, m=DIGITS):
    """The mask ratio, -alpha' and w at one t."""
    t, power = m.mpf(t), m.mpf(getattr(schedule, "power", 1))
    r, fall = (formulas[type(schedule)](m, t, power) for formulas in (RATIO, FALL))
    return r, fall, WEIGHTS[method](m, r, fall)


TIMES = [1e-30, 2.0**-24, 1e-3, 0.1, 0.5, 0.75, 0.999, 1 - 2.0**-24]


# schedules


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_a_schedule_is_its_formula_to_the_last_digits_near_both_ends(schedule):
    t = torch.tensor(TIMES, dtype=torch.float32).double()  # float32 times, exactly
    for i, time in enumerate(t.tolist()):
        r, fall, _ = published(time, schedule, "elbo")
        one = t[i]
        assert float(schedule.masked(one)) == pytest.approx(float(r), rel=1e-14, abs=0)
        assert float(schedule.alpha(one)) == pytest.approx(float(1 - r), rel=1e-14, abs=0)
        assert float(schedule.d_alpha(one)) == pytest.approx(float(-fall), rel=1e-13, abs=0)
        assert float(schedule.log_snr(one)) == pytest.approx(float(log_odds(DIGITS, r)), rel=1e-14, abs=1e-14)
        in_single = torch.tensor(time, dtype=torch.float32)
        assert schedule.log_snr(in_single).dtype == torch.float64
        assert schedule.log_snr(in_single) == schedule.log_snr(one)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_a_schedule_is_exact_at_both_ends(schedule):
    ends = torch.tensor([0.0, 1.0])
    assert schedule.alpha(ends).tolist() == [1, 0]
    assert schedule.masked(ends).tolist() == [0, 1]
    assert schedule.log_snr(ends).tolist() == [INF, -INF]
    assert schedule.time(torch.tensor([1.0, 0.0])).tolist() == [0, 1]


def test_the_slopes_at_the_ends():
    ends = torch.tensor([0.0, 1.0])
    assert LinearSchedule().d_alpha(ends).tolist() == [-1, -1]
    assert CosineSchedule().d_alpha(ends).tolist() == pytest.approx([-math.pi / 2, 0])
    assert PolynomialSchedule(2.0).d_alpha(ends).tolist() == pytest.approx([0, -2])
    assert PolynomialSchedule(0.5).d_alpha(ends).tolist() == pytest.approx([-INF, -0.5])
    assert PolynomialSchedule(1.0).d_alpha(ends).tolist() == [-1, -1]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_alpha_falls_with_its_derivative_and_time_is_its_inverse(schedule):
    t = torch.linspace(0.001, 0.999, 999, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(schedule.alpha(t).sum(), t)
    torch.testing.assert_close(schedule.d_alpha(t.detach()), slope, rtol=1e-11, atol=1e-12)
    assert (slope < 0).all()
    alpha = schedule.alpha(t.detach())
    torch.testing.assert_close(schedule.alpha(schedule.time(alpha)), alpha, rtol=1e-12, atol=0)
    torch.testing.assert_close(schedule.time(alpha), t.detach(), rtol=0, atol=1e-9)
    late = torch.tensor([1 - 2.0**-24], dtype=torch.float64)
    torch.testing.assert_close(1 - schedule.time(schedule.alpha(late)), 1 - late, rtol=1e-8, atol=0)


def test_a_power_of_one_is_the_linear_schedule():
    t = torch.rand(100, dtype=torch.float64)
    torch.testing.assert_close(PolynomialSchedule(1.0).log_snr(t), LinearSchedule().log_snr(t), rtol=1e-12, atol=1e-14)
    for method in METHODS:
        one, other = (masked_factor(t, schedule, method) for schedule in (PolynomialSchedule(1.0), "linear"))
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


# weights


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_a_weight_and_its_factor_are_the_formulas_near_both_ends_too(schedule, method):
    for dtype, rel in ((torch.float64, 2e-12), (torch.float32, 1e-6)):
        t = torch.tensor(TIMES, dtype=torch.float32).to(dtype)
        weight = masked_weight(t, schedule, method, **HP.get(method, {}))
        factor = masked_factor(t, schedule, method, **HP.get(method, {}))
        assert weight.dtype == factor.dtype == dtype
        for i, time in enumerate(t.double().tolist()):
            r, fall, w = published(time, schedule, method)
            tiny = 0 if dtype == torch.float64 else 1e-44  # below float32
            assert weight[i].item() == pytest.approx(float(w), rel=rel, abs=tiny)
            expected = float(w * fall / r)
            huge = dtype == torch.float32 and expected > 3.4e38
            assert factor[i].item() == (INF if huge else pytest.approx(expected, rel=rel, abs=tiny))


# w(0), w(1) and the factor at 0 and 1, worked out by hand
ENDS = [
    ("linear", "elbo", 1, 1, INF, 1),
    ("linear", "simple", 0, 1, 1, 1),
    ("linear", "flow", 0, INF, INF, INF),
    ("linear", "sigmoid", 0, 1, math.exp(2), 1),
    ("linear", "iddpm", 0, 0, INF, 0),
    ("linear", "edm", 0, 0, 0, 0),
    ("cosine", "elbo", 1, 1, INF, 0),
    ("cosine", "simple", 0, INF, 1, 1),
    ("cosine", "flow", 0, INF, INF, math.pi / math.sqrt(2)),
    ("cosine", "sigmoid", 0, 1, math.exp(2) * math.pi / 2, 0),
    ("cosine", "iddpm", 0, 0, INF, 0),
    ("cosine", "edm", 0, 0, 0, 0),
    ("polynomial", "elbo", 1, 1, INF, 2),
    ("polynomial", "simple", 0, 0.5, 1, 1),
    ("polynomial", "flow", 0, INF, 2, INF),
    ("polynomial", "sigmoid", 0, 1, 0, 2),
    ("polynomial", "iddpm", 0, 0, 4, 0),
    ("polynomial", "edm", 0, 0, 0, 0),
]


@pytest.mark.parametrize(("schedule", "method", "w0", "w1", "f0", "f1"), ENDS)
def test_the_limits_at_both_ends_are_exact(schedule, method, w0, w1, f0, f1):
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    hp = HP.get(method, {})
    assert masked_weight(ends, schedule, method, **hp).tolist() == pytest.approx([w0, w1], rel=1e-15, abs=0)
    assert masked_factor(ends, schedule, method, **hp).tolist() == pytest.approx([f0, f1], rel=1e-15, abs=0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_the_factor_of_simple_is_exactly_one_at_every_time(schedule):
    t = torch.cat((torch.rand(1000), torch.tensor([0.0, 1e-38, 1 - 2.0**-24, 1.0])))
    assert (masked_factor(t, schedule, "simple") == 1).all()


def test_simple_on_the_linear_schedule_is_sigmoid_with_bias_0_and_the_mask_ratio():
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    torch.testing.assert_close(masked_weight(t, "linear", "simple"), t, rtol=1e-14, atol=0)
    torch.testing.assert_close(masked_weight(t, "linear", "sigmoid", bias=0.0), t, rtol=1e-14, atol=0)


def test_simple_on_the_cosine_schedule_is_a_tangent():
    t = torch.linspace(0, 0.999, 1000, dtype=torch.float64)
    tangent = 2 / math.pi * torch.tan(math.pi * t / 2)
    torch.testing.assert_close(masked_weight(t, "cosine", "simple"), tangent, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("method", "continuous", "scale"),
    [(name, name, 1) for name in ("elbo", "sigmoid", "flow", "iddpm")] + [("edm", "edm_monotonic", 4)],
)
def test_the_weights_are_the_objectives_of_continuous_diffusion_at_the_same_log_snr(method, continuous, scale):
    t = torch.linspace(0.001, 0.96, 500, dtype=torch.float64)  # l > -3.2, where edm_monotonic is edm
    hp = HP.get(method, {})
    expected = get_weighting(continuous, **hp).log_weight(LinearSchedule().log_snr(t)).exp()
    torch.testing.assert_close(scale * masked_weight(t, "linear", method, **hp), expected, rtol=1e-12, atol=0)


def test_iddpm_and_edm_are_told_apart_by_their_maxima():
    log_snr = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
    t = torch.sigmoid(-log_snr)
    places = {}
    for method in ("iddpm", "edm"):
        weight = masked_weight(t, "linear", method)
        places[method] = (round(log_snr[weight.argmax()].item(), 3), round(weight.max().item(), 6))
    peak = mpmath.findroot(lambda x: -(x - 2.4) / 2.4**2 - 4 / (mpmath.exp(x) + 4), -3.3)
    assert places["iddpm"] == (0.0, 1.0)
    assert places["edm"] == (round(float(peak), 3), round(float(published_edm(mpmath.mp, peak)), 6))
    assert places["edm"] == (-3.308, 0.271027)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial"])
def test_all_but_iddpm_and_edm_are_monotone_in_t_and_those_lose_their_maxima(schedule):
    assert [name for name in METHODS if is_monotone(name, schedule)] == ["elbo", "simple", "flow", "sigmoid"]
    assert is_monotone("sigmoid", schedule, bias=-7.5)
    assert negative_mass("elbo", schedule) == negative_mass("flow", schedule) == 0
    assert negative_mass("iddpm", schedule) == pytest.approx(1, abs=1e-12)  # from the largest w to nothing
    assert negative_mass("edm", schedule) == pytest.approx(1, abs=1e-12)


def test_simple_is_not_monotone_on_every_schedule():
    class Late(LinearSchedule):  # -alpha' / (1 - alpha) rises with 1 - alpha
        def rate(self, level):
            return Product(masked=2.0)

    assert not is_monotone("simple", Late())


def test_the_negative_mass_is_what_a_weight_loses_in_all():
    class Dip(MaskedWeighting):  # falls from 1 to 1/2 about l = 0, and rises to 1 again
        def weight(self, level, schedule):
            return Product(log_rest=torch.log1p(-2 * (level.log_masked + level.log_kept).exp()))

    assert negative_mass(Dip()) == pytest.approx(0.5, abs=1e-8)


def test_a_weighting_of_ones_own_is_one_class():
    @register_masked_weighting("test_ratio", formula="(1 - alpha)^power", source="here")
    class Ratio(MaskedWeighting):
        power: float = snrweights.hyper(1.0, above=0)

        def weight(self, level, schedule):
            return Product(masked=self.power)

    try:
        t = torch.tensor([0.0, 0.5])
        assert masked_weight(t, "linear", "test_ratio", power=3).tolist() == [0, 0.125]
        assert masked_weight(t, "linear", Ratio(power=3)).tolist() == [0, 0.125]
        with pytest.raises(ValueError, match=r"`Ratio\(power=\.\.\.\)` must be > 0, got 0"):
            get_masked_weighting("test_ratio", power=0)
        with pytest.raises(ValueError, match="'test_ratio' is registered already, as Ratio"):
            register_masked_weighting("test_ratio")
    finally:
        del _REGISTRY["test_ratio"]


# the objective on a joint that is solved exactly


@pytest.fixture(scope="module")
def joint():
    return Joint()


@pytest.fixture(scope="module")
def wrong():
    """Logits that are not the joint's: the objective is to be right for any model."""
    logits = torch.randn((TOKENS + 1) ** LENGTH, LENGTH, TOKENS, generator=torch.Generator().manual_seed(5)).double()
    radix = (TOKENS + 1) ** torch.arange(LENGTH)
    return lambda masked: logits[(masked * radix).sum(1)]


ANGLES, ANGLE_WEIGHTS = (torch.tensor(each) * math.pi / 4 for each in np.polynomial.legendre.leggauss(100))
# t = sin² of an angle in (0, pi / 2): the ends, where a factor may be infinite, are approached smoothly
T = torch.sin(ANGLES + math.pi / 4) ** 2
DT = torch.sin(2 * ANGLES + math.pi / 2) * ANGLE_WEIGHTS


def expected_loss(joint, predict, schedule, loss):
    """∫ dt over all sequences and all independent masks of ``loss(logits, tokens, mask, t) -> (cases,)``."""
    masked, tokens, mask, probabilities = every_case(joint)
    t = T.repeat_interleave(len(mask))
    count = mask.sum(1).repeat(len(T))
    chance = schedule.masked(t) ** count * schedule.alpha(t) ** (LENGTH - count)
    losses = loss(*(each.repeat(len(T), *[1] * (each.ndim - 1)) for each in (predict(masked), tokens, mask)), t)
    return (DT.repeat_interleave(len(mask)) * probabilities.repeat(len(T)) * chance * losses).sum().item()


def integral(joint, predict, weight):
    """∫ weight(r) / r CE_sum(r) dr by scipy, from sums over masks."""
    sums = sums_by_count(joint, predict).numpy()

    def integrand(r):
        chances = [math.comb(LENGTH, n) * r ** (n - 1) * (1 - r) ** (LENGTH - n) for n in range(1, LENGTH + 1)]
        return weight(r) * float(np.dot(chances, sums))

    return integrate.quad(integrand, 0, 1, limit=500, epsabs=1e-12, epsrel=1e-11)[0]


def test_with_the_exact_conditionals_the_negative_elbo_is_the_entropy(joint):
    assert exact_negative_elbo(joint, joint.predict).item() == pytest.approx(joint.entropy.item(), rel=1e-12)
    marginals = sum(-(p * p.log()).sum().item() for p in joint.predict(torch.full((1, LENGTH), MASK_ID))[0].exp())
    assert marginals > 1.05 * joint.entropy  # far from independent


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_the_elbo_is_the_entropy_whatever_the_schedule(joint, schedule):
    def loss(logits, tokens, mask, t):
        return masked_loss(logits, tokens, mask, t, schedule, "elbo", reduction="none")

    assert expected_loss(joint, joint.predict, schedule, loss) == pytest.approx(joint.entropy.item(), rel=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES[:3], ids=repr)
@pytest.mark.parametrize("method", METHODS)
def test_a_weighted_loss_is_the_weighted_integral_over_the_mask_ratio(joint, wrong, schedule, method):
    def weight(r):
        t = {LinearSchedule: r, CosineSchedule: 2 / math.pi * math.asin(r), PolynomialSchedule: math.sqrt(r)}
        return published(t[type(schedule)], schedule, method, mpmath.fp)[2]

    def loss(logits, tokens, mask, t):
        return masked_loss(logits, tokens, mask, t, schedule, method, reduction="none", **HP.get(method, {}))

    assert expected_loss(joint, wrong, schedule, loss) == pytest.approx(integral(joint, wrong, weight), rel=1e-8)


@pytest.mark.parametrize("schedule", SCHEDULES[:3], ids=repr)
@pytest.mark.parametrize("method", METHODS)
def test_exact_counts_have_the_objective_of_independent_masks(joint, wrong, schedule, method):
    options = {"reduction": "none", **HP.get(method, {})}
    logits, tokens, mask, probabilities = (lambda case: (wrong(case[0]), *case[1:]))(every_case(joint))
    count = mask.sum(1)
    bounds = schedule.time(1 - torch.arange(LENGTH + 1, dtype=torch.float64) / LENGTH)
    chance = bounds.diff()[count - 1] / torch.tensor([math.comb(LENGTH, n) for n in count])
    t = (bounds[count - 1] + bounds[count]) / 2  # anywhere in the stratum of the count
    exact = masked_loss(logits, tokens, mask, t, schedule, method, counts="exact", **options)

    def loss(logits, tokens, mask, t):
        return masked_loss(logits, tokens, mask, t, schedule, method, **options)

    independent = expected_loss(joint, wrong, schedule, loss)
    assert (probabilities * chance * exact).sum().item() == pytest.approx(independent, rel=1e-7)


def test_the_factor_of_exact_counts_has_its_closed_forms():
    for length in (1, 7, 1024):
        n = torch.arange(1, length + 1, dtype=torch.float64)
        expected = {
            "elbo": length / n,
            "simple": torch.full_like(n, length / (length + 1)),
            "flow": length * _beta_ratio(n + 0.5, length - n + 0.5, n, length),
            "iddpm": 2 * length * _beta_ratio(n + 0.5, length - n + 1.5, n, length),
        }
        for method, factor in expected.items():
            torch.testing.assert_close(count_factor(length, "linear", method), factor, rtol=1e-11, atol=0)


def _beta_ratio(a, b, n, length):
    """Binomial(L, n) B(a, b)."""
    binomial = torch.lgamma(torch.tensor(length + 1.0).double()) - torch.lgamma(n + 1) - torch.lgamma(length - n + 1)
    return torch.exp(binomial + torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b))


# the mean over tokens


def test_the_token_mean_with_independent_masks_is_the_elbo_over_length_plus_one(joint, wrong):
    negative = exact_negative_elbo(joint, wrong).item()

    def loss(logits, tokens, mask, t):
        return token_mean(logits, tokens, mask)

    mean = expected_loss(joint, wrong, LinearSchedule(), loss)
    assert mean == pytest.approx(negative / (LENGTH + 1), rel=1e-10)
    assert elbo_from_token_mean(mean, LENGTH) == pytest.approx(negative, rel=1e-10)


def test_the_token_mean_with_exact_counts_is_the_elbo_over_length(joint, wrong):
    negative = exact_negative_elbo(joint, wrong).item()
    masked, tokens, mask, probabilities = every_case(joint)
    chance = 1 / torch.tensor([LENGTH * math.comb(LENGTH, n) for n in mask.sum(1)], dtype=torch.float64)
    mean = (probabilities * chance * token_mean(wrong(masked), tokens, mask)).sum().item()
    assert mean == pytest.approx(negative / LENGTH, rel=1e-10)
    assert elbo_from_token_mean(mean, LENGTH, counts="exact") == pytest.approx(negative, rel=1e-10)


def test_the_sum_over_ratio_times_length_is_the_elbo_over_length(joint, wrong):
    def loss(logits, tokens, mask, t):
        return masked.token_sum(logits, tokens, mask) / (t * LENGTH)

    mean = expected_loss(joint, wrong, LinearSchedule(), loss)
    assert mean == pytest.approx(exact_negative_elbo(joint, wrong).item() / LENGTH, rel=1e-9)


def test_a_mean_over_all_masked_tokens_of_a_batch_is_sigmoid_over_half_the_length(joint, wrong):
    expected = integral(joint, wrong, lambda r: r) / (LENGTH / 2)
    by_count = sums_by_count(joint, wrong)
    assert by_count.mean().item() / ((LENGTH + 1) / 2) == pytest.approx(expected, rel=1e-9)  # exact counts
    schedule = LinearSchedule()
    sums = expected_loss(joint, wrong, schedule, lambda logits, tokens, mask, t: masked.token_sum(logits, tokens, mask))
    number = expected_loss(joint, wrong, schedule, lambda logits, tokens, mask, t: mask.sum(1))
    assert sums / number == pytest.approx(expected, rel=1e-9)


# the cascade of bounds


def unmasked_by(joint, predict):
    """Probabilities that a model's chain, of single tokens in random order, is at each masked sequence, by count."""
    start = torch.full((LENGTH,), MASK_ID)
    steps = [{tuple(start.tolist()): 1.0}]
    for left in range(LENGTH, 0, -1):
        reached = {}
        for state, chance in steps[-1].items():
            probabilities = predict(torch.tensor([state])).softmax(-1)[0]
            for i in (i for i in range(LENGTH) if state[i] == MASK_ID):
                for token in range(TOKENS):
                    after = (*state[:i], token, *state[i + 1 :])
                    reached[after] = reached.get(after, 0.0) + chance / left * probabilities[i, token].item()
        steps.append(reached)
    return steps


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_chain_finished_by_the_optimal_decoder_is_within_its_part_of_the_elbo(joint, wrong, ratio):
    excess = (sums_by_count(joint, wrong) - sums_by_count(joint, joint.predict)).numpy()
    assert (excess > 0).all()

    def integrand(r):
        chances = [math.comb(LENGTH, n) * r ** (n - 1) * (1 - r) ** (LENGTH - n) for n in range(1, LENGTH + 1)]
        return float(np.dot(chances, excess))

    bound = integrate.quad(integrand, ratio, 1)[0]
    model = torch.zeros(len(joint.sequences), dtype=torch.float64)
    for kept, states in enumerate(unmasked_by(joint, wrong)):
        share = math.comb(LENGTH, kept) * (1 - ratio) ** kept * ratio ** (LENGTH - kept)
        for state, chance in states.items():
            fits = ((torch.tensor(state) == MASK_ID) | (torch.tensor(state) == joint.sequences)).all(1)
            decoded = joint.probabilities * fits
            model += share * chance * decoded / decoded.sum()
    assert model.sum().item() == pytest.approx(1)
    divergence = (joint.probabilities * (joint.probabilities / model).log()).sum().item()
    gap = integrate.quad(integrand, 0, 1)[0]
    assert gap == pytest.approx((exact_negative_elbo(joint, wrong) - joint.entropy).item(), rel=1e-9)
    assert -1e-12 <= divergence <= bound + 1e-12
    assert bound <= gap
    if ratio == 0:
        assert divergence > 0.05


# draws and masks


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("counts", ["independent", "exact"])
def test_masks_have_the_distribution_they_state(schedule, counts):
    number, ratio = 40_000, 0.6
    t = get_masked_schedule(schedule).time(torch.full((number,), 1 - ratio, dtype=torch.float64))
    tokens = torch.zeros(number, LENGTH, dtype=torch.long)
    masked, mask = mask_tokens(tokens, t, schedule, MASK_ID, counts=counts, generator=seeded(1))
    assert torch.equal(masked == MASK_ID, mask)
    everything = torch.cat((torch.zeros(1, LENGTH, dtype=torch.bool), MASKS))
    seen = torch.stack([(mask == each).all(1).sum() for each in everything]).double().numpy()
    count = everything.sum(1).numpy()
    if counts == "exact":  # ceil(0.6 * 4) = 3 of 4
        assert (seen[count != 3] == 0).all()
        expected = np.full(4, number / 4)
        assert stats.chisquare(seen[count == 3], expected).pvalue > 1e-3
    else:
        expected = number * ratio**count * (1 - ratio) ** (LENGTH - count)
        assert stats.chisquare(seen, expected).pvalue > 1e-3


def test_exact_counts_are_uniform_at_uniform_ratio():
    t = draw_times(6000, draws="stratified", generator=seeded(0))
    _, mask = mask_tokens(torch.zeros(6000, 6, dtype=torch.long), t, "linear", 9, counts="exact")
    assert mask.sum(1).bincount().tolist() == [0, *[1000] * 6]


def test_exact_counts_at_the_ends_are_one_and_all():
    t = torch.tensor([0.0, 2.0**-24, 1 - 2.0**-24, 1.0])
    _, mask = mask_tokens(torch.zeros(4, 5, dtype=torch.int32), t, "cosine", 9, counts="exact")
    assert mask.sum(1).tolist() == [1, 1, 5, 5]
    _, mask = mask_tokens(torch.zeros(4, 5, dtype=torch.int32), t[[0, 3]].repeat(2), "cosine", 9)
    assert mask.sum(1).tolist() == [0, 5, 0, 5]


def test_masks_come_from_the_generator_and_tokens_keep_their_dtype():
    tokens, t = torch.arange(40, dtype=torch.int32).reshape(4, 10), torch.full((4,), 0.5)
    first, second, third = (mask_tokens(tokens, t, "linear", 99, generator=seeded(seed))[0] for seed in (1, 1, 2))
    assert first.dtype == torch.int32
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert torch.equal(first[first != 99], tokens[first != 99])


def test_antithetic_times_are_pairs_and_never_an_end():
    for size in (6, 7):
        t = draw_times(size, generator=seeded(3))
        half = (size + 1) // 2
        torch.testing.assert_close(t[:half][: size - half] + t[half:], torch.ones(size - half), rtol=0, atol=1e-7)
    assert t.dtype == torch.float32
    assert t.shape == (7,)
    assert torch.equal(t, draw_times(7, generator=seeded(3)))
    assert not torch.equal(t, draw_times(7))
    torch.manual_seed(0)
    first = draw_times(7)
    torch.manual_seed(0)
    assert torch.equal(first, draw_times(7))


@pytest.mark.parametrize("draws", ["antithetic", "independent", "stratified"])
def test_times_are_uniform_inside_the_open_interval(draws, monkeypatch):
    t = torch.cat([draw_times(64, draws=draws, generator=seeded(i)) for i in range(300)])
    assert stats.kstest(t.numpy(), "uniform").pvalue > 1e-3
    monkeypatch.setitem(masked.draws.DRAWS, draws, lambda count, stream: torch.tensor([0.0, 1.0], dtype=torch.float64))
    ends = draw_times(2, draws=draws)
    assert 0 < ends[0] < ends[1] < 1
    for method in METHODS:
        assert masked_weight(ends, "linear", method).isfinite().all()


def test_antithetic_times_vary_less_than_independent_ones():
    def spread(draws):
        means = [
            masked_weight(draw_times(8, draws=draws, generator=seeded(i)), "linear", "simple").mean()
            for i in range(300)
        ]
        return torch.stack(means).var()

    assert spread("antithetic") < 1e-10 < spread("stratified") < spread("independent") / 10


# the loss


def batch(seed=0):
    stream = seeded(seed)
    logits = torch.randn(5, LENGTH, TOKENS, generator=stream)
    tokens = torch.randint(0, TOKENS, (5, LENGTH), generator=stream)
    mask = torch.rand(5, LENGTH, generator=stream) < 0.5
    mask[0], mask[1] = False, True
    return logits, tokens, mask, torch.tensor([0.0, 1.0, 0.3, 0.5, 0.9])


def test_the_loss_is_the_factor_times_the_sum_over_masked_tokens():
    logits, tokens, mask, t = batch()
    losses = masked_loss(logits, tokens, mask, t, "cosine", "sigmoid", reduction="none", bias=1.0)
    for i in range(1, 5):
        total = sum(-logits[i, j].log_softmax(0)[tokens[i, j]] for j in range(LENGTH) if mask[i, j])
        factor = masked_factor(t[i : i + 1], "cosine", "sigmoid", bias=1.0)[0]
        assert losses[i].item() == pytest.approx((factor * total).item(), rel=1e-5)
    assert losses[0] == 0
    mean = masked_loss(logits, tokens, mask, t, CosineSchedule(), masked.get_masked_weighting("sigmoid", bias=1.0))
    assert mean.item() == pytest.approx(losses.mean().item(), rel=1e-6)


@pytest.mark.parametrize("counts", ["independent", "exact"])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_masked_is_no_loss_and_no_gradient(method, counts):
    logits, tokens, mask, t = batch()
    logits.requires_grad_()
    loss = masked_loss(logits[:1], tokens[:1], mask[:1], t[:1], "linear", method, counts=counts)
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()
    assert (token_mean(logits[:1], tokens[:1], mask[:1]) == 0).all()


def test_what_is_not_masked_does_not_matter():
    logits, tokens, mask, t = batch()
    expected = masked_loss(logits, tokens, mask, t, "linear", "simple", reduction="none")
    junk = tokens.masked_fill(~mask, -7)
    certain = logits.masked_fill(~mask[..., None], -INF)
    certain[..., 0] = certain[..., 0].masked_fill(~mask, 0)
    certain.requires_grad_()
    losses = masked_loss(certain, junk, mask, t, "linear", "simple", reduction="none")
    assert torch.equal(losses, expected)
    losses.sum().backward()
    assert (certain.grad[~mask] == 0).all()
    assert certain.grad.isfinite().all()


def test_half_precision_logits_are_summed_in_single():
    logits, tokens, mask, t = batch()
    loss = masked_loss(logits.bfloat16(), tokens, mask, t, "linear", "simple")
    assert loss.dtype == torch.float32
    assert loss == masked_loss(logits.bfloat16().float(), tokens, mask, t, "linear", "simple")
    assert masked_weight(t.bfloat16(), "linear", "simple").dtype == torch.float32


@pytest.mark.parametrize("counts", ["independent", "exact"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_reads_no_values(method, counts):
    """On the meta device, where reading one is an error."""
    logits, tokens, mask, t = (each.to("meta") for each in batch())
    for schedule in SCHEDULES:
        assert masked_loss(logits, tokens, mask, t, schedule, method, counts=counts).shape == ()
        assert masked_weight(t, schedule, method).device.type == "meta"
    assert mask_tokens(tokens, t, "linear", MASK_ID, counts=counts)[1].device.type == "meta"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"t": torch.full((5,), 1.5)}, ValueError, r"`t` must lie in \[0, 1\], got 1.5"),
        ({"t": torch.full((5,), -1e-3)}, ValueError, r"`t` must lie in \[0, 1\], got -0.001"),
        ({"t": torch.full((5,), math.nan)}, ValueError, r"`t` must lie in \[0, 1\], got nan"),
        ({"t": torch.ones(5, dtype=torch.long)}, TypeError, "`t` must be a floating point tensor.*got torch.int64"),
        ({"t": 0.5}, TypeError, "`t` must be a floating point tensor.*got float"),
        ({"t": torch.rand(4)}, ValueError, r"one time per sequence, shape \(5,\), got \(4,\)"),
        ({"t": torch.rand(5, 1)}, ValueError, r"one time per sequence, shape \(5,\), got \(5, 1\)"),
        ({"tokens": torch.rand(5, LENGTH)}, TypeError, "`tokens` must be a tensor of integers, got torch.float32"),
        ({"tokens": torch.ones(5, LENGTH) > 0}, TypeError, "`tokens` must be a tensor of integers, got torch.bool"),
        ({"tokens": torch.ones(LENGTH).long()}, ValueError, r"`tokens` must have shape \(B, L\).*got \(4,\)"),
        ({"tokens": torch.ones(0, LENGTH).long()}, ValueError, r"`tokens` must have shape \(B, L\).*got \(0, 4\)"),
        ({"logits": torch.ones(5, TOKENS)}, ValueError, r"`logits` must have shape \(5, 4, K\).*got \(5, 3\)"),
        (
            {"logits": torch.ones(5, TOKENS, LENGTH)},
            ValueError,
            r"`logits` must have shape \(5, 4, K\).*got \(5, 3, 4\)",
        ),
        (
            {"mask": torch.ones(5, LENGTH)},
            TypeError,
            "`mask` must be bool, True where a token is masked, got torch.float32",
        ),
        ({"mask": torch.ones(5, 1) > 0}, ValueError, r"`mask` must have the shape of `tokens`, \(5, 4\), got \(5, 1\)"),
        (
            {"schedule": "sine"},
            ValueError,
            r"Unknown masking schedule 'sine'; choose one of \['linear', 'cosine', 'polyn",
        ),
        ({"schedule": 3}, TypeError, r"`schedule` must be a name in \['linear', .*or a MaskedSchedule, got 3"),
        ({"schedule": snrweights.CosineSchedule()}, TypeError, "a MaskedSchedule, got CosineSchedule"),
        ({"method": "min_snr"}, ValueError, r"Unknown weighting 'min_snr'; choose one of \['elbo', 'simple', 'flow'"),
        ({"method": snrweights.get_weighting("elbo")}, TypeError, r"or a MaskedWeighting, got ELBO\(\)"),
        ({"gamma": 5}, ValueError, r"Weighting 'elbo' has no hyperparameter 'gamma'; it takes \[\]"),
        (
            {"method": "sigmoid", "bias": math.nan},
            ValueError,
            r"`Sigmoid\(bias=...\)` must be a finite number, got nan",
        ),
        ({"method": get_masked_weighting("sigmoid"), "bias": 2}, TypeError, r"\['bias'\] go with a method's name only"),
        ({"counts": "all"}, ValueError, r"`counts` must be one of \['independent', 'exact'\], got 'all'"),
        ({"reduction": "sum"}, ValueError, r"Unknown reduction 'sum'; choose one of \['mean', 'none'\]"),
    ],
)
def test_what_has_no_meaning_is_refused_with_the_choices(change, error, message):
    logits, tokens, mask, _ = batch()
    arguments = {"logits": logits, "tokens": tokens, "mask": mask, "t": torch.full((5,), 0.5), "schedule": "linear"}
    masked_loss(**arguments)
    with pytest.raises(error, match=message):
        masked_loss(**{**arguments, **change})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: PolynomialSchedule(0.0),
            ValueError,
            r"`PolynomialSchedule\(power=...\)` must be > 0 and finite, got 0.0",
        ),
        (lambda: PolynomialSchedule(math.nan), ValueError, "> 0 and finite, got nan"),
        (lambda: draw_times(0), ValueError, "`batch_size` must be >= 1, got 0"),
        (lambda: draw_times(1, draws="sobol"), ValueError, r"`draws` must be one of \['independent', .*got 'sobol'"),
        (lambda: mask_tokens(torch.ones(2, 2), torch.rand(2), "linear", 9), TypeError, "`tokens`.*got torch.float32"),
        (lambda: mask_tokens(torch.ones(2, 2).long(), torch.rand(3), "linear", 9), ValueError, r"got \(3,\)"),
        (lambda: mask_tokens(torch.ones(2, 2).long(), torch.full((2,), 2.0), "linear", 9), ValueError, "got 2.0"),
        (
            lambda: mask_tokens(torch.ones(2, 2).long(), torch.rand(2), "linear", 9, counts="some"),
            ValueError,
            r"`counts` must be one of \['independent', 'exact'\], got 'some'",
        ),
        (
            lambda: mask_tokens(torch.ones(2, 2).long(), torch.rand(2), "linear", 1.5),
            TypeError,
            "`mask_id` must be an integer, got 1.5",
        ),
        (lambda: elbo_from_token_mean(1.0, 0), ValueError, "`length` must be >= 1, got 0"),
        (lambda: elbo_from_token_mean(1.0, 4, counts="some"), ValueError, "got 'some'"),
        (lambda: count_factor(0, "linear", "elbo"), ValueError, "`length` must be >= 1, got 0"),
        (lambda: negative_elbo(lambda z: z, torch.ones(2, 2).long(), 9, draws=0), ValueError, "`draws` must be >= 1"),
        (lambda: negative_elbo(lambda z: z, torch.ones(2, 2).long(), 9, batch_size=0), ValueError, "`batch_size`"),
        (
            lambda: negative_elbo(lambda z: z, torch.ones(2, 2).long(), 9),
            ValueError,
            r"`logits` must have shape \(2, 2",
        ),
        (lambda: masked_weight(torch.tensor([0.5, math.nan]), "linear", "elbo"), ValueError, "got nan"),
        (lambda: is_monotone("edm", "x"), ValueError, "Unknown masking schedule 'x'"),
    ],
)
def test_other_arguments_are_refused_too(call, error, message):
    with pytest.raises(error, match=message):
        call()


# measuring the ELBO


def test_the_measured_elbo_is_the_entropy_within_its_error(joint):
    results = [negative_elbo(joint.predict, joint.sample(400, i), MASK_ID, generator=seeded(i)) for i in range(60)]
    scores = torch.tensor([(result.nats - joint.entropy.item()) / result.error for result in results])
    assert abs(scores.mean()) < 3 / math.sqrt(60)
    assert 0.5 < scores.std() < 1.3


def test_draws_and_strata_lower_the_variance_on_fixed_sequences(joint, wrong):
    tokens = joint.sample(64, 1)

    def spread(**options):
        return np.std([negative_elbo(wrong, tokens, MASK_ID, generator=seeded(i), **options).nats for i in range(60)])

    one, four = spread(), spread(draws=4)
    assert one < negative_elbo(wrong, tokens, MASK_ID).error
    assert four < one / 1.5


def test_batches_give_the_same_elbo_and_no_gradient(joint):
    tokens = joint.sample(50, 1)
    sizes = []
    weight = torch.ones((), requires_grad=True)

    def predict(masked):
        sizes.append(len(masked))
        assert not (weight * masked).requires_grad
        return joint.predict(masked)

    result = negative_elbo(predict, tokens, MASK_ID, draws=200, batch_size=20, generator=seeded(1))
    assert sizes[:3] == [20, 20, 10]
    assert len(sizes) == 600
    at_once = negative_elbo(joint.predict, tokens, MASK_ID, draws=200, generator=seeded(2))
    assert result.nats == pytest.approx(at_once.nats, rel=0.02)
    assert result.length == LENGTH
    assert result.bits_per_token == pytest.approx(result.nats / LENGTH / math.log(2))


def test_one_sequence_has_no_standard_error():
    result = negative_elbo(lambda masked: torch.zeros(1, 3, 2), torch.tensor([[0, 1, 0]]), 2)
    assert math.isnan(result.error)
    assert result.nats == pytest.approx(3 * math.log(2))


@pytest.mark.parametrize("name", [name for name in masked.__all__ if callable(getattr(masked, name))])
def test_a_public_callable_of_masked_has_an_example(name):
    assert ">>> " in inspect.getdoc(getattr(masked, name))


@pytest.mark.parametrize("cls", _REGISTRY.values())
def test_a_masked_weighting_states_its_formula_and_source(cls):
    assert cls.formula
    assert "arXiv" in cls.source
    assert "Source:" in cls.__doc__


def test_the_public_names_are_sorted():
    assert masked.__all__ == sorted(masked.__all__)


def test_the_examples_of_the_guide_run():
    guide = (Path(__file__).parents[1] / "examples" / "guides" / "bounds.md").read_text()
    (section,) = re.findall(r"^## Masked diffusion\n(.*?)(?=^## |\Z)", guide, re.DOTALL | re.MULTILINE)
    examples = doctest.DocTestParser().get_doctest(section, {}, "bounds.md", None, None)
    failed, tried = doctest.DocTestRunner().run(examples)
    assert failed == 0
    assert tried > 8
