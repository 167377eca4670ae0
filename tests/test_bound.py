"""Binding: clamping, normalising, users' own methods, errors, and the hot path."""

import dataclasses
import math

import pytest
import torch
from cases import SCHEDULES, NoHostSync

from snrweights import (
    BoundWeighting,
    CosineSchedule,
    DiscreteSchedule,
    EDMSchedule,
    FlowSchedule,
    Weighting,
    get_weighting,
    hyper,
    list_weightings,
    register_weighting,
)
from snrweights.densities import FlowUniform, Normal, sample
from snrweights.drawn import default_density, mean_under
from snrweights.weightings import parity
from snrweights.weightings.base import _REGISTRY

LINEAR = DiscreteSchedule.from_name("linear")
T = torch.tensor([0, 10, 500, 999])


# clamp and normalise --------------------------------------------------------------------------------------------------


def test_clamp_max_bounds_the_weight_and_makes_an_infinite_one_legal():
    zero_snr = SCHEDULES["zero_snr"]
    bound = get_weighting("debiased").bind(zero_snr, prediction_type="epsilon", clamp_max=3.0)
    plain = get_weighting("debiased").over_log_snr(zero_snr, prediction_type="epsilon")(zero_snr.log_snr_table)
    assert plain[-1] == math.inf
    torch.testing.assert_close(bound(zero_snr.grid()), plain.clamp(max=3.0).float(), rtol=0, atol=0)


def test_half_precision_that_overflows_is_refused():
    with pytest.raises(ValueError, match=r"'ddpm' for prediction_type 'sample' is not finite at t = 0\.002"):
        get_weighting("ddpm").bind(EDMSchedule(), prediction_type="sample", dtype=torch.float16)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["ddpm", "min_snr", "p2", "smoothed_kl"])
def test_normalize_makes_the_mean_one_under_the_density(name, schedule):
    schedule = SCHEDULES[schedule]
    options = {"prediction_type": "epsilon", "dtype": torch.float64}
    plain = get_weighting(name).bind(schedule, **options)
    normalized = get_weighting(name).bind(schedule, normalize="mean", **options)
    t = schedule.grid()[1:-1]
    ratio = normalized(t) / plain(t)
    torch.testing.assert_close(ratio, ratio[0].expand_as(ratio), rtol=1e-12, atol=0)
    draws = sample(default_density(schedule), (20_000,), torch.Generator().manual_seed(0))
    weights = normalized.curve(draws)
    error = weights.std().item() / math.sqrt(len(draws))
    assert weights.mean().item() == pytest.approx(1, abs=4 * error + 1e-12)
    assert mean_under(default_density(schedule), normalized.curve) == pytest.approx(1, abs=1e-12)


def test_normalize_uses_the_density_given():
    options = {"prediction_type": "epsilon", "normalize": "mean"}
    uniform = get_weighting("min_snr").over_log_snr("edm", **options)
    elsewhere = get_weighting("min_snr").over_log_snr("edm", density="log_uniform", **options)
    zero = torch.zeros(1, dtype=torch.float64)
    assert uniform(zero) != elsewhere(zero)


def test_clamping_comes_before_normalising():
    weighting, options = get_weighting("debiased"), {"prediction_type": "epsilon", "clamp_max": 2.0}
    normalized = weighting.bind(LINEAR, normalize="mean", dtype=torch.float64, **options)
    clamped = weighting.bind(LINEAR, dtype=torch.float64, **options)
    t = LINEAR.grid()
    torch.testing.assert_close(normalized(t), clamped(t) / clamped(t).mean(), rtol=1e-12, atol=0)


def test_a_weight_without_a_mean_is_refused():
    with pytest.raises(
        ValueError, match=r"`normalize='mean'`: 'debiased' for 'epsilon' averages inf under .*`clamp_max=`"
    ):
        get_weighting("debiased").over_log_snr(SCHEDULES["zero_snr"], prediction_type="epsilon", normalize="mean")
    with pytest.raises(ValueError, match="'sd3_sigma_sqrt' for 'sample' averages inf"):
        # finite on every timestep, but with 1 / s² uniform in s down to 0 there is no mean
        get_weighting("sd3_sigma_sqrt").bind(
            FlowSchedule(s_min=1e-9), prediction_type="sample", density=FlowUniform(), normalize="mean"
        )


