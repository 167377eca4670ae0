"""Reweighted losses as bounds: closed forms, enumeration in one dimension, and what is refused."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import SCHEDULES, gaussian_curve
from hypothesis import given, settings
from hypothesis import strategies as st

from snrweights import get_weighting, list_weightings, objective
from snrweights.bounds import NO_RANKING, Cascade, cascade
from snrweights.bounds_plots import plot_bounds
from snrweights.bounds_report import table, to_json
from snrweights.densities import LogUniform
from snrweights.diagnose import diagnose
from snrweights.elbo_terms import decoder_nats, prior_kl_of_points
from snrweights.optimal import OptimalLossCurve, optimal_loss
from snrweights.optimal.information import information
from snrweights.optimal.reference import ReferenceSet
from snrweights.schedules import EDMSchedule

FINE = torch.linspace(-8, 8, 1601, dtype=torch.float64)
VARIANCE, BELIEVED, DIM = 0.5, 1.5, 4
GAUSSIAN = gaussian_curve(VARIANCE, DIM)


def kl(variance, other):
    """KL(N(0, variance) || N(0, other))."""
    return (variance / other - 1 - math.log(variance / other)) / 2


def gaussian_losses(log_snr):
    """Loss of epsilon per dimension of a denoiser that believes in another variance than the data's."""
    snr = log_snr.exp()
    gain, ideal = (v * snr / (1 + v * snr) for v in (BELIEVED, VARIANCE))
    return snr * (VARIANCE / (1 + VARIANCE * snr) + (gain - ideal) ** 2 * (VARIANCE + 1 / snr))


def path_kl_of_gaussians(low, high):
    """½ ∫ D: both chains undo the same noising, so the paths' KL is that of their clean ends, less the noisy ones'."""
    at_high, at_low = (kl(VARIANCE + math.exp(-at), BELIEVED + math.exp(-at)) for at in (high, low))
    return DIM * (at_high - at_low)


@pytest.mark.parametrize("schedule", ["linear", "edm", "flow"])
def test_a_gaussian_denoiser_has_the_bounds_of_closed_form(schedule):
    found = cascade(gaussian_losses(FINE), GAUSSIAN, SCHEDULES[schedule], log_snr=FINE)
    noise = math.exp(8)  # sigma² / alpha² at log-SNR -8
    prior = DIM * kl(VARIANCE + noise, noise + (schedule == "linear"))  # N(0, I) of vp is wider by the data's unit
    assert found.prior == pytest.approx(prior, rel=1e-3, abs=1e-9)
    nats, stderr = found.nats()
    for i in (0, 400, 800, 1200, 1600):
        expected = found.prior + path_kl_of_gaussians(-8, float(FINE[i]))
        assert float(nats[i]) == pytest.approx(expected, rel=3.5e-5)  # of trapezoids: spacing² / 3
    assert found.gap()[0] == float(nats[-1])
    assert (stderr < 1e-5 * nats).all()  # of interpolating the curve
    assert found.elbo() is None  # nobody said that it is of 8 bits


def test_an_ideal_denoiser_leaves_the_prior():
    found = cascade(GAUSSIAN.mean_loss(FINE, "epsilon"), GAUSSIAN, "flow", log_snr=FINE)
    assert found.gap()[0] == pytest.approx(found.prior, rel=1e-9)
    assert found.improved_bound("sigmoid").nats == pytest.approx(found.prior, rel=1e-9)


def test_information_is_that_of_a_gaussian_and_ln_n_of_n_points():
    for log_snr in (-8.0, 0.0, 8.0):
        expected = DIM * math.log1p(VARIANCE * math.exp(log_snr)) / 2
        assert information(GAUSSIAN, log_snr)[0] == pytest.approx(expected, rel=1e-6)
    corners = torch.cartesian_prod(*[torch.tensor([-0.5, 0.5], dtype=torch.float64)] * 3)
    curve = optimal_loss(corners, torch.logspace(-1.2, 1, 61), draws=4096)
    nats, stderr = information(curve, 4.5)
    assert abs(nats - math.log(8)) < 3 * stderr < 0.05


# one dimension: three points, a poor denoiser, everything by quadrature over z = x + s eps on a grid

