"""The family: every registered weighting on every prediction type and schedule."""

import dataclasses
import math
import re

import pytest
import torch
from cases import NEEDED, SCHEDULES, example, gaussian_curve
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from snrweights import CosineSchedule, FlowSchedule, list_weightings
from snrweights.densities import Cosine, log_normal_sigma
from snrweights.predictions import PREDICTION_TYPES
from snrweights.weightings.base import _REGISTRY

NAMES = list_weightings()
SNR_FORMULAS = [name for name in NAMES if _REGISTRY[name].target not in ("objective", "native")]
OBJECTIVES = [name for name in NAMES if _REGISTRY[name].target == "objective"]
CONVERTED = SNR_FORMULAS + OBJECTIVES
INF = math.inf


def curve(name, prediction_type, log_snr, schedule=None, density=None, **hp):
    """Weights of a method in float64, at the cosine density unless said otherwise."""
    schedule = schedule or CosineSchedule(sigma_data=0.5)
    bound = example(name, **hp).over_log_snr(schedule, prediction_type=prediction_type, density=density)
    return bound(torch.as_tensor(log_snr, dtype=torch.float64))


def test_the_family_is_complete():
    family = """
        ddpm native snr_plus_one truncated_snr p2 debiased edm sd3_sigma_sqrt sd3_cosmap min_snr soft_min_snr
        smoothed_kl elbo sigmoid auto iddpm flow indi laplace edm_monotonic alsr optimal_loss
    """
    assert re.findall(r"\w+", family) == NAMES


# what is refused, and why ---------------------------------------------------------------------------------------------

# weight on epsilon and on x0 at SNR 0, then at infinite SNR; at SNR 0 v and flow errors are those of x0, and at
# infinite SNR every other target's error is that of epsilon
OPTIMAL_SCALE = 1 / (100 * math.sqrt(2 * math.pi * 1.44))
LIMITS = {
    "ddpm": (1, 0, 1, INF),
    "snr_plus_one": (INF, 1, 1, INF),
    "truncated_snr": (INF, 1, 1, INF),
    "p2": (1, 0, 0, 1),
    "debiased": (INF, 0, 0, INF),
    "edm": (INF, 4, 1, INF),
    "sd3_sigma_sqrt": (INF, 1, 1, INF),
    "sd3_cosmap": (INF, 2 / math.pi, 0, 2 / math.pi),
    "min_snr": (1, 0, 0, 5),
    "soft_min_snr": (1, 0, 0, 4),
    "smoothed_kl": (1 / 1.2, 0, 0, 5),
    "alsr": (INF, 0, 0, INF),
    "optimal_loss": (INF, 4 * OPTIMAL_SCALE, 0, 100 * OPTIMAL_SCALE),  # 1 / variance, and w_max
}


def limits(name, target):
    """Weight at SNR 0 and at infinite SNR."""
    noise_epsilon, noise_x0, clean_epsilon, clean_x0 = LIMITS[name]
    at_noise = {"epsilon": noise_epsilon, "edm": noise_x0 / 4}.get(target, noise_x0)  # sigma_data² = 1/4
    return at_noise, clean_x0 if target == "sample" else clean_epsilon


# an objective over a density that falls faster: epsilon at the noisy end, x0 (for ELBO everything) at the clean end
UNBOUNDED_OBJECTIVES = {
    "flow": {("epsilon", name) for name in ("elbo", "sigmoid", "auto", "flow", "indi", "edm_monotonic")},
    "cosine": {("epsilon", name) for name in ("elbo", "sigmoid", "auto", "flow", "indi", "edm_monotonic")}
    | {("sample", name) for name in ("elbo", "sigmoid", "auto", "iddpm", "flow")}
    | {(target, "elbo") for target in PREDICTION_TYPES},
    "zero_snr": {(target, name) for target in PREDICTION_TYPES for name in OBJECTIVES},  # no density at an atom
}


