"""Densities laid over timesteps: masses against closed forms, inverses, rounding at the ends, cut-off densities."""

import math

import numpy as np
import pytest
import torch
from cases import SCHEDULES
from scipy import integrate, stats

from snrweights import CosineSchedule, DiscreteSchedule, EDMSchedule, FlowSchedule
from snrweights.densities import Cauchy, Cosine, FlowUniform, Laplace, Logistic, LogUniform, Mode, Normal
from snrweights.drawn import default_density
from snrweights.quantiles import mass_up_to, quantiles, within

LINEAR, ZERO_SNR = SCHEDULES["linear"], SCHEDULES["zero_snr"]
CLOSED = [
    (Normal(0.3, 1.5), stats.norm(0.3, 1.5)),
    (Laplace(1.0, 0.7), stats.laplace(1.0, 0.7)),
    (Logistic(-1.0, 1.3), stats.logistic(-1.0, 1.3)),
    (Cauchy(0.5, 2.0), stats.cauchy(0.5, 2.0)),
]
CONTINUOUS = {
    "cosine": CosineSchedule(),
    "shifted cosine": CosineSchedule(resolution=256),
    "flow": FlowSchedule(num_train_timesteps=1000),
    "reversed flow": FlowSchedule(reversed=True),
    "sigma": EDMSchedule(),
    "c_noise": EDMSchedule(timestep="c_noise"),
}


def evenly(count):
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


# discrete -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("density", "exact"), CLOSED, ids=lambda x: type(x).__name__)
def test_a_timestep_has_the_mass_that_is_nearest_to_it(density, exact):
    rising = LINEAR.log_snr_table.flip(0).numpy()
    upper = exact.cdf((rising[1:] + rising[:-1]) / 2)
    expected = np.diff(np.concatenate(([0], upper, [1])))[::-1]
    laid = quantiles(LINEAR, density)
    np.testing.assert_allclose(laid.probability, expected, rtol=0, atol=1e-15)
    assert laid.probability.sum() == pytest.approx(1, abs=1e-14)
    np.testing.assert_allclose(laid.log_mass(torch.arange(1000)).exp(), laid.probability, rtol=1e-12)


@pytest.mark.parametrize("schedule", [LINEAR, ZERO_SNR, SCHEDULES["squaredcos_cap_v2"]])
def test_uniform_timesteps_have_equal_masses_the_atom_at_zero_snr_too(schedule):
    probability = quantiles(schedule, default_density(schedule)).probability
    np.testing.assert_allclose(probability, 1 / 1000, rtol=1e-12)


def test_the_timesteps_of_another_table_are_not_uniform_ones():
    other = DiscreteSchedule.from_name("squaredcos_cap_v2")
    laid = quantiles(LINEAR, default_density(other))
    # the share of the other's timesteps that are cleaner than the middle of the table
    middle = (LINEAR.log_snr_table[500] + LINEAR.log_snr_table[499]) / 2
    share = (other.log_snr_table > middle).double().mean()
    assert share > 0.6
    assert float(laid.probability[:500].sum()) == pytest.approx(float(share), abs=1e-12)


def test_no_continuous_mass_is_nearest_to_zero_snr():
    probability = quantiles(ZERO_SNR, Normal(0, 3)).probability
    assert probability[-1] == 0
    assert probability[-2] == pytest.approx(stats.norm(0, 3).cdf(ZERO_SNR.log_snr_table[-3:-1].mean()), rel=1e-9)
    assert quantiles(ZERO_SNR, Normal(0, 3)).timesteps(torch.tensor([0.0, 1.0])).tolist() == [998, 0]


def test_timesteps_of_one_log_snr_share_its_mass():
    held = torch.tensor([0.9, 0.9, 0.9, 0.5, 0.2, 0.2], dtype=torch.float64)
    probability = quantiles(DiscreteSchedule(held), Logistic()).probability
    logit = held[[0, 3, 4]].logit()
    upper = torch.sigmoid((logit[1:] + logit[:-1]) / 2)
    expected = [(1 - upper[0]) / 3] * 3 + [upper[0] - upper[1]] + [upper[1] / 2] * 2
    np.testing.assert_allclose(probability, expected, rtol=1e-12)


