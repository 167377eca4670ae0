"""Densities as samplers: draws follow the density whatever is drawn together, and weights keep the objective."""

import math

import numpy as np
import pytest
import torch
from cases import SCHEDULES, NoHostSync, expected_gradient, small_gradient
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling
from scipy import stats

from snrweights import CosineSchedule, EDMSchedule, FlowSchedule, TimestepSampler
from snrweights.densities import Cauchy, Cosine, FlowUniform, Laplace, Logistic, LogUniform, Mode, Normal, logit_normal
from snrweights.drawn import default_density
from snrweights.quantiles import quantiles, within
from snrweights.uniforms import DRAWS

LINEAR = SCHEDULES["linear"]
FLOW, EDM, COSINE = FlowSchedule(), EDMSchedule(), CosineSchedule()
DENSITIES = [Cosine(), Cosine(-2.8), FlowUniform(3.0), Normal(0.5, 2.0), Laplace(), Logistic(1.0), Mode(), LogUniform()]


def drawn(sampler, batches=100, batch_size=1000, device="cpu"):
    """Many batches of timesteps and weights."""
    parts = [sampler.draw(batch_size, device=device) for _ in range(batches)]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


# draws follow the density ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize("density", [*DENSITIES, Cauchy(0.0, 0.5)], ids=str)
def test_the_log_snr_of_small_batches_has_the_density(density, draws):
    sampler = TimestepSampler(COSINE, density, draws=draws, seed=2)
    t, weight = drawn(sampler, 400, 5)
    exact = quantiles(COSINE, density)
    u = exact.mass_up_to(COSINE.log_snr(t))
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    assert (weight == 1).all()


def test_quantiles_of_many_draws():
    t, _ = drawn(TimestepSampler(FLOW, "logit_normal", draws="stratified"), 20, 5000)
    levels = np.array([0.01, 0.05, 0.3, 0.5, 0.8, 0.99])
    np.testing.assert_allclose(np.quantile(FLOW.log_snr(t), levels), stats.norm(0, 2).ppf(levels), atol=5e-3)


@pytest.mark.parametrize("density", [None, "cosine", Normal(0, 2)], ids=str)
def test_stratified_draws_hit_a_discrete_timestep_as_often_as_they_should(density):
    sampler = TimestepSampler(LINEAR, density)
    t, _ = sampler.draw(100_000)
    laid = quantiles(LINEAR, default_density(LINEAR) if density is None else sampler.density)
    assert t.dtype == torch.int64
    # an interval of quantiles is cut at both ends by strata of 1 / n
    assert (t.bincount(minlength=1000) - 100_000 * laid.probability).abs().max() < 2


def test_cosmap_is_the_cosine_density_by_its_sd3_name():
    assert TimestepSampler(FLOW, "cosmap").density == Cosine()