def is_unbounded(name, target, schedule):
    if name in OBJECTIVES:
        return (target, name) in UNBOUNDED_OBJECTIVES.get(schedule, ())
    ends = {"cosine": (True, True), "flow": (True, False), "zero_snr": (True, False)}.get(schedule, (False, False))
    return name in LIMITS and any(end and limit == INF for end, limit in zip(ends, limits(name, target), strict=True))


# the matrix -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule_name", SCHEDULES)
@pytest.mark.parametrize("target", PREDICTION_TYPES)
@pytest.mark.parametrize("name", NAMES)
def test_finite_and_non_negative_or_refused_at_bind(name, target, schedule_name):
    schedule, weighting, clamp_max = SCHEDULES[schedule_name], example(name), None
    t = schedule.grid()
    if is_unbounded(name, target, schedule_name):
        with pytest.raises(ValueError, match="`clamp_max=`") as refusal:
            weighting.bind(schedule, prediction_type=target)
        weights = weighting.over_log_snr(schedule, prediction_type=target)(schedule.log_snr(t))
        timesteps = ", ".join(f"{step:g}" for step in t[weights == INF].tolist())
        message = f"Weighting {name!r} for prediction_type {target!r} is not finite at t = {timesteps}: "
        assert str(refusal.value).startswith(message)
        clamp_max = 50.0
    weights = weighting.bind(schedule, prediction_type=target, clamp_max=clamp_max)(t)
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    assert clamp_max is None or weights.max() == clamp_max


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_shape_and_dtype_are_kept(name, dtype, schedule):
    schedule = SCHEDULES[schedule]
    bound = example(name).bind(schedule, prediction_type="v_prediction", clamp_max=100.0, dtype=dtype)
    grid = schedule.grid()
    for t in (grid[500], grid[[500]], grid[100:900:100]):
        weights = bound(t)
        assert weights.shape == t.shape
        assert weights.dtype == dtype
    many = bound(grid)
    assert torch.equal(many[500], bound(grid[500]))
    as_curve = bound.curve(schedule.log_snr(grid)).to(dtype)
    assert torch.equal(many, as_curve)


# one gradient field, five targets -------------------------------------------------------------------------------------


# "native" coordinates need a schedule, "loss_zscore" a batch; a strong bump has no mass but at its centre
NOT_ALONE = ("native", "loss_zscore")
NARROW = {"alpha": st.floats(0.01, 0.1), "ema_decay": st.floats(0.1, 0.9)}


def hyperparameters(name):
    """Strategy for the hyperparameters of a weighting, inside their bounds."""

    def values(field):
        if field.metadata["choices"]:
            return st.sampled_from([choice for choice in field.metadata["choices"] if choice not in NOT_ALONE])
        if not field.metadata["number"]:
            return st.just(NEEDED[name][field.name])
        if field.name in NARROW:
            return NARROW[field.name]
        return st.floats(0.2, 20) if field.metadata["above"] == 0 else st.floats(-3, 3)

    return st.fixed_dictionaries({field.name: values(field) for field in dataclasses.fields(_REGISTRY[name])})