POINTS = torch.tensor([-1.0, 0.25, 1.0], dtype=torch.float64)
Z = torch.arange(-18, 18, 0.05, dtype=torch.float64)
STEP = 0.05
LOW, HIGH = -2.0, 2.4


def posterior(s):
    """q(x | z), (Z, X)."""
    return (-((Z[:, None] - POINTS) ** 2) / (2 * s * s)).softmax(1)


def normal(x, mean, std):
    return torch.exp(-(((x - mean) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi))


def marginal(s):
    return normal(Z[:, None], POINTS, s).mean(1)


def poor(z, s):
    return 0.2 + 0.6 * torch.tanh(z / (0.2 + s))


def losses_on_line(log_snr):
    """E (x - x_hat)² / s², exact but for the grid; and that of the posterior mean."""
    found = []
    for s in (-log_snr / 2).exp().tolist():
        density, share = marginal(s), posterior(s)
        errors = (share * (POINTS - poor(Z, s)[:, None]) ** 2).sum(1), share @ POINTS**2 - (share @ POINTS) ** 2
        found.append([float((density * error).sum() * STEP) / s**2 for error in errors])
    return torch.tensor(found, dtype=torch.float64).T


def curve_on_line():
    levels = torch.linspace(-6, 6, 121, dtype=torch.float64)
    value = torch.zeros(121, dtype=torch.float64)
    for i, s in enumerate((-levels / 2).exp().tolist()):
        reach = torch.linspace(-1 - 10 * s, 1 + 10 * s, 4001, dtype=torch.float64)
        share = (-((reach[:, None] - POINTS) ** 2) / (2 * s * s)).softmax(1)
        variance = share @ POINTS**2 - (share @ POINTS) ** 2
        value[i] = torch.trapezoid(normal(reach[:, None], POINTS, s).mean(1) * variance, reach)
    mean, square = float(POINTS.mean()), float(POINTS.square().mean())
    made = {"dim": 1, "variance": square - mean**2, "second_moment": square, "points": 3, "groups": 1}
    sigmas = (-levels / 2).exp().flip(0)
    return OptimalLossCurve(sigmas, value.flip(0), 0 * value, ("pairs",) * 121, value, made)


LINE = curve_on_line()
ON_LINE = torch.linspace(LOW, HIGH, 257, dtype=torch.float64)
EXACT = cascade(losses_on_line(ON_LINE)[0], LINE, "flow", log_snr=ON_LINE)


class Chain:
    """T steps from noise to data on the grid: of the data, q(z' | z), and of the model, N about its estimate of x."""

    def __init__(self, steps):
        self.log_snr = torch.linspace(LOW, HIGH, steps + 1, dtype=torch.float64)
        self.sigmas = (-self.log_snr / 2).exp().tolist()

    def kernels(self, s, after):
        """(Z, Z') of the data and of the model, densities over the grid."""
        keep, std = (after / s) ** 2, after * math.sqrt(1 - (after / s) ** 2)

        def towards(x):
            return normal(Z, (x + keep * (Z - x))[:, None], std)

        data = sum(share[:, None] * towards(x) for share, x in zip(posterior(s).T, POINTS, strict=True))
        model = towards(poor(Z, s))
        return data / data.sum(1, keepdim=True), model / model.sum(1, keepdim=True)

    def run(self):
        """KL of the paths up to each level, and the model's distribution over the three points, decoded there."""
        first = self.sigmas[0]
        truth, model = marginal(first) * STEP, normal(Z, 0.0, first) * STEP
        truth, model = truth / truth.sum(), model / model.sum()
        path = [float(torch.special.xlogy(truth, truth / model).sum())]
        points = [model @ posterior(first)]
        for s, after in zip(self.sigmas[:-1], self.sigmas[1:], strict=True):
            data, own = self.kernels(s, after)
            log_ratio = (data.clamp_min(1e-300) / own.clamp_min(1e-300)).log()
            path.append(path[-1] + float(truth @ (data * log_ratio).sum(1)))
            truth, model = truth @ data, model @ own
            points.append(model @ posterior(after))
        return torch.tensor(path, dtype=torch.float64), torch.stack(points)


def kl_of_data(points):
    """KL of the three equal points from distributions (..., 3)."""
    return -(3 * points).log().mean(-1)


def test_the_kl_of_paths_is_that_of_all_paths_enumerated():
    global Z, STEP
    kept = Z, STEP
    try:
        Z, STEP = torch.arange(-7, 7, 0.35, dtype=torch.float64), 0.35
        chain = Chain(3)
        path, _ = chain.run()
        truth, model = marginal(chain.sigmas[0]) * STEP, normal(Z, 0.0, chain.sigmas[0]) * STEP
        truth, model = truth / truth.sum(), model / model.sum()
        for s, after in zip(chain.sigmas[:-1], chain.sigmas[1:], strict=True):
            data, own = chain.kernels(s, after)
            truth, model = truth[..., None] * data, model[..., None] * own  # the last state is the row of the next
        assert truth.shape == (40,) * 4
        assert float(truth.sum()) == pytest.approx(1)
        enumerated = torch.special.xlogy(truth, truth.clamp_min(1e-300) / model.clamp_min(1e-300)).sum()
        assert float(enumerated) == pytest.approx(float(path[-1]), rel=1e-9)
    finally:
        Z, STEP = kept


CHAINS = {steps: Chain(steps).run() for steps in (16, 32, 64)}


def test_the_bounds_are_the_kl_of_paths_of_many_steps():
    nats = EXACT.nats()[0]
    off = {steps: path - nats[:: 256 // steps] for steps, (path, _) in CHAINS.items()}
    assert float(off[16][0]) == pytest.approx(0, abs=1e-6)  # KL_prior, of the marginals
    assert off[64].abs().max() < 0.03 * nats[-1]
    for few, many in ((16, 32), (32, 64)):  # the error of a chain halves with the length of its steps
        assert float(off[few][-1] / off[many][-1]) == pytest.approx(2, rel=0.1)
    extrapolated = 2 * CHAINS[64][0][-1] - CHAINS[32][0][-1]
    assert float(extrapolated) == pytest.approx(float(nats[-1]), rel=2e-3)


def test_they_bound_the_kl_of_the_data_with_an_optimal_decoder():
    path, points = CHAINS[64]
    true = kl_of_data(points)
    assert (points.sum(1) - 1).abs().max() < 1e-9
    assert (true <= path + 1e-12).all()
    assert (true <= EXACT.nats()[0][::4] + 1e-12).all()
    assert true[-1] > 0.1 * path[-1]  # and not by being far away


@pytest.mark.parametrize("name", ["sigmoid", "edm_monotonic", "flow", "elbo", "indi"])
def test_an_improved_bound_bounds_the_mixture_of_the_chains(name):
    bound = EXACT.improved_bound(name)
    chain, (path, points) = Chain(64), CHAINS[64]
    log_w = get_weighting(name).log_weight(chain.log_snr)
    weight = (log_w - log_w[0]).exp()
    mass = torch.cat([-weight.diff(), weight[-1:]])  # of finishing at each level
    assert float(mass.sum()) == pytest.approx(1)
    true, of_paths = kl_of_data(mass @ points), mass @ path
    assert 0 < float(true) <= float(of_paths)
    assert float(true) <= bound.nats <= EXACT.gap()[0] + 1e-12
    assert float(of_paths) == pytest.approx(bound.nats, rel=0.06)  # of 64 steps


# weights and mixtures

MONOTONE = [name for name in list_weightings() if EXACT.improved_bound(name).monotone]
RISING = [name for name in list_weightings() if name not in MONOTONE]


def test_both_kinds_are_among_the_weightings():
    assert {"elbo", "sigmoid", "flow", "indi", "edm_monotonic", "auto", "native"} <= set(MONOTONE)
    assert {"iddpm", "laplace"} <= set(RISING)
    for name in MONOTONE + RISING:  # on the whole schedule ``objective`` sees all that a part of it has
        hp = {"curve": LINE, "data_variance": 0.5}
        takes = get_weighting(name, **({"curve": LINE} if name == "optimal_loss" else {})).hyperparameters()
        whole = objective("flow", name, **{k: v for k, v in hp.items() if k in takes})
        assert EXACT.improved_bound(name).negative_mass <= 1
        assert not whole.monotone or name in MONOTONE


def gaps(seed, levels=9, draws=5):
    """Losses of epsilon above the curve on uneven levels, of any shape."""
    stream = torch.Generator().manual_seed(seed)
    log_snr = -2 + 4.4 * torch.rand(levels, generator=stream, dtype=torch.float64).cumsum(0) / levels
    above = torch.rand(levels, draws, generator=stream, dtype=torch.float64) ** 3
    return log_snr, LINE.mean_loss(log_snr, "epsilon")[:, None] + above


@pytest.mark.parametrize("name", MONOTONE)
def test_a_weighted_loss_is_its_mixture_to_quadrature_error(name):
    log_snr, losses = gaps(3)
    found = cascade(losses, LINE, "flow", log_snr=log_snr)
    bound = found.improved_bound(name)
    fine = torch.linspace(*found.range, 200_001, dtype=torch.float64)
    gap = torch.from_numpy(np.interp(fine, log_snr, found.gaps.mean(1)))
    k = found.prior + torch.cat([fine[:1] * 0, torch.cumulative_trapezoid(gap, fine) / 2])
    takes = get_weighting(name, **({"curve": LINE} if name == "optimal_loss" else {})).hyperparameters()
    hp = {key: value for key, value in found.known.items() if key in takes}
    curve = get_weighting(name, **hp).over_log_snr("flow")
    log_w = curve.density.log_prob(fine) + curve.log_weight(fine, "epsilon")
    w = (log_w - log_w[0]).exp()
    mixture = float(-w.diff() @ ((k[1:] + k[:-1]) / 2) + w[-1] * k[-1])
    assert mixture == pytest.approx(bound.nats, rel=2e-5)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from(MONOTONE))
def test_no_bound_exceeds_the_gap_of_the_elbo_and_none_falls_below_the_prior(seed, name):
    log_snr, losses = gaps(seed)
    found = cascade(losses, LINE, "flow", log_snr=log_snr)
    nats = found.nats()[0]
    assert (nats.diff() >= 0).all()
    assert found.prior - 1e-12 <= found.improved_bound(name).nats <= float(nats[-1]) * (1 + 1e-4)
    assert found.improved_bound("elbo").nats == pytest.approx(float(nats[-1]), rel=1e-12)


@pytest.mark.parametrize("name", RISING)
def test_an_objective_that_rises_has_a_negative_mass_and_no_bound(name):
    bound = EXACT.improved_bound(name)
    assert (bound.nats, bound.stderr, bound.spacing_error, bound.growth) == (None,) * 4
    assert 0 < bound.negative_mass <= 1


def test_the_negative_mass_is_what_the_objective_rises_by():
    assert EXACT.improved_bound("iddpm").negative_mass == pytest.approx(1 - 1 / math.cosh(LOW / 2), rel=1e-3)
    whole = cascade(gaussian_losses(FINE), GAUSSIAN, "linear", log_snr=FINE, prediction_type="epsilon")
    known = objective("linear", "min_snr", prediction_type="epsilon")
    w = known.w_kg[(known.log_snr >= -8) & (known.log_snr <= 8)]
    expected = float(w.diff().clamp_min(0).sum() / w.max())
    assert whole.improved_bound("min_snr").negative_mass == pytest.approx(expected, rel=0.01)


def test_a_rise_by_rounding_keeps_a_bound_on_the_weight_at_the_noisy_end():
    def rising(by):
        return EXACT.improved_bound(
            lambda log_snr: 1 + by * (log_snr > 0).double(), density=LogUniform(math.exp(-3), math.exp(3))
        )

    rise, even = rising(5e-5), rising(0.0)
    k_at_0 = float(np.interp(0.0, ON_LINE, EXACT.nats()[0]))
    assert rise.nats - even.nats == pytest.approx(5e-5 * (EXACT.gap()[0] - k_at_0), rel=1e-2)
    assert rise.negative_mass == pytest.approx(5e-5, rel=1e-3)
    assert rising(2e-4).nats is None


def test_the_objective_is_the_density_times_the_weight():
    assert EXACT.improved_bound("native").nats == pytest.approx(EXACT.improved_bound("flow").nats, rel=1e-6)
    drawn = EXACT.improved_bound("native", density="cosine")
    assert drawn.nats != pytest.approx(EXACT.improved_bound("native").nats, rel=1e-3)
    assert EXACT.improved_bound("flow", density="cosine").nats == pytest.approx(EXACT.improved_bound("flow").nats)
    of_function = EXACT.improved_bound(lambda log_snr: torch.ones_like(log_snr) * 7)
    assert of_function.nats == pytest.approx(EXACT.improved_bound("ddpm").nats)
    assert (of_function.name, EXACT.improved_bound(get_weighting("sigmoid")).name) == ("callable", "sigmoid")


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_every_weighting_has_a_bound_or_a_negative_mass_on_every_schedule(schedule):
    levels = FINE[300:1300:50]
    found = cascade(gaussian_losses(levels), GAUSSIAN, SCHEDULES[schedule], log_snr=levels, prediction_type="epsilon")
    bounds = {name: found.improved_bound(name) for name in list_weightings()}
    for bound in bounds.values():
        assert bound.monotone == (bound.negative_mass <= 1e-4)
        assert not bound.monotone or found.prior < bound.nats <= found.gap()[0] * (1 + 1e-4)
    json.loads(to_json(found, bounds))


def test_a_weight_that_grows_without_bound_has_another_bound_on_every_range():
    found = {}
    for low in (-4.0, -6.0, -8.0):
        levels = FINE[round(100 * (low + 8)) :]
        on_range = cascade(gaussian_losses(levels), GAUSSIAN, "flow", log_snr=levels)
        assert on_range.range[0] == pytest.approx(low)
        found[low] = {name: on_range.improved_bound(name) for name in ("flow", "sigmoid", "elbo")}
    flow, sigmoid = ([found[low][name].nats for low in (-4.0, -6.0, -8.0)] for name in ("flow", "sigmoid"))
    assert flow[0] > 2 * flow[1] > 4 * flow[2]
    assert sigmoid == pytest.approx([sigmoid[0]] * 3, rel=0.1)
    assert found[-8.0]["flow"].growth == math.inf
    assert found[-8.0]["sigmoid"].growth == pytest.approx(1 + math.exp(-8))
    assert found[-8.0]["elbo"].growth == 1
    levels, schedule = FINE[400:], EDMSchedule(sigma_max=math.exp(4))
    edm = cascade(gaussian_losses(levels), GAUSSIAN, schedule, log_snr=levels, prediction_type="edm")
    assert edm.improved_bound("flow").growth == pytest.approx(math.exp(2), rel=1e-6)


def test_the_guides_table_of_ranges_is_what_it_says():
    guide = (Path(__file__).parent.parent / "examples/guides/bounds.md").read_text()
    rows = re.findall(r"^\| (-\d) to 8 \| (.*) \|$", guide, re.MULTILINE)
    assert [low for low, _ in rows] == ["-4", "-6", "-8"]
    for low, numbers in rows:
        levels = FINE[round(100 * (int(low) + 8)) :]
        found = cascade(gaussian_losses(levels), GAUSSIAN, "flow", log_snr=levels)
        values = [found.prior, *(found.improved_bound(name).nats for name in ("elbo", "sigmoid", "flow", "indi"))]
        for said, value in zip(numbers.split(" | "), values, strict=True):
            digits = len(said.split("e")[0].replace(".", "").lstrip("0"))
            assert float(said) == float(f"{value:.{digits}g}")


def test_the_last_timestep_of_a_table_with_no_signal_is_no_part_of_the_range():
    found = cascade(gaussian_losses(FINE), GAUSSIAN, SCHEDULES["zero_snr"], log_snr=FINE, prediction_type="epsilon")
    ends = SCHEDULES["zero_snr"].log_snr_table
    assert ends[-1] == -math.inf
    assert found.improved_bound("flow").growth == pytest.approx(math.exp((-8 - float(ends[-2])) / 2), rel=1e-6)


# error bars


def test_errors_are_of_draws_that_all_levels_share():
    log_snr = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    other = torch.tensor([0.1, -0.1, 0.1, -0.1], dtype=torch.float64)
    base = LINE.mean_loss(log_snr, "epsilon")[:, None] + 1
    found = cascade(base + torch.stack([other, -other, other]), LINE, "flow", log_snr=log_snr)
    assert found.nats()[1][-1] < 1e-6  # what one level has too much the next has too little
    alike = cascade(base + torch.stack([other] * 3), LINE, "flow", log_snr=log_snr)
    assert float(alike.nats()[1][-1]) == pytest.approx(0.1 * 2 / 3**0.5 / 2, rel=1e-4)


def poor_images(x, log_snr, index):
    del index
    s = (-log_snr / 2).exp()[:, None]
    return poor(x, s)


def test_a_model_on_its_data_has_the_exact_bounds_within_errors_that_hold():
    levels = torch.linspace(LOW, HIGH, 9, dtype=torch.float64)
    exact = cascade(losses_on_line(levels)[0], LINE, "flow", log_snr=levels)
    off = []
    for seed in range(60):
        options = {"data": POINTS[:, None], "log_snr": levels, "seed": seed, "draws": 128}
        found = cascade(poor_images, LINE, "flow", **options)
        for one, true in ((found.gap(), exact.gap()), _pair(found, exact, "sigmoid"), _pair(found, exact, "flow")):
            off.append((one[0] - true[0]) / one[1])
    inside = (torch.tensor(off).abs() < 1.96).double().mean()
    assert 0.85 < inside < 1  # 180 intervals, three of each seed


def _pair(found, exact, name):
    one, true = found.improved_bound(name), exact.improved_bound(name)
    return (one.nats, one.stderr), (true.nats, 0)


def test_the_errors_of_the_curve_count_where_the_losses_are_compared_with_it():
    doubtful = OptimalLossCurve(LINE.sigmas, LINE.value, 0.01 * LINE.value, LINE.how, LINE.confused, LINE.made)
    found = cascade(losses_on_line(ON_LINE)[0], doubtful, "flow", log_snr=ON_LINE)
    optimum = LINE.mean_loss(ON_LINE, "epsilon")
    expected = 0.01 * (float(torch.trapezoid(optimum, ON_LINE)) / 2 + information(LINE, LOW)[0])
    assert found.gap()[1] == pytest.approx(expected, rel=0.02)
    assert found.improved_bound("elbo").stderr == pytest.approx(expected, rel=0.02)
    assert found.gap()[0] == pytest.approx(EXACT.gap()[0], rel=1e-6)


def test_the_spacing_error_is_about_how_far_the_levels_put_a_bound_off():
    coarse = ON_LINE[::32]
    found = cascade(losses_on_line(coarse)[0], LINE, "flow", log_snr=coarse)
    for name in ("elbo", "sigmoid", "flow"):
        bound, exact = found.improved_bound(name), EXACT.improved_bound(name)
        assert 0.3 < bound.spacing_error / abs(bound.nats - exact.nats) < 3


# the ends of the ELBO

PIXELS = torch.randint(0, 256, (40, 1, 3, 3), generator=torch.Generator().manual_seed(0)).byte()


def test_the_elbo_is_the_sum_of_its_terms_and_its_gap_is_the_last_bound():
    """The terms as one computes them without the optimal loss: decoder, KL of points to the prior, and the loss."""
    levels = torch.linspace(-8, 8, 129, dtype=torch.float64)
    curve = optimal_loss(PIXELS, (-levels / 2).exp(), draws=4096)
    gap = diagnose(lambda x, log_snr, index: 0.3 * x * log_snr.sigmoid()[:, None, None, None], PIXELS, levels, curve)
    found = cascade(gap, curve, "linear", data=PIXELS, prediction_type="epsilon")
    whole = torch.trapezoid(gap.loss * levels.exp(), levels) * 9 / 2
    moment = float((PIXELS / 127.5 - 1).double().square().sum() / 40)
    by_terms = decoder_nats(PIXELS, 8.0) + prior_kl_of_points(moment, 9, -8.0, "vp") + float(whole)
    elbo, stderr = found.elbo()
    assert abs(-elbo - by_terms) < 4 * stderr + 1e-3 * by_terms
    assert found.bits_per_dim() == pytest.approx((-elbo / (9 * math.log(2)), stderr / (9 * math.log(2))))
    assert found.information == pytest.approx(math.log(40), abs=3 * found.information_stderr + 1e-3)
    assert -elbo - found.information - found.decoder == pytest.approx(found.gap()[0])
    gap_stderr = found.gap()[1]
    uncertain = dataclasses.replace(found, information_stderr=2 * gap_stderr)
    assert uncertain.elbo() == pytest.approx((elbo, math.sqrt(5) * gap_stderr))
    assert cascade(gap, curve, "linear", data=PIXELS.double()).elbo() is None


def test_the_decoder_is_the_mean_over_draws_of_its_noise():
    for log_snr in (6.0, 9.0, 11.0):
        s = math.exp(-log_snr / 2)
        x = (PIXELS.flatten() / 127.5 - 1).double().repeat(300)
        z = x + s * torch.randn(len(x), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        values = torch.arange(256).double() / 127.5 - 1
        log_p = torch.cat([(-((part[:, None] - values) ** 2) / (2 * s * s)).log_softmax(1) for part in z.split(10_000)])
        nats = -log_p[torch.arange(len(x)), PIXELS.flatten().long().repeat(300)]
        expected, stderr = 9 * float(nats.mean()), 9 * float(nats.std()) / len(nats) ** 0.5
        assert abs(decoder_nats(PIXELS, log_snr) - expected) < 4 * stderr


def test_a_decoder_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"`pixels` must have at least one point, got shape \(0, 3\)"):
        decoder_nats(torch.zeros(0, 3, dtype=torch.uint8), 3.0)


@pytest.mark.parametrize("coords", ["vp", "ve", "flow"])
def test_the_kl_of_points_to_the_prior_is_that_of_gaussians(coords):
    moment, snr = 3.0, math.exp(-2.0)
    noise = 1 / snr
    prior = noise + (coords == "vp")
    expected = (moment / prior + 5 * (noise / prior - 1 - math.log(noise / prior))) / 2
    assert prior_kl_of_points(moment, 5, -2.0, coords) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"flips": True}, {"labels": torch.arange(40) % 3}])
