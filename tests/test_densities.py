"""Densities over log-SNR: normalised, invertible, and those that the field's scripts draw from."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling
from scipy import integrate, stats

from snrweights import CosineSchedule, DiscreteSchedule, EDMSchedule, FlowSchedule, as_schedule
from snrweights.densities import (
    DENSITIES,
    Cauchy,
    Cosine,
    Density,
    FlowUniform,
    Laplace,
    LogUniform,
    Mode,
    Normal,
    log_normal_sigma,
    logit_normal,
    sample,
)
from snrweights.drawn import TableDensity, as_density, default_density, mean_under

CONTINUOUS = [
    Cosine(),
    Cosine(shift=2 * math.log(64 / 256)),
    FlowUniform(),
    FlowUniform(shift=3.0),
    Normal(0.3, 1.5),
    log_normal_sigma(),
    logit_normal(0.5, 1.2, shift=3.0),
    logit_normal(0.5, 1.2, reversed=True),
    LogUniform(),
    Laplace(loc=1.0),
    Cauchy(loc=-1.0, scale=2.0),
    Mode(),
    Mode(scale=0.8, shift=3.0),
]


def p(density, log_snr):
    return density.log_prob(torch.as_tensor(log_snr, dtype=torch.float64)).exp()


def quantile(density, u):
    return density.icdf(torch.tensor(u, dtype=torch.float64)).item()


def mass(density, low, high):
    """Integrate p from low to high, in pieces that end where it bends."""
    ends = sorted({low, high, *(quantile(density, u) for u in (0.01, 0.25, 0.5, 0.75, 0.99))})
    a, b = np.array([pair for pair in pairwise(ends) if low <= pair[0] and pair[1] <= high]).T
    pieces = integrate.tanhsinh(lambda x: p(density, x).numpy(), a, b, atol=1e-13, rtol=1e-13)
    assert pieces.success.all()
    return pieces.integral.sum()


@pytest.mark.parametrize("density", CONTINUOUS, ids=str)
def test_it_works_in_float64(density):
    half = torch.tensor([0.5])
    assert density.icdf(half).dtype == density.log_prob(half).dtype == torch.float64


@pytest.mark.parametrize("density", CONTINUOUS, ids=str)
def test_it_integrates_to_one(density):
    if isinstance(density, LogUniform):
        low, high = -2 * math.log(80.0), -2 * math.log(0.002)
    else:
        low, high = -math.inf, math.inf
    assert mass(density, low, high) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("density", CONTINUOUS, ids=str)
def test_the_quantile_function_inverts_the_integral_of_p(density):
    for low, high in [(0.001, 0.1), (0.1, 0.5), (0.5, 0.6), (0.6, 0.999)]:
        between = mass(density, quantile(density, low), quantile(density, high))
        assert between == pytest.approx(high - low, abs=1e-9)


@pytest.mark.parametrize("density", CONTINUOUS, ids=str)
def test_samples_follow_the_quantiles(density):
    draws = sample(density, (20_000,), torch.Generator().manual_seed(0))
    assert draws.dtype == torch.float64
    assert draws.isfinite().all()
    for u in (0.02, 0.3, 0.5, 0.9):
        below = (draws <= quantile(density, u)).double().mean().item()
        assert below == pytest.approx(u, abs=4 * math.sqrt(u * (1 - u) / 20_000))


def test_closed_forms():
    x = np.linspace(-9, 9, 19)
    np.testing.assert_allclose(p(Cosine(), x), 1 / np.cosh(x / 2) / (2 * np.pi), rtol=1e-13)
    np.testing.assert_allclose(p(FlowUniform(), x), np.cosh(x / 4) ** -2 / 8, rtol=1e-13)
    np.testing.assert_allclose(p(log_normal_sigma(-1.2, 1.2), x), stats.norm(2.4, 2.4).pdf(x), rtol=1e-13)
    np.testing.assert_allclose(p(Laplace(), x), stats.laplace(0, 0.5).pdf(x), rtol=1e-13)
    np.testing.assert_allclose(p(Cauchy(), x), stats.cauchy.pdf(x), rtol=1e-13)
    u = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    laplace = -0.5 * (0.5 - u).sign() * torch.log(1 - 2 * (u - 0.5).abs())  # falling in u, as the paper draws it
    torch.testing.assert_close(Laplace().icdf(1 - u), laplace, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(Cauchy().icdf(1 - u), torch.tan(math.pi * (0.5 - u)), rtol=1e-12, atol=1e-12)


def test_log_uniform_has_no_mass_outside_its_range():
    density = LogUniform(0.1, 10.0)
    edge = 2 * math.log(10)
    assert p(density, [-edge, 0.0, edge]).tolist() == pytest.approx([1 / (2 * edge)] * 3)
    assert density.log_prob(torch.tensor([-edge - 0.01, edge + 0.01, -math.inf, math.inf])).eq(-math.inf).all()


# what scripts draw ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "shift"), [("logit_normal", 1.0), ("logit_normal", 3.0), ("mode", 1.0), ("mode", 3.0)]
)
def test_diffusers_sd3_scripts_draw_the_reversed_density(scheme, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    count = 200_000
    u = compute_density_for_timestep_sampling(scheme, count, 0.7, 1.0, 1.29, generator=torch.Generator().manual_seed(0))
    t = scheduler.timesteps[(u * scheduler.config.num_train_timesteps).long()]  # as the scripts write it
    drawn = as_schedule(scheduler).log_snr(t)
    ours = logit_normal(0.7, 1.0, shift, reversed=True) if scheme == "logit_normal" else Mode(1.29, shift)
    # a step of the table is 1/1000 in t: 0.004 in log-SNR at the median, more towards the ends
    for q in (0.1, 0.3, 0.5, 0.7, 0.9):
        below = (drawn <= quantile(ours, q)).double().mean().item()
        assert below == pytest.approx(q, abs=4 * math.sqrt(q * (1 - q) / count) + 1e-3)
    if scheme == "logit_normal":
        assert drawn.mean().item() == pytest.approx(ours.mean, abs=4 * ours.std / math.sqrt(count) + 0.01)
        assert ours.mean == pytest.approx({1.0: 1.4, 3.0: 1.4 - 2 * math.log(3)}[shift])


def test_logit_normal_in_the_papers_direction():
    z = torch.randn(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.sigmoid(0.7 + z)
    shifted = 3 * t / (1 + 2 * t)
    log_snr, ours = FlowSchedule().log_snr(shifted), logit_normal(0.7, 1.0, shift=3.0)
    torch.testing.assert_close(log_snr, ours.mean - 2 * z, rtol=0, atol=1e-12)
    assert ours == Normal(-1.4 - 2 * math.log(3), 2.0)


def test_cosmap_draws_are_the_cosine_density():
    log_snr = torch.linspace(-12, 12, 25, dtype=torch.float64)
    t = 1 / (1 + torch.exp(log_snr / 2))
    cosmap = 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2)  # over t, SD3 paper
    torch.testing.assert_close(p(Cosine(), log_snr), cosmap * t * (1 - t) / 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("k", [0.5, 3.0])
def test_the_resolution_shift_is_a_shift_of_log_snr(k):
    u = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    t = 1 - u  # log-SNR rises with u
    shifted = k * t / (1 + (k - 1) * t)
    expected = FlowSchedule().log_snr(t) - 2 * math.log(k)
    torch.testing.assert_close(FlowSchedule().log_snr(shifted), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(FlowUniform(shift=k).icdf(u), expected, rtol=1e-12, atol=1e-12)


def test_mode_is_the_sd3_map_of_a_uniform_draw():
    u = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    t = 1 - u - 1.29 * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    torch.testing.assert_close(Mode().icdf(u), FlowSchedule().log_snr(t), rtol=1e-12, atol=1e-12)


# densities of schedules -----------------------------------------------------------------------------------------------


def test_a_discrete_density_is_one_over_the_spacing():
    schedule = DiscreteSchedule.from_name("linear")
    density, log_snr = default_density(schedule), schedule.log_snr_table
    central = 1 / (1000 * -np.gradient(log_snr.numpy()))
    np.testing.assert_allclose(p(density, log_snr), central, rtol=1e-12)
    middle = (log_snr[500] + log_snr[501]) / 2
    assert p(density, middle).item() == pytest.approx(math.sqrt(central[500] * central[501]), rel=1e-12)
    assert p(density, [log_snr[0] + 1, log_snr[-1] - 1]).tolist() == [0, 0]
    # the mass between the outermost timesteps: all of it, but for half a step at each end
    total = integrate.trapezoid(p(density, log_snr).numpy(), -log_snr.numpy())
    assert total == pytest.approx(1 - 1 / 1000, abs=2e-4)


def test_a_discrete_density_draws_every_timestep_equally():
    table = DiscreteSchedule.from_name("linear", 10).log_snr_table
    draws = TableDensity(table).icdf((torch.arange(40, dtype=torch.float64) + 0.5) / 40)
    assert torch.equal(draws, table.flip(0).repeat_interleave(4))


def test_zero_terminal_snr_is_an_atom_apart_from_the_density():
    table = DiscreteSchedule.from_name("linear", rescale_betas_zero_snr=True).log_snr_table
    density = TableDensity(table)
    assert density.log_prob(table[-1:]).item() == -math.inf
    without = p(TableDensity(table[:-1]), table[:-1]) * 999 / 1000
    torch.testing.assert_close(p(density, table[:-1]), without, rtol=1e-14, atol=0)
    assert density.icdf(torch.tensor(0.0005)).item() == -math.inf
    assert density.icdf(torch.tensor(0.0015)).item() == table[-2].item()


def test_timesteps_held_at_a_bound_do_not_spoil_the_density():
    # Wuerstchen clamps alphas_cumprod, so that a few timesteps share one log-SNR
    table = torch.tensor([3.0, 3.0, 3.0, 2.0, 1.0, 0.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    density = TableDensity(table)
    assert not density.log_prob(table).isnan().any()
    assert density.log_prob(torch.tensor([2.5, 2.0, 1.0, 0.5, 0.0, -0.5])).isfinite().all()


@pytest.mark.parametrize(
    ("schedule", "density"),
    [
        (CosineSchedule(resolution=256), Cosine(2 * math.log(1 / 4))),
        (FlowSchedule(shift=3.0), FlowUniform(3.0)),
        (EDMSchedule(), log_normal_sigma()),
    ],
)
def test_the_default_density_of_a_continuous_schedule(schedule, density):
    assert as_density(None, schedule) == density


@pytest.mark.parametrize("density", CONTINUOUS, ids=str)
def test_mean_under_is_the_integral(density):
    assert mean_under(density, torch.ones_like) == pytest.approx(1, abs=1e-14)
    for f in (lambda x: 1 / (1 + x**2), np.arctan):
        expected = integrate.quad(lambda u: f(quantile(density, u)), 0, 1, epsabs=1e-10, limit=500)[0]  # noqa: B023
        assert mean_under(density, lambda x: torch.from_numpy(f(x.numpy()))) == pytest.approx(expected, abs=1e-8)  # noqa: B023


@pytest.mark.parametrize("power", [-0.25, 0.25])
def test_mean_under_bears_integrable_poles(power):
    expected = 1 / math.cos(math.pi * power)  # SNR = cot²(pi u / 2), and E[cot^a] = sec(pi a / 2) for |a| < 1
    assert mean_under(Cosine(), lambda log_snr: (power * log_snr).exp()) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("power", [-0.5, 0.5, 1.0])
def test_mean_under_is_infinite_where_the_integral_is(power):
    assert mean_under(Cosine(), lambda log_snr: (power * log_snr).exp()) == math.inf


def test_mean_under_a_table_is_that_of_its_timesteps():
    table = DiscreteSchedule.from_name("linear").log_snr_table
    assert mean_under(TableDensity(table), torch.exp) == pytest.approx(float(table.exp().mean()), rel=1e-14)


def test_a_density_has_a_name():
    for name, build in DENSITIES.items():
        assert as_density(name, FlowSchedule()) == build()
        assert isinstance(build(), Density)


@pytest.mark.parametrize(
    ("build", "kind", "message"),
    [
        (lambda: as_density("gauss", FlowSchedule()), ValueError, "Unknown density 'gauss'; choose one of ['cosine'"),
        (lambda: as_density(3, FlowSchedule()), TypeError, "`density` must be a Density, a name in ['cosine'"),
        (lambda: Normal(0, 0), ValueError, "`std` must be > 0, got 0."),
        (lambda: Laplace(scale=-1.0), ValueError, "`scale` must be > 0, got -1.0."),
        (lambda: Cauchy(scale=0), ValueError, "`scale` must be > 0, got 0."),
        (lambda: LogUniform(0.0, 1.0), ValueError, "`sigma_min` must be > 0, got 0.0."),
        (lambda: LogUniform(2.0, 1.0), ValueError, "`sigma_max - sigma_min` must be > 0, got -1.0."),
        (lambda: logit_normal(shift=0), ValueError, "`shift` must be > 0, got 0."),
        (lambda: FlowUniform(shift=0), ValueError, "`shift` must be > 0, got 0."),
        (lambda: Mode(scale=2.0), ValueError, "`Mode(scale=...)` must be in [-1, 1.752] (monotone), got 2.0."),
        (lambda: Mode(shift=0), ValueError, "`shift` must be > 0, got 0."),
    ],
)
def test_a_bad_argument_is_named(build, kind, message):
    with pytest.raises(kind) as raised:
        build()
    assert message in str(raised.value)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
    ("scheme", "name"), [("none", "flow_uniform"), ("logit_normal", "logit_normal"), ("mode", "mode")]
)
def test_a_name_is_what_diffusers_draws_on_a_shifted_flow(scheme, name, shift):
    """As its scripts do: a draw of time is an index into the scheduler's table, which is shifted."""
    scheduler, draws = FlowMatchEulerDiscreteScheduler(shift=shift), 4000
    generator = torch.Generator().manual_seed(0)
    u = compute_density_for_timestep_sampling(scheme, draws, 0.0, 1.0, 1.29, generator=generator)
    schedule = as_schedule(scheduler)
    drawn = schedule.log_snr(scheduler.timesteps[(u * 1000).long().clamp(max=999)]).numpy()
    density = as_density(name, schedule)
    quantiles = density.icdf(torch.linspace(0, 1, 100_001, dtype=torch.float64)).numpy()
    _, p = stats.kstest(drawn, lambda x: np.searchsorted(quantiles, x) / 100_000)
    assert p > 0.01
    if shift != 1:
        unshifted = DENSITIES[name]().icdf(torch.linspace(0, 1, 100_001, dtype=torch.float64)).numpy()
        assert stats.kstest(drawn, lambda x: np.searchsorted(unshifted, x) / 100_000).pvalue < 1e-12


def test_cosmap_is_shifted_like_the_others():
    u = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    moved = as_density("cosmap", FlowSchedule(shift=3.0)).icdf(u)
    torch.testing.assert_close(moved, Cosine().icdf(u) - 2 * math.log(3))
    assert as_density("cosine", FlowSchedule(shift=3.0)) == Cosine()  # no time of a flow