def test_a_table_that_rises_by_a_rounding_has_no_negative_mass():
    table = torch.tensor([0.9, 0.5, 1e-3, 1e-12, 2.0**-24], dtype=torch.float64)  # as diffusers ends some
    probability = quantiles(DiscreteSchedule(table), Normal(-20.0, 5.0)).probability
    assert (probability > 0).all()
    assert probability.sum() == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("density", [Normal(0, 2), Laplace(), default_density(LINEAR)], ids=lambda d: type(d).__name__)
def test_even_quantiles_hit_a_timestep_as_often_as_its_probability_says(density):
    laid = quantiles(LINEAR, density)
    counts = laid.timesteps(evenly(100_000)).bincount(minlength=1000)
    assert (counts - 100_000 * laid.probability).abs().max() <= 1


@pytest.mark.parametrize("u", [0.0, 1.0])
def test_a_draw_at_the_very_end_has_mass(u):
    infinite = DiscreteSchedule(torch.tensor([1.0, 0.9, 0.5, 0.0], dtype=torch.float64))
    laid = quantiles(infinite, Normal(0, 1))
    t = laid.timesteps(torch.tensor([u]))
    assert laid.log_mass(t).isfinite().all()
    assert laid.support().tolist() == [1, 2]


@pytest.mark.parametrize("schedule", [LINEAR, ZERO_SNR])
@pytest.mark.parametrize("density", [None, Laplace(), Normal(0, 3)])
@pytest.mark.parametrize("bins", [1, 7, 32, 1000])
def test_the_edges_of_bins_cut_the_timesteps_into_nearly_equal_masses(schedule, density, bins):
    laid = quantiles(schedule, default_density(schedule) if density is None else density)
    edges = laid.edges(bins)
    assert (edges.diff() > 0).all()
    masses = torch.cat((laid.mass_up_to(edges), torch.ones(1))).diff(prepend=torch.zeros(1))
    assert len(masses) <= bins
    assert (masses > 0).all()
    # an edge is off by half a timestep at most, and a bin has two
    assert masses.max() <= max(1 / bins, laid.probability.max()) + laid.probability.max() + 1e-12
    if density is None:
        assert len(masses) == bins


