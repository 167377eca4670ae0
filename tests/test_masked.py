"""Weights of masked diffusion: schedules and formulas to the last digit, limits, monotonicity, documentation."""

import doctest
import inspect
import math
import re
from pathlib import Path

import mpmath
import pytest
import torch
from masked_formulas import DIGITS, HP, INF, METHODS, SCHEDULES, log_odds, published, published_edm

import snrweights
from snrweights import get_weighting, masked
from snrweights.masked import (
    CosineSchedule,
    LinearSchedule,
    PolynomialSchedule,
    get_masked_weighting,
    is_monotone,
    masked_factor,
    masked_weight,
    negative_mass,
    register_masked_weighting,
)
from snrweights.masked.schedules import Product
from snrweights.masked.weights import _REGISTRY, MaskedWeighting

TIMES = [1e-30, 2.0**-24, 1e-3, 0.1, 0.5, 0.75, 0.999, 1 - 2.0**-24]


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
