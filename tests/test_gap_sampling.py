"""Drawing by the gap to the optimal loss: q against its definition, clipping, the third mode, the curve beyond its ends."""

import math
import pickle

import numpy as np
import pytest
import torch
from cases import NoHostSync

from snrweights import EDMSchedule, ImportanceSampler
from snrweights.optimal import OptimalLossCurve
from snrweights.optimal.extended import ExtendedCurve
from snrweights.predictions import PREDICTION_TYPES, log_error_ratio

LEVELS = torch.logspace(-2, 2, 41, dtype=torch.float64)
VALUES = 8 * LEVELS**2 / (1 + LEVELS**2)  # of a Gaussian with variance 1 in each of 8 dimensions
CURVE = OptimalLossCurve(LEVELS, VALUES, 0 * LEVELS, ("pairs",) * 41, LEVELS, {"dim": 8, "variance": 8.0})
EDM = EDMSchedule()


def taught(excess, weight=None, **options):
    """A sampler of four bins that was shown, in each, the optimal loss plus an excess (4,)."""
    optimum = ExtendedCurve(CURVE)
    sampler = ImportanceSampler(EDM, "gap", optimum=optimum, bins=4, warm_up=1, **options)
    u = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    t = sampler._quantiles.timesteps(u)
    place = torch.arange(400) // 100
    loss = optimum(EDM.log_snr(t)) + excess[place]
    sampler.update(t, loss.clamp_min(0), weight=None if weight is None else weight[place])
    sampler.refresh()
    return sampler


def test_q_is_the_weighted_gap_and_the_floor():
    excess, weight = torch.tensor([0.1, 0.2, 0.4, 0.1]), torch.tensor([1.0, 3.0, 0.5, 2.0])
    p, q = taught(excess, weight, floor=0.2).probabilities()
    root = excess * weight
    np.testing.assert_allclose(p, 0.25, rtol=1e-12)
    np.testing.assert_allclose(q, 0.8 * root / root.sum() + 0.2 * p, rtol=1e-5)  # timesteps are float32


def test_a_gap_below_zero_counts_as_none():
    q = taught(torch.tensor([-1e-4, 0.2, 0.2, -1e-4])).probabilities()[1]
    np.testing.assert_allclose(q, [0.025, 0.475, 0.475, 0.025], rtol=1e-5)


def test_without_any_gap_it_draws_from_the_base():
    p, q = taught(torch.full((4,), -1e-4)).probabilities()
    assert torch.equal(p, q)


def test_the_modes_draw_and_weigh_what_they_say():
    excess, u = torch.tensor([0.1, 0.2, 0.4, 0.1]), (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    corrected, uncorrected, reweighted = (taught(excess, mode=mode) for mode in ("resample", "uncorrected", "reweight"))
    t, weight = uncorrected.at(u)
    assert (weight == 1).all()
    assert torch.equal(t, corrected.at(u).t)
    assert not torch.equal(t, reweighted.at(u).t)
    p, q = uncorrected.probabilities()
    place = torch.bucketize(EDM.log_snr(t), uncorrected.evidence.edges[1:-1])
    np.testing.assert_allclose(place.bincount(minlength=4) / 20_000, q, atol=1e-3)
    np.testing.assert_allclose(corrected.at(u).weight, (p / q)[place], rtol=1e-6)
    np.testing.assert_allclose(corrected.at(u).weight.double().mean(), 1, rtol=1e-3)


def test_updates_wait_for_nothing():
    sampler = taught(torch.tensor([0.1, 0.2, 0.4, 0.1]))
    t = sampler.draw(16).t
    with NoHostSync():
        sampler.update(t, torch.ones(16), weight=torch.ones(16))


def test_two_processes_are_one():
    """The sums of two, as a `reduce` gives them, lead to the q of one that has seen all."""
    excess = torch.tensor([0.1, 0.2, 0.4, 0.1])
    one, doubled = taught(excess), taught(excess, reduce=lambda moments: 2 * moments)
    np.testing.assert_allclose(doubled.probabilities()[1], one.probabilities()[1], rtol=1e-12)


@pytest.mark.parametrize(("rule", "optimum"), [("gap", None), ("gradient", ExtendedCurve(CURVE))])
def test_a_curve_goes_with_the_gap_alone(rule, optimum):
    with pytest.raises(ValueError, match=r"`optimum` is needed by the rules \['gap'\] and by no other"):
        ImportanceSampler(EDM, rule, optimum=optimum)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_inside_its_range_the_extended_curve_is_the_curve(prediction_type):
    sigmas = torch.logspace(-2, 2, 97, dtype=torch.float64)
    extended = ExtendedCurve(CURVE, prediction_type, 0.5)(-2 * sigmas.log())
    torch.testing.assert_close(extended, CURVE.at(sigmas, prediction_type, "mean", 0.5), rtol=1e-12, atol=0)


def test_beyond_its_range_it_is_nothing_or_the_variance():
    log_snr = torch.tensor([math.inf, 2 * math.log(101), -2 * math.log(101), -math.inf])
    assert ExtendedCurve(CURVE)(log_snr).tolist() == [0, 0, 1, 1]
    epsilon = ExtendedCurve(CURVE, "epsilon")(log_snr[2:3].double())
    torch.testing.assert_close(epsilon, log_error_ratio("epsilon", log_snr[2:3].double()).exp())
    assert ExtendedCurve(CURVE, "v_prediction")(log_snr[3:]).tolist() == [1]


def test_the_extended_curve_is_pickled_with_a_model():
    again = pickle.loads(pickle.dumps(ExtendedCurve(CURVE)))
    assert torch.equal(again(torch.zeros(3)), ExtendedCurve(CURVE)(torch.zeros(3)))