@pytest.mark.parametrize("scheme", ["logit_normal", "mode"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_draws_are_those_of_diffusers_sd3_scripts(scheme, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    generator = torch.Generator().manual_seed(0)
    u = compute_density_for_timestep_sampling(scheme, 100_000, 0.7, 1.2, 1.29, generator=generator)
    theirs = scheduler.timesteps[(u * 1000).long()]
    density = logit_normal(0.7, 1.2, shift, reversed=True) if scheme == "logit_normal" else Mode(1.29, shift)
    ours, _ = TimestepSampler(scheduler, density).draw(100_000)
    # theirs are on a table of 1000, each standing for what is less noisy by up to a step; 4 standard errors of theirs
    edges = scheduler.timesteps[[100, 300, 500, 700, 900]]
    for edge in edges:
        share = float((ours <= edge).double().mean())
        assert float((theirs <= edge).double().mean()) == pytest.approx(
            share, abs=4 * math.sqrt(share * (1 - share) / 100_000) + 1.5e-3
        )


def test_logit_normal_in_the_direction_of_the_paper():
    z = torch.randn(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = torch.sigmoid(0.7 + 1.2 * z)  # t = 1 at noise
    ours, _ = TimestepSampler(FLOW, logit_normal(0.7, 1.2)).draw(100_000)
    assert stats.kstest(theirs.numpy(), np.sort(ours.double().numpy())).pvalue > 1e-3
    reversed_time, _ = TimestepSampler(FlowSchedule(reversed=True), logit_normal(0.7, 1.2)).draw(100_000)
    torch.testing.assert_close(reversed_time, 1 - ours, rtol=0, atol=1e-6)


def test_the_default_is_uniform_over_timesteps():
    assert TimestepSampler(FlowSchedule(shift=3.0)).density == FlowUniform(3.0)
    t, _ = TimestepSampler(FLOW).draw(10)
    assert (t * 10).floor().sort().values.tolist() == list(range(10))
    t, _ = TimestepSampler("linear").draw(1000)
    assert t.sort().values.tolist() == list(range(1000))


# the base density -----------------------------------------------------------------------------------------------------

# whose weights have a finite variance
PAIRS = [
    (LINEAR, None, "cosine"),
    (LINEAR, Normal(0, 4), None),
    (LINEAR, "logistic", Laplace()),
    (SCHEDULES["squaredcos_cap_v2"], Cauchy(), None),
    (FLOW, FlowUniform(3.0), FlowUniform()),
    (FLOW, Cosine(), "logit_normal"),
    (FLOW, Cauchy(), Laplace()),
    (FlowSchedule(num_train_timesteps=1000, reversed=True), Mode(), Normal(1.0, 1.5)),
    (COSINE, FlowUniform(), Cosine()),
    (COSINE, Cauchy(), Cosine()),
    (EDM, Normal(0, 4.0), None),
    (EDM, LogUniform(), LogUniform(0.01, 10.0)),
    (EDM, LogUniform(), within(Normal(2.4, 2.4), -8.0, 12.0)),
    (EDMSchedule(timestep="c_noise"), Normal(1.0, 3.0), Normal(2.4, 2.4)),
]


@pytest.mark.parametrize("draws", ["independent", "stratified"])
@pytest.mark.parametrize(("schedule", "density", "base"), PAIRS)
def test_weights_keep_the_expected_gradient_of_the_base(schedule, density, base, draws):
    if base is None:
        base = TimestepSampler(schedule).density
    sampler = TimestepSampler(schedule, density, base=base, draws=draws, seed=4)
    t, weight = drawn(sampler, 10, 10_000)
    assert weight.dtype == torch.float32
    terms = torch.cat((small_gradient(schedule, t)[0], torch.ones(len(t), 1)), 1) * weight[:, None]
    expected = torch.cat((expected_gradient(schedule, TimestepSampler(schedule, base).density), torch.ones(1)))
    error = terms.std(0) / math.sqrt(len(t))  # of independent draws; of stratified ones it is less
    assert (error < 0.02).all()
    assert ((terms.mean(0) - expected).abs() <= 4.5 * error + 1e-6).all()


def test_weights_on_a_table_are_ratios_of_probabilities():
    sampler = TimestepSampler(LINEAR, "cosine", base=Normal(0, 2))
    t = torch.arange(1000)
    p, q = (quantiles(LINEAR, density).probability for density in (Normal(0, 2), Cosine()))
    np.testing.assert_allclose(sampler.weight(t), p / q, rtol=1e-6)
    assert float((q * sampler.weight(t)).sum()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("schedule", [FLOW, COSINE, FlowSchedule(reversed=True), EDM, EDMSchedule(timestep="c_noise")])
@pytest.mark.parametrize("base", [LogUniform(1e-4, 1e4), LogUniform(0.1, 3.0), Laplace()], ids=str)
@pytest.mark.parametrize("density", [LogUniform(1e-4, 1e4), Cosine(), Cauchy(0, 0.5), Normal(0, 9)], ids=str)
def test_no_weight_is_infinite_or_large_at_the_ends(schedule, base, density):
    if isinstance(density, Cauchy) and isinstance(schedule, EDMSchedule):
        density = within(density, -80.0, 80.0)
    if isinstance(density, LogUniform) and isinstance(base, Laplace):
        base = within(base, -18.0, 18.0)
    sampler = TimestepSampler(schedule, density, base=base)
    u = torch.cat((torch.linspace(0, 1e-6, 301, dtype=torch.float64), torch.logspace(-6, -2, 300, dtype=torch.float64)))
    _, weight = sampler.at(torch.cat((u, 1 - u)))
    assert weight.isfinite().all()
    assert weight.max() < 1e3


def test_a_base_without_mass_somewhere_weighs_0_there():
    sampler = TimestepSampler(EDM, "log_uniform", base=LogUniform(0.1, 10.0))
    weight = sampler.weight(torch.tensor([0.05, 0.2, 5.0, 20.0]))
    assert weight[[0, 3]].tolist() == [0, 0]
    np.testing.assert_allclose(weight[1:3], math.log(40_000) / math.log(100), rtol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "density", "base"),
    [
        (EDM, LogUniform(0.1, 10.0), LogUniform()),
        (EDM, LogUniform(), Normal(2.4, 2.4)),  # all but 2e-5 of its mass
        (EDM, within(Normal(2.4, 2.4), -1.0, 1.0), Normal(2.4, 2.4)),
        (FLOW, LogUniform(1e-4, 1e4), FlowUniform()),
        (COSINE, within(Cosine(), -12.0, 12.0), Cosine()),
        (LINEAR, LogUniform(0.1, 10.0), default_density(LINEAR)),
        (SCHEDULES["zero_snr"], "cosine", default_density(SCHEDULES["zero_snr"])),  # the atom
    ],
)
def test_a_density_without_mass_where_the_base_has_some_is_refused(schedule, density, base):
    with pytest.raises(ValueError, match=r"has no mass at \d+ of \d+ timesteps that `base` draws \(from t = .*biased"):
        TimestepSampler(schedule, density, base=base)


# the rest -------------------------------------------------------------------------------------------------------------


def test_draws_are_a_function_of_seed_and_index():
    first, second = (TimestepSampler("linear", seed=3) for _ in range(2))
    batches = [first.draw(8).t for _ in range(4)]
    assert torch.equal(second.draw(8, index=2).t, batches[2])
    assert second.drawn == 3
    assert torch.equal(second.draw(8).t, batches[3])
    assert not torch.equal(batches[0], batches[1])
    assert not torch.equal(TimestepSampler("linear", seed=4).draw(8).t, batches[0])


@pytest.mark.parametrize("draws", DRAWS)
def test_processes_and_micro_batches_share_the_draws_of_one_process(draws):
    one = TimestepSampler(FLOW, "mode", draws=draws).draw(24).t
    samplers = [TimestepSampler(FLOW, "mode", draws=draws, rank=r, world_size=2, accumulation=3) for r in range(2)]
    assert torch.equal(torch.cat([sampler.draw(4).t for _ in range(3) for sampler in samplers]), one)


def test_a_state_continues_the_draws():
    sampler = TimestepSampler("linear", seed=3)
    sampler.draw(4)
    state = sampler.state_dict()
    resumed = TimestepSampler("linear", seed=3)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.draw(4).t, sampler.draw(4).t)
    assert state["drawn"] == 1


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "Not the state of a TimestepSampler: it has [], not ['drawn']."),
        (
            {"drawn": torch.tensor(1), "tilt": torch.ones(2)},
            "Not the state of a TimestepSampler: it has ['drawn', 'tilt'",
        ),
        ({"drawn": torch.tensor(-1)}, "`drawn` must be a whole number, got -1."),
        ({"drawn": torch.tensor(math.nan)}, "`drawn` must be a whole number, got nan."),
        ({"drawn": torch.tensor([1, 2])}, "`drawn` must be a whole number, got tensor([1, 2])."),
    ],
)
def test_a_damaged_state_is_refused(state, message):
    sampler = TimestepSampler("linear")
    with pytest.raises(ValueError, match="state") as raised:
        sampler.load_state_dict(state)
    assert message in str(raised.value)
    assert sampler.drawn == 0