def test_the_second_moment_is_of_the_points_as_they_are(options):
    expected = float((PIXELS.double() / 127.5 - 1).square().sum() / 40)
    arguments = {"labels": None, "flips": False, **options}
    assert ReferenceSet(PIXELS, device="cpu", chunk=7, **arguments).second_moment == pytest.approx(expected, rel=1e-6)


# what is refused, and said


def test_bounds_refuse_to_be_ranked():
    bounds = [EXACT.improved_bound(name) for name in ("sigmoid", "elbo")]
    with pytest.raises(TypeError, match=r"Bounds of weightings have no order\. Each number bounds the KL of a mixture"):
        sorted(bounds)
    with pytest.raises(TypeError, match="Weightings are not ranked by it"):
        min(bounds)
    assert bounds[0] != bounds[1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"log_snr": None}, ValueError, "`log_snr` must be at least two rising noise levels, got None"),
        ({"log_snr": [1.0, 0.0]}, ValueError, "`log_snr` must be at least two rising noise levels"),
        ({"losses": torch.ones(3)}, ValueError, r"`losses` must be \(L,\) or .* with L = 2, got \(3,\)"),
        ({"losses": torch.tensor([1.0, math.nan])}, ValueError, "`losses` must be finite, got nan"),
        ({"losses": [1.0, 1.0]}, TypeError, "`losses` must be a ModelGap, a denoiser or a tensor, got list"),
        ({"log_snr": [0.0, 9.0]}, ValueError, "`log_snr` must lie within -6.00 to 6.00, .*, got 0 to 9"),
        ({"curve": "a.safetensors"}, TypeError, "`curve` must be an OptimalLossCurve, .*, got 'a.safetensors'"),
        ({"prediction_type": "epsilo"}, ValueError, "Unknown prediction_type 'epsilo'; choose one of"),
        ({"data": torch.zeros(0, 1)}, ValueError, r"`data` must have at least one point, got shape \(0, 1\)"),
        ({"losses": poor_images}, ValueError, "`data` must be given with a denoiser, got None"),
        ({"draws": 64}, TypeError, r"\['draws'\] are for a denoiser, which `losses` is not"),
    ],
)
def test_what_has_no_bounds_is_named(options, error, message):
    arguments = {"losses": torch.ones(2), "curve": LINE, "schedule": "flow", "log_snr": [0.0, 1.0], **options}
    with pytest.raises(error, match=message):
        cascade(arguments.pop("losses"), arguments.pop("curve"), arguments.pop("schedule"), **arguments)