# continuous -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", CONTINUOUS.values(), ids=CONTINUOUS)
def test_timestep_of_inverts_log_snr(schedule):
    log_snr = torch.linspace(-30, 30, 241, dtype=torch.float64)
    t = schedule.timestep_of(log_snr)
    assert t.dtype == torch.float64
    # a rounding of t moves log-SNR by its slope: 2 / (t (1 - t)) of a unit near either end
    slope = (schedule.log_snr(t * (1 + 1e-7)) - schedule.log_snr(t * (1 - 1e-7))).abs() / 2e-7
    slope = torch.where(slope.isfinite(), slope, 0.0)
    off = (schedule.log_snr(t) - log_snr).abs()
    assert (off <= 4 * 2.0**-52 * (slope + log_snr.abs() + 8)).all()
    inside = torch.linspace(-8, 8, 65, dtype=torch.float64)
    torch.testing.assert_close(schedule.log_snr(schedule.timestep_of(inside)), inside, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("schedule", CONTINUOUS.values(), ids=CONTINUOUS)
def test_timestep_of_keeps_infinities(schedule):
    ends = torch.tensor([-math.inf, math.inf], dtype=torch.float64)
    assert torch.equal(schedule.log_snr(schedule.timestep_of(ends)), ends)


@pytest.mark.parametrize("schedule", CONTINUOUS.values(), ids=CONTINUOUS)
@pytest.mark.parametrize(("density", "exact"), CLOSED[:3], ids=lambda x: type(x).__name__)
def test_quantiles_are_those_of_the_density(schedule, density, exact):
    laid = quantiles(schedule, density)
    u = evenly(64)
    t = laid.timesteps(u)
    assert t.dtype == torch.float32
    np.testing.assert_allclose(schedule.log_snr(t), exact.ppf(u), atol=2e-4)
    np.testing.assert_allclose(laid.log_mass(t), exact.logpdf(schedule.log_snr(t)), rtol=1e-12)
    np.testing.assert_allclose(laid.mass_up_to(torch.linspace(-9, 9, 7)), exact.cdf(np.linspace(-9, 9, 7)), atol=1e-15)
    np.testing.assert_allclose(laid.edges(8), exact.ppf(np.arange(1, 8) / 8), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("density", [Cosine(-1.0), FlowUniform(3.0), Mode(), LogUniform(), within(Cauchy(), -9, 12)])
def test_the_density_is_the_slope_of_its_mass(density):
    laid = quantiles(EDMSchedule(timestep="c_noise"), density)
    log_snr = torch.linspace(-8, 11, 39, dtype=torch.float64)
    step = 1e-4
    slope = (laid.mass_up_to(log_snr + step) - laid.mass_up_to(log_snr - step)) / (2 * step)
    torch.testing.assert_close(laid.log_mass(-log_snr / 8).exp(), slope, rtol=1e-6, atol=1e-11)


@pytest.mark.parametrize("density", [LogUniform(1e-4, 1e4), LogUniform(0.5, 1.0000001), within(Normal(0, 3), -7, 20)])
@pytest.mark.parametrize("schedule", CONTINUOUS.values(), ids=CONTINUOUS)
def test_a_draw_that_rounding_puts_beyond_the_range_still_has_mass(schedule, density):
    laid = quantiles(schedule, density)
    u = torch.linspace(0, 1e-6, 501, dtype=torch.float64)
    t = laid.timesteps(torch.cat((u, 1 - u)))
    assert laid.log_mass(t).isfinite().all()
    beyond = schedule.timestep_of(torch.tensor([-21.0, 21.0], dtype=torch.float64)).float()
    assert laid.log_mass(beyond).tolist() == [-math.inf] * 2


@pytest.mark.parametrize(
    "schedule",
    [
        *(CosineSchedule(t_min=low, t_max=1 - low) for low in (1e-5, 1e-3, 0.1 + 1e-9)),
        *(
            FlowSchedule(k, n, r, s_min=low)
            for k in (1, 3)
            for n in (1, 1000)
            for r in (0, 1)
            for low in (0, 1e-5, 0.1)
        ),
    ],
    ids=str,
)
def test_the_draws_of_a_schedules_own_density_are_legal(schedule):
    laid = quantiles(schedule, default_density(schedule))
    u = torch.cat((torch.linspace(0, 1e-6, 301, dtype=torch.float64), evenly(100)))
    t = laid.timesteps(torch.cat((u, 1 - u)))
    schedule.check(t)
    assert laid.log_mass(t).isfinite().all()


# cut off --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("density", "exact"), CLOSED, ids=lambda x: type(x).__name__)
def test_within_is_the_density_given_the_range(density, exact):
    cut, low, high = within(density, -2.5, 1.5), exact.cdf(-2.5), exact.cdf(1.5)
    x = np.linspace(-2.4, 1.4, 9)
    np.testing.assert_allclose(cut.log_prob(torch.tensor(x)).exp(), exact.pdf(x) / (high - low), rtol=1e-9)
    np.testing.assert_allclose(mass_up_to(cut, torch.tensor(x)), (exact.cdf(x) - low) / (high - low), atol=1e-14)
    total = integrate.quad(lambda v: float(cut.log_prob(torch.tensor(v)).exp()), -2.5, 1.5, points=[0.5, 1.0])[0]
    assert total == pytest.approx(1, abs=1e-8)
    assert cut.icdf(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([-2.5, 1.5], abs=1e-12)
    assert mass_up_to(cut, torch.tensor([-3.0, 2.0])).tolist() == [0, 1]


def test_a_density_beyond_the_schedule_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"Cauchy\(loc=0.0, scale=1.0\) reaches beyond the schedule: `t` must lie in"):
        quantiles(EDMSchedule(), Cauchy())
    with pytest.raises(ValueError, match=r"within\(density, low, high\)"):
        quantiles(CosineSchedule(t_max=0.9), Cosine())
    t = quantiles(EDMSchedule(), within(Cauchy(), -9.0, 12.0)).timesteps(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(t, torch.tensor([9.0, -12.0]).div(2).exp(), rtol=1e-5, atol=0)


def test_an_empty_range_is_refused():
    for low, high in [(2.0, 1.0), (1.0, 1.0), (math.nan, 1.0)]:
        with pytest.raises(ValueError, match="has no mass between `low`"):
            within(Cosine(), low, high)
    with pytest.raises(ValueError, match=r"LogUniform\(.*\) has no mass between `low` 20 and `high` 30."):
        within(LogUniform(), 20, 30)


def test_a_schedule_that_cannot_be_inverted_is_refused():
    class Other:
        prediction_type = sigma_data = None
        coords = "vp"

    with pytest.raises(TypeError, match="`schedule` Other has no `timestep_of"):
        quantiles(Other(), Cosine())