@pytest.mark.parametrize("schedule", [LINEAR, FLOW, EDM, COSINE])
def test_a_draw_does_not_wait_for_the_device(schedule):
    sampler = TimestepSampler(schedule, "logistic", base=Normal(0.0, 1.0))
    with NoHostSync():
        sampler.draw(8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"draws": "sobol"}, "`draws` must be one of ['independent', 'antithetic', 'stratified'], got 'sobol'."),
        ({"density": "gauss"}, "Unknown density 'gauss'; choose one of ['cosine', 'cosmap'"),
        ({"base": "gauss"}, "Unknown density 'gauss'; choose one of ['cosine', 'cosmap'"),
        ({"rank": 1}, "`rank` must be in [0, 1), got 1."),
        ({"world_size": 0}, "`world_size` must be >= 1, got 0."),
        ({"accumulation": 0}, "`accumulation` must be >= 1, got 0."),
        ({"seed": -1}, "`seed` must be >= 0, got -1."),
    ],
)
def test_a_bad_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=r"must be|Unknown") as raised:
        TimestepSampler("linear", **arguments)
    assert str(raised.value).startswith(message)


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="`batch_size` must be >= 1, got 0"):
        TimestepSampler("linear").draw(0)


def test_it_says_what_it_draws():
    assert repr(TimestepSampler(FLOW, "mode")) == "TimestepSampler(Mode(scale=1.29, shift=1.0), draws='stratified')"