def test_curves_that_do_not_fit_are_named():
    older = {name: value for name, value in LINE.made.items() if name != "second_moment"}
    bare = OptimalLossCurve(LINE.sigmas, LINE.value, LINE.stderr, LINE.how, LINE.confused, older)
    with pytest.raises(ValueError, match="`data` must be given with a curve that does not say their second moment"):
        cascade(torch.ones(2), bare, "flow", log_snr=[0.0, 1.0])
    told = cascade(torch.ones(2), bare, "flow", log_snr=[0.0, 1.0], data=POINTS[:, None])
    assert told.prior == pytest.approx(cascade(torch.ones(2), LINE, "flow", log_snr=[0.0, 1.0]).prior)
    gap = diagnose(poor_images, POINTS[:, None], torch.tensor([-1.0, 1.0]), LINE)
    with pytest.raises(ValueError, match="is not the one that `losses` were compared with"):
        cascade(gap, gaussian_curve(0.5, 1), "flow")
    with pytest.raises(ValueError, match="`data` must have 1 numbers in a point, as `curve` has, got 7"):
        cascade(torch.ones(2), LINE, "flow", log_snr=[0.0, 1.0], data=torch.zeros(5, 7, dtype=torch.uint8))
    with pytest.raises(ValueError, match="Unknown weighting 'sigmoids'"):
        EXACT.improved_bound("sigmoids")
    with pytest.raises(ValueError, match="has no hyperparameter 'gamma'"):
        EXACT.improved_bound("sigmoid", gamma=5)
    with pytest.raises(ValueError, match="`prediction_type` is not stated by the schedule"):
        cascade(torch.ones(2), LINE, "linear", log_snr=[0.0, 1.0]).improved_bound("sigmoid")
    with pytest.raises(ValueError, match="has no finite objective"):
        EXACT.improved_bound("ddpm", density=LogUniform(20.0, 30.0))