@pytest.mark.parametrize("name", CONVERTED)
@given(data=st.data(), log_snr=st.floats(-40, 40), sigma_data=st.floats(0.05, 20))
def test_every_target_has_the_weight_of_the_same_gradient_field(name, data, log_snr, sigma_data):
    hp = data.draw(hyperparameters(name))
    schedule = CosineSchedule(sigma_data=sigma_data)
    w = {y: curve(name, y, log_snr, schedule, **hp).item() for y in PREDICTION_TYPES}
    snr, sigma_hat = math.exp(log_snr), math.exp(-log_snr / 2)
    c_out = sigma_hat * sigma_data / math.sqrt(sigma_hat**2 + sigma_data**2)
    in_x0 = (
        w["epsilon"] * snr,
        w["v_prediction"] * (1 + snr),
        w["flow_prediction"] * (1 + math.sqrt(snr)) ** 2,
        w["edm"] / c_out**2,
    )
    assert w["sample"] > 0
    assert in_x0 == pytest.approx([w["sample"]] * 4, rel=1e-10, abs=0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_native_is_one_on_any_target(prediction_type):
    assert curve("native", prediction_type, [-INF, -5.0, 0.0, 5.0, INF]).tolist() == [1] * 5


LOG_SNR = torch.linspace(-12, 12, 25, dtype=torch.float64)
S = LOG_SNR.exp()


@pytest.mark.parametrize(
    ("name", "hp", "target", "expected"),
    [
        ("ddpm", {}, "epsilon", torch.ones_like(S)),
        ("snr_plus_one", {}, "sample", 1 + S),
        ("truncated_snr", {}, "epsilon", torch.maximum(torch.ones_like(S), 1 / S)),
        ("p2", {"k": 0.7, "gamma": 0.6}, "epsilon", (0.7 + S) ** -0.6),
        ("debiased", {}, "epsilon", S**-0.5),
        ("edm", {"sigma_data": 0.4}, "sample", S + 1 / 0.4**2),
        ("sd3_sigma_sqrt", {}, "sample", (1 / (1 + S.sqrt())) ** -2),
        ("min_snr", {"gamma": 3.0}, "epsilon", (3 / S).clamp(max=1)),
        ("min_snr", {"gamma": 3.0}, "v_prediction", S.clamp(max=3) / (S + 1)),
        ("smoothed_kl", {"tau": 0.3}, "epsilon", 1 / (1 + 0.3 * (1 + S))),
        ("smoothed_kl", {"tau": 0.3, "coords": "ve"}, "epsilon", 1 / (1 + 0.3 * S)),
        ("smoothed_kl", {"tau": 0.3, "coords": "flow"}, "epsilon", 1 / (1 + 0.3 * (1 + S.sqrt()) ** 2)),
    ],
)
def test_the_formulas_in_snr(name, hp, target, expected):
    torch.testing.assert_close(curve(name, target, LOG_SNR, **hp), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("name", "hp", "w_kg"),
    [
        ("elbo", {}, torch.ones_like(S)),
        ("sigmoid", {"bias": 1.5}, torch.sigmoid(1.5 - LOG_SNR)),
        ("iddpm", {}, 1 / torch.cosh(LOG_SNR / 2)),
        ("flow", {}, torch.exp(-LOG_SNR / 2)),
        ("indi", {}, torch.exp(-LOG_SNR) / torch.cosh(LOG_SNR / 4) ** 2),
        ("laplace", {"loc": 1.0, "scale": 2.0}, torch.exp(-(LOG_SNR - 1).abs() / 2) / 4),
    ],
)
def test_the_formulas_in_w_kg(name, hp, w_kg):
    for density in (Cosine(), log_normal_sigma()):
        expected = w_kg / density.log_prob(LOG_SNR).exp()
        torch.testing.assert_close(curve(name, "epsilon", LOG_SNR, density=density, **hp), expected, rtol=1e-12, atol=0)


def test_the_three_spellings_of_soft_min_snr():
    for gamma in (1.0, 4.0, 6.0):
        noise, data = 1 / S, 1 / gamma  # sigma_hat² and sigma_data² of k-diffusion's form
        schedule = CosineSchedule(sigma_data=data**0.5)
        spellings = {
            "edm": noise * data / (noise + data) ** 2,
            "sample": 1 / (noise + 1 / gamma),
            "epsilon": gamma / (gamma + S),
        }
        for target, expected in spellings.items():
            actual = curve("soft_min_snr", target, LOG_SNR, schedule, gamma=gamma)
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


def test_edm_monotonic_is_edms_objective_up_to_its_peak():
    def edms(log_snr):
        log_snr = torch.as_tensor(log_snr, dtype=torch.float64)
        return log_normal_sigma(-1.2, 1.2).log_prob(log_snr).exp() * (1 + (-log_snr).exp() / 0.5**2)

    peak = minimize_scalar(lambda x: -edms(x).item(), bounds=(-6, 0), method="bounded", options={"xatol": 1e-9}).x
    assert peak == pytest.approx(-3.308, abs=5e-4)
    assert math.exp(-peak / 2) == pytest.approx(5.23, abs=5e-3)
    w_kg = curve("edm_monotonic", "epsilon", LOG_SNR) * Cosine().log_prob(LOG_SNR).exp()
    torch.testing.assert_close(w_kg, edms(LOG_SNR.clamp(min=peak)), rtol=1e-12, atol=0)
    assert (w_kg.diff() <= 1e-12 * w_kg.max()).all()


# exact limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SNR_FORMULAS)
def test_exact_limits(name):
    for target in PREDICTION_TYPES:
        assert curve(name, target, [-INF, INF]).tolist() == pytest.approx(limits(name, target), rel=1e-12, abs=0)


def test_an_objective_that_follows_the_density_is_finite_at_both_ends():
    ends = [-INF, -30.0, 0.0, 30.0, INF]
    plain_flow = curve("flow", "flow_prediction", ends, FlowSchedule())  # weight 1 up to the constant of w_KG
    assert plain_flow.tolist() == pytest.approx([2] * 5, rel=1e-10)
    plain_cosine = curve("iddpm", "epsilon", ends, CosineSchedule())
    assert plain_cosine.tolist() == pytest.approx([2 * math.pi] * 5, rel=1e-10)


def test_an_objective_below_the_density_vanishes_at_the_ends():
    assert curve("sigmoid", "v_prediction", [-INF, INF], CosineSchedule()).tolist() == [0, 0]
    assert curve("sigmoid", "flow_prediction", [-INF, INF], FlowSchedule()).tolist() == [0, 0]
    assert curve("laplace", "epsilon", [-INF, INF], CosineSchedule()).tolist() == [0, 0]


def test_an_objective_above_the_density_is_infinite_at_the_ends():
    assert curve("elbo", "epsilon", [-INF, INF], CosineSchedule()).tolist() == [INF, INF]
    assert curve("elbo", "epsilon", [-INF, INF], CosineSchedule(), density="cauchy").tolist() == [INF, INF]
    assert curve("elbo", "epsilon", [-INF, INF], CosineSchedule(), density="log_uniform").tolist() == [INF, INF]


# the registry ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "field"),
    [(name, field) for name in NAMES for field in dataclasses.fields(_REGISTRY[name])],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_hyperparameter_changes_the_output(name, field):
    if not field.metadata["in_curve"]:
        values = field.metadata["choices"] or [0.5]
        for value in values:
            same = curve(name, "epsilon", LOG_SNR, **{field.name: value})
            assert torch.equal(same, curve(name, "epsilon", LOG_SNR))
        return
    default = example(name)
    choices = {"coords": ["ve", "flow"], "form": ["gaussian"], "curve": [gaussian_curve(0.5)]}
    field = field.name
    for other in choices.get(field) or [(getattr(default, field) or 0.5) + 0.5]:
        changed = curve(name, "epsilon", LOG_SNR, **{field: other})
        assert not torch.allclose(changed, curve(name, "epsilon", LOG_SNR), rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_every_class_states_formula_and_source(name):
    cls = _REGISTRY[name]
    assert re.search(r"\bw(_\w+)? = ", cls.formula)
    assert re.search(r"arXiv \d{4}\.\d{5}|diffusers' SD3 scripts|every plain script", cls.source)
    assert re.search(r"w_(eps|x0|KG)|Weight 1|of the flow time s", cls.__doc__)
    assert re.search(r"\n    Source: \w", cls.__doc__)
    for field in dataclasses.fields(cls):
        assert f"        {field.name}: " in cls.__doc__
