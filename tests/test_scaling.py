"""Power laws of the loss above the optimum."""

import math

import pytest
import torch

from snrweights.optimal.scaling import fit_power_law, raw_and_subtracted

SIZES = torch.logspace(4, 8, 5, dtype=torch.float64)


def noisy(seed, sizes=SIZES, exponent=0.2, noise=0.1):
    error = torch.randn(sizes.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return 0.3 + 2.0 * sizes**-exponent * torch.exp(noise * error)


def test_an_exact_law_is_found_to_the_last_digits():
    law = fit_power_law(SIZES, 0.3 + 2.0 * SIZES**-0.2, 0.3)
    assert law.coefficient == pytest.approx(2.0, rel=1e-12)
    assert law.exponent == pytest.approx(0.2, rel=1e-12)
    assert law.r_squared == pytest.approx(1.0, abs=1e-12)
    assert law.exponent_interval == pytest.approx((0.2, 0.2), rel=1e-9)
    torch.testing.assert_close(law(SIZES), 0.3 + 2.0 * SIZES**-0.2, rtol=1e-12, atol=0)


def test_it_is_the_least_squares_line_in_logarithms():
    losses = noisy(1)
    law = fit_power_law(SIZES, losses, 0.3)
    design = torch.stack([torch.ones(5, dtype=torch.float64), SIZES.log()], 1)
    y = (losses - 0.3).log()
    intercept, slope = torch.linalg.lstsq(design, y[:, None]).solution[:, 0].tolist()
    assert (math.log(law.coefficient), -law.exponent) == pytest.approx((intercept, slope), rel=1e-9)
    correlation = torch.corrcoef(torch.stack([SIZES.log(), y]))[0, 1]
    assert law.r_squared == pytest.approx(correlation.item() ** 2, rel=1e-9)


@pytest.mark.parametrize("repeats", [1, 3])
def test_the_intervals_hold_what_they_say(repeats):
    sizes = SIZES.repeat(repeats)
    inside = [0, 0]
    for seed in range(400):
        law = fit_power_law(sizes, noisy(seed, sizes), 0.3, resamples=400, seed=seed)
        inside[0] += law.exponent_interval[0] < 0.2 < law.exponent_interval[1]
        inside[1] += law.coefficient_interval[0] < 2.0 < law.coefficient_interval[1]
    for count in inside:
        assert abs(count / 400 - 0.95) < 0.044  # 4 binomial standard deviations


def test_the_known_offset_makes_a_straight_line_of_it():
    laws = raw_and_subtracted(SIZES, noisy(3, noise=0.02), 0.3)
    assert laws["subtracted"].r_squared > 0.99 > 0.98 > laws["raw"].r_squared
    assert laws["raw"].offset == 0
    assert laws["raw"].exponent < laws["subtracted"].exponent
    wrong = fit_power_law(SIZES, noisy(3, noise=0.02), 0.2)
    assert wrong.r_squared < laws["subtracted"].r_squared


def test_units_of_size_and_loss_change_the_coefficient_alone():
    losses = noisy(4)
    law, other = fit_power_law(SIZES, losses, 0.3), fit_power_law(SIZES / 1e6, 5 * losses, 5 * 0.3)
    assert other.exponent == pytest.approx(law.exponent, rel=1e-9)
    assert other.exponent_interval == pytest.approx(law.exponent_interval, rel=1e-6)
    assert other.coefficient == pytest.approx(5 * law.coefficient * 1e6**-law.exponent, rel=1e-9)


def test_the_seed_gives_the_interval():
    first, again, other = (fit_power_law(SIZES, noisy(5), 0.3, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.exponent_interval != other.exponent_interval
    assert first.exponent == other.exponent


def test_it_reads_as_a_sentence():
    text = str(fit_power_law(SIZES, 0.3 + 2.0 * SIZES**-0.2, 0.3))
    assert text == "0.3 + 2 size^-0.2000 (0.2000 to 0.2000), R² 1.0000"


@pytest.mark.parametrize(
    ("sizes", "losses", "message"),
    [
        ([1.0, 2.0], [1.0, 2.0], r"n >= 3, got \(2,\) and \(2,\)"),
        ([1.0, 2.0, 3.0], [1.0, 2.0], r"got \(3,\) and \(2,\)"),
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], "at least two different ones"),
        ([1.0, -2.0, 3.0], [1.0, 2.0, 3.0], "`sizes` must be positive"),
        ([1.0, 2.0, 3.0], [1.0, 0.5, 0.3], "above the optimum 0.3, got .*: a model below it"),
        ([1.0, 2.0, 3.0], [1.0, 0.5, math.nan], "must be finite"),
    ],
)
def test_what_cannot_be_fitted_is_named(sizes, losses, message):
    with pytest.raises(ValueError, match=message):
        fit_power_law(sizes, losses, 0.3)