def test_the_mean_is_over_the_range_of_the_schedule():
    options = {"prediction_type": "sample", "normalize": "mean", "dtype": torch.float64}
    s = 0.001 + 0.999 * (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    bound = get_weighting("sd3_sigma_sqrt").bind(FlowSchedule(s_min=0.001), **options)
    assert bound(s).mean().item() == pytest.approx(1, rel=1e-6)
    cosine = get_weighting("elbo").bind(
        CosineSchedule(t_min=0.001, t_max=0.999), **{**options, "prediction_type": "epsilon"}
    )
    assert cosine(0.001 + 0.998 * (s - 0.001) / 0.999).mean().item() == pytest.approx(1, rel=1e-6)


def test_half_precision_that_overflows_only_once_normalised_is_refused():
    with pytest.raises(ValueError, match=r"not finite at t = 0, 1, "):
        get_weighting("ddpm").bind(
            LINEAR, prediction_type="sample", density=Normal(-12.0, 1.0), normalize="mean", dtype=torch.float16
        )


def test_the_density_matters_to_an_objective_only():
    def weights(name, density):
        return get_weighting(name).bind(LINEAR, prediction_type="epsilon", density=density)(T)

    assert torch.equal(weights("min_snr", "laplace"), weights("min_snr", None))
    assert not torch.allclose(weights("sigmoid", "log_normal_sigma"), weights("sigmoid", None))


# what a method may be -------------------------------------------------------------------------------------------------


def test_a_users_own_class():
    @register_weighting("test_power", target="sample", formula="w_x0 = SNR^power", source="this test")
    class Power(Weighting):
        power: float = hyper(0.5, above=0)

        def log_weight(self, log_snr):
            return self.power * log_snr

    try:
        assert "test_power" in list_weightings()
        weighting = get_weighting("test_power", power=0.25)
        assert weighting == Power(power=0.25)
        with pytest.raises(dataclasses.FrozenInstanceError):
            weighting.power = 1.0
        actual = weighting.bind(LINEAR, prediction_type="epsilon", dtype=torch.float64)(T)
        torch.testing.assert_close(actual, torch.exp(-0.75 * LINEAR.log_snr(T)), rtol=1e-12, atol=0)
        with pytest.raises(ValueError, match=r"`Power\(power=...\)` must be > 0, got -1"):
            get_weighting("test_power", power=-1)
        with pytest.raises(ValueError, match=r"Weighting 'test_power' is registered already, as Power\."):
            register_weighting("test_power", target="sample")
    finally:
        del _REGISTRY["test_power"]


def test_a_target_that_is_none_cannot_be_registered():
    with pytest.raises(ValueError, match="Unknown prediction_type 'noise'; choose one of"):
        register_weighting("test_noise", target="noise")


def test_a_function_is_w_epsilon_of_log_snr():
    function = get_weighting(lambda log_snr: (5 / log_snr.exp()).clamp(max=1)).bind(
        LINEAR, prediction_type="v_prediction"
    )
    torch.testing.assert_close(function(T), get_weighting("min_snr").bind(LINEAR, prediction_type="v_prediction")(T))


def test_a_weighting_stands_for_itself():
    weighting = get_weighting("min_snr", gamma=2.0)
    assert get_weighting(weighting) is weighting


# bad input ------------------------------------------------------------------------------------------------------------


def bind(method="min_snr", schedule=LINEAR, prediction_type="epsilon", hp=None, **options):
    return get_weighting(method, **(hp or {})).bind(schedule, prediction_type=prediction_type, **options)


CHOICES = list_weightings()


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"method": "minsnr"}, ValueError, f"Unknown weighting 'minsnr'; choose one of {CHOICES}."),
        ({"hp": {"gamma": 0}}, ValueError, "`MinSNR(gamma=...)` must be > 0, got 0."),
        ({"hp": {"gama": 5}}, ValueError, "Weighting 'min_snr' has no hyperparameter 'gama'; it takes ['gamma']."),
        ({"hp": {"gamma": "5"}}, ValueError, "`MinSNR(gamma=...)` must be a finite number, got '5'."),
        ({"hp": {"gamma": True}}, ValueError, "`MinSNR(gamma=...)` must be a finite number, got True."),
        ({"hp": {"gamma": math.nan}}, ValueError, "`MinSNR(gamma=...)` must be a finite number, got nan."),
        ({"hp": {"gamma": math.inf}}, ValueError, "`MinSNR(gamma=...)` must be a finite number, got inf."),
        (
            {"method": "smoothed_kl", "hp": {"coords": "polar"}},
            ValueError,
            "`SmoothedKL(coords=...)` must be one of ['vp', 've', 'flow', 'native'], got 'polar'.",
        ),
        ({"method": 3}, TypeError, f"`method` must be a name in {CHOICES}, a Weighting or a function, got 3."),
        (
            {"method": get_weighting("ddpm"), "hp": {"gamma": 5}},
            TypeError,
            "Hyperparameters ['gamma'] go with a method's name only, got `method` DDPM().",
        ),
        ({"prediction_type": None}, ValueError, "`prediction_type` is not stated by the schedule and must be given;"),
        (
            {"prediction_type": "eps"},
            ValueError,
            "Unknown prediction_type 'eps'; choose one of "
            "['epsilon', 'sample', 'v_prediction', 'flow_prediction', 'edm'].",
        ),
        (
            {"prediction_type": "edm"},
            ValueError,
            "`prediction_type='edm'` needs the schedule's `sigma_data`, got None;",
        ),
        ({"normalize": "max"}, ValueError, "`normalize` must be 'mean' or None, got 'max'."),
        ({"clamp_max": 0}, ValueError, "`clamp_max` must be > 0, got 0."),
        ({"clamp_max": math.nan}, ValueError, "`clamp_max` must be > 0, got nan."),
        ({"dtype": torch.int64}, ValueError, "`dtype` must be one of [torch.float64, torch.float32, torch.bfloat16,"),
        ({"density": "gauss"}, ValueError, "Unknown density 'gauss'; choose one of ['cosine', "),
        ({"schedule": "quadratic"}, ValueError, "Unknown schedule 'quadratic'; choose one of ['linear', "),
        (
            {"method": lambda log_snr: log_snr.exp().sum()},
            ValueError,
            "The callable `method` must return a tensor of shape (1000,), got ().",
        ),
        ({"method": lambda log_snr: 1.0}, ValueError, "must return a tensor of shape (1000,), got float."),
        (
            {"method": lambda log_snr: -log_snr.exp()},
            ValueError,
            "The callable `method` must return weights >= 0, got -",
        ),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_the_choices(arguments, kind, message):
    with pytest.raises(kind) as raised:
        bind(**arguments)
    assert message in str(raised.value)


