"""What the loss of masked diffusion is in expectation: integrals over a joint that is solved exactly."""

import math

import mpmath
import numpy as np
import pytest
import torch
from joints import LENGTH, MASK_ID, TOKENS, Joint, every_case, exact_negative_elbo, sums_by_count, wrong_model
from masked_formulas import HP, METHODS, SCHEDULES, published
from scipy import integrate

from snrweights import masked
from snrweights.masked import (
    CosineSchedule,
    LinearSchedule,
    PolynomialSchedule,
    count_factor,
    elbo_from_token_mean,
    masked_loss,
    token_mean,
)

ANGLES, ANGLE_WEIGHTS = (torch.tensor(each) * math.pi / 4 for each in np.polynomial.legendre.leggauss(100))
# t = sin² of an angle in (0, pi / 2): the ends, where a factor may be infinite, are approached smoothly
T = torch.sin(ANGLES + math.pi / 4) ** 2
DT = torch.sin(2 * ANGLES + math.pi / 2) * ANGLE_WEIGHTS


@pytest.fixture(scope="module")
def joint():
    return Joint()


@pytest.fixture(scope="module")
def wrong():
    return wrong_model()


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