def test_levels_are_by_default_what_curve_and_schedule_reach():
    found = cascade(poor_images, LINE, EDMSchedule(sigma_max=10.0), data=POINTS[:, None], draws=32)
    assert isinstance(found, Cascade)
    assert found.range == pytest.approx((-2 * math.log(10), 6.0))
    assert len(found.log_snr) == 33


NOISE = torch.linspace(-1, 1, 64, dtype=torch.float64)


def test_the_tables_error_has_the_draws_and_the_levels_spacing():
    losses = losses_on_line(ON_LINE[::32])[0][:, None] * (1 + 0.1 * NOISE)
    found = cascade(losses, LINE, "flow", log_snr=ON_LINE[::32])
    bound = found.improved_bound("sigmoid")
    both = math.hypot(bound.stderr, bound.spacing_error)
    assert f"{both:.1g}" not in (f"{bound.stderr:.1g}", f"{bound.spacing_error:.1g}")
    assert f"{bound.nats:.5g} ± {both:.1g} |" in table(found, {"sigmoid": bound})


def test_the_table_the_json_and_the_figure_are_by_name_and_say_what_it_is():
    found = cascade(losses_on_line(ON_LINE)[0], LINE, "flow", log_snr=ON_LINE, name="poor")
    bounds = {name: found.improved_bound(name) for name in ("sigmoid", "iddpm", "elbo", "flow")}
    text, facts = table(found, bounds), json.loads(to_json(found, bounds))
    assert NO_RANKING in text
    assert facts["what_it_bounds"] == NO_RANKING
    rows = [line.split("|")[1].strip() for line in text.split("negative mass |")[1].splitlines()[2:6]]
    assert rows == ["elbo", "flow *", "iddpm", "sigmoid *"]
    assert "| iddpm | none: w rises | 0.352 |" in text
    assert "* w grows on towards the schedule's noisy end: flow without bound, sigmoid 1.14 times." in text
    assert "No ELBO: a decoder is stated for 8-bit data alone." in text
    assert facts["weightings"]["flow"]["growth"] == "infinite"
    assert facts["weightings"]["iddpm"]["nats"] is None
    assert facts["bounds"][-1]["nats"] == found.gap()[0]
    left, right = plot_bounds(found, bounds).axes
    assert [line.get_label() for line in right.lines] == ["elbo", "flow", "sigmoid"]
    assert left.lines[0].get_ydata() == pytest.approx(found.nats()[0].tolist())