def test_a_long_list_of_timesteps_is_shortened():
    with pytest.raises(ValueError, match=r"at t = 0, 1, 2, 3, 4, ... \(1000 in all\): give `clamp_max=`"):
        bind(lambda log_snr: torch.full_like(log_snr, math.inf))


def test_native_coordinates_need_a_schedule():
    with pytest.raises(ValueError, match=r"`SmoothedKL\(coords='native'\)` needs a schedule: call `bind`"):
        get_weighting("smoothed_kl", coords="native").log_weight(torch.zeros(1))


@pytest.mark.parametrize("t", [torch.tensor([1000]), torch.tensor([-1]), torch.tensor(1000), torch.tensor(-1)])
def test_an_index_outside_the_table_is_an_error_that_says_so(t):
    with pytest.raises(IndexError, match=rf"`t` must lie in \[0, 999\], got {t.item()}\."):
        bind()(t)


def test_a_batch_has_one_dimension():
    with pytest.raises(ValueError, match=r"`t` must have shape \(B,\) or \(\), got \(2, 2\)"):
        bind()(torch.zeros(2, 2))


def test_repr_says_what_it_is():
    bound = bind(hp={"gamma": 2.0})
    assert isinstance(bound, BoundWeighting)
    assert repr(bound) == "BoundWeighting(MinSNR(gamma=2.0), prediction_type='epsilon', schedule=DiscreteSchedule)"


# the hot path ---------------------------------------------------------------------------------------------------------

HOT = {
    "table": (bind("min_snr", LINEAR, normalize="mean"), torch.tensor([3, 500, 999])),
    "table, float t": (bind("min_snr", LINEAR), torch.tensor([3.0, 500.5, 999.0])),
    "flow": (
        bind("smoothed_kl", FlowSchedule(num_train_timesteps=1000), "flow_prediction"),
        torch.tensor([3.0, 500.0]),
    ),
    "flow, objective": (
        bind("sigmoid", FlowSchedule(num_train_timesteps=1000, s_min=0.01), "flow_prediction", clamp_max=9.0),
        torch.tensor([30.0, 500.0]),
    ),
    "edm": (bind("soft_min_snr", EDMSchedule(), "edm", normalize="mean"), torch.tensor([0.1, 1.0, 70.0])),
    "cosine": (bind("p2", CosineSchedule(), "v_prediction"), torch.tensor([0.1, 0.5, 1.0])),
}


def test_the_sync_detector_detects():
    with pytest.raises(AssertionError, match="it waits for the device"), NoHostSync():
        torch.ones(1).sum().item()


@pytest.mark.parametrize("case", HOT)
def test_the_hot_path_does_not_wait_for_the_device(case):
    bound, t = HOT[case]
    expected = bound(t)
    with NoHostSync():
        assert bound(t).shape == expected.shape


@pytest.mark.parametrize("case", HOT)
def test_weights_are_where_the_timesteps_are(case):
    bound, t = HOT[case]
    weights = bound(t.to("meta"))  # a device that every machine has
    assert weights.device.type == "meta"
    assert weights.shape == t.shape


@pytest.mark.parametrize("case", HOT)
def test_the_hot_path_compiles_in_one_graph(case):
    bound, t = HOT[case]
    # aot_eager traces as inductor does, without the C++ compiler that inductor needs
    compiled = torch.compile(lambda t: bound(t), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(t), bound(t), rtol=1e-6, atol=0)


def test_a_parity_weighting_binds_with_its_infinities():
    weights = bind(parity.get("kohya_debiased_epsilon"), SCHEDULES["zero_snr"])(torch.tensor([998, 999]))
    assert weights[0] < math.inf
    assert weights[1] == math.inf
