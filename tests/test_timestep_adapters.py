"""What the timestep argument of each model means, by the noise level that the loops give it with."""

import inspect
from types import SimpleNamespace

import diffusers
import pytest
import torch
from attaching import F64, FLOW, Denoiser, X, Y, assert_weighted, gradient
from diffusers import DDPMScheduler, DDPMWuerstchenScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior
from snrweights.integrations.timestep_adapters import (
    ADAPTERS,
    REFUSED,
    adapter_of,
    position_of,
    refusal_of,
    reversed_unit,
    same,
    shifted_by_resolution,
    unit,
)
from torch import nn

import snrweights

IN_EXAMPLES_ONLY = {"PixArtControlNetTransformerModel"}
S = FLOW / 1000


def stand_in(name, argument="timestep", first="hidden_states", **attributes):
    """Make a tiny model whose class has this name, and these names of arguments."""
    namespace = {}
    exec(f"def forward(self, {first}, {argument}=None, *rest): return self.run({first}, {argument})", namespace)
    cls = type(name, (Denoiser,), {"forward": namespace["forward"], "run": Denoiser.forward, **attributes})
    return cls().double()


def min_snr(s):
    """Return the Min-SNR weight on the flow's error at noise s: x0's error is s times it."""
    return ((((1 - s) / s) ** 2).clamp(max=5) * s**2).reshape(-1, 1, 1, 1)


def run(model, call, weight=1.0):
    model.zero_grad()
    (weight * (call(model) - Y).square()).mean().backward()
    return gradient(model)


def assert_means(make, call, weight, scheduler, tolerance=1e-10, **options):
    """Check that a call of the attached model is weighted so."""
    wanted, plain = run(make(), call, weight), run(make(), call)
    model = make()
    handle = snrweights.attach(model, scheduler, "min_snr", gamma=5.0, dtype=F64, **options)
    assert_weighted(run(model, call), wanted, plain, tolerance)
    assert handle.weighted


def named(meaning):
    return [name for name, a in ADAPTERS.items() if a.meaning is meaning and a.argument == "timestep"]


# the meanings ---------------------------------------------------------------------------------------------------------


def test_every_meaning_is_tested_here():
    assert {a.meaning for a in ADAPTERS.values()} == {same, unit, reversed_unit, shifted_by_resolution}
    assert {a.argument for a in ADAPTERS.values()} == {"timestep", "timesteps", "t", "r"}
    assert [name for name, a in ADAPTERS.items() if a.per_sample_list] == ["ZImageTransformer2DModel"]
    assert not set(ADAPTERS) & set(REFUSED)


@pytest.mark.parametrize("name", named(same))
def test_the_same(name):
    scheduler = FlowMatchEulerDiscreteScheduler()
    assert_means(lambda: stand_in(name), lambda model: model(X, FLOW), min_snr(S), scheduler)


@pytest.mark.parametrize("name", named(unit))
def test_sigma(name):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)  # the shift moves the draws, not what sigma means
    assert_means(lambda: stand_in(name), lambda model: model(X, FLOW / 1000), min_snr(S), scheduler)
    assert_means(lambda: stand_in(name), lambda model: model(X, timestep=FLOW / 1000), min_snr(S), scheduler)


@pytest.mark.parametrize("name", named(reversed_unit))
def test_one_minus_sigma(name):
    scheduler = FlowMatchEulerDiscreteScheduler()
    assert_means(lambda: stand_in(name), lambda model: model(X, 1 - S), min_snr(S), scheduler)


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "Lumina2Transformer2DModel"])
def test_sigma_goes_with_a_flow_only(name):
    model = stand_in(name)
    snrweights.attach(model, DDPMScheduler())
    with pytest.raises(TypeError, match="takes a flow's sigma as its timestep and goes with a FlowMatch scheduler"):
        model(X, S)


def test_sigma_in_half_precision_is_as_exact_as_it_is_given():
    scheduler, s = FlowMatchEulerDiscreteScheduler(), S.bfloat16()
    assert_means(
        lambda: stand_in("FluxTransformer2DModel"), lambda model: model(X, s.double()), min_snr(s.double()), scheduler
    )
    model = stand_in("FluxTransformer2DModel")
    seen = []
    with snrweights.attach(model, scheduler, dtype=F64):
        prediction = model(X, s)
        prediction.register_hook(seen.append)
        prediction.sum().backward()
    torch.testing.assert_close(seen[0], min_snr(s.double()).expand_as(X), rtol=1e-12, atol=0)


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("by_name", [False, True])
def test_cogview4_is_told_the_timestep_before_its_shift(patch, by_name):
    tokens = 8 * 8 / patch**2
    mu = 0.75 * (tokens / 256) ** 0.5 + 0.25  # as its ControlNet script noises
    noise = mu / (mu + 1 / S - 1)
    assert (noise - S).abs().max() > 0.1
    config = SimpleNamespace(patch_size=patch)

    def call(model):
        return model(hidden_states=X, timestep=FLOW) if by_name else model(X, FLOW)

    assert_means(
        lambda: stand_in("CogView4Transformer2DModel", config=config),
        call,
        min_snr(noise),
        FlowMatchEulerDiscreteScheduler(),
    )


def test_hidream_calls_it_timesteps():
    scheduler = FlowMatchEulerDiscreteScheduler()
    for call in (lambda model: model(X, FLOW), lambda model: model(X, timesteps=FLOW)):
        assert_means(lambda: stand_in("HiDreamImageTransformer2DModel", "timesteps"), call, min_snr(S), scheduler)


def test_wuerstchen_calls_it_r():
    scheduler, r = DDPMWuerstchenScheduler(), torch.tensor([0.02, 0.2, 0.5, 0.9], dtype=F64)
    bar = scheduler._alpha_cumprod(r, torch.device("cpu")).double()
    snr = bar / (1 - bar)
    assert snr.max() > 5 > snr.min()
    weight = (snr.clamp(max=5) / snr).reshape(-1, 1, 1, 1)
    for call in (lambda model: model(X, r, None), lambda model: model(X, r=r)):
        # the scheduler's own offset is a float32
        assert_means(lambda: stand_in("WuerstchenPrior", "r", "x"), call, weight, scheduler, tolerance=1e-6)


class ZImageTransformer2DModel(Denoiser):
    """Stands in for the class of this name: lists of images in and out."""

    def forward(self, x, t, cap_feats=None, return_dict=True):
        images = list(super().forward(torch.stack(x), t).unbind())
        return SimpleDict(sample=images) if return_dict else (images,)


class SimpleDict(dict):
    """As diffusers' outputs: takes an integer too."""

    def __getitem__(self, key):
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


@pytest.mark.parametrize("return_dict", [False, True])
@pytest.mark.parametrize("single", [False, True])
def test_zimage_returns_a_list(return_dict, single):
    scheduler = FlowMatchEulerDiscreteScheduler()

    def make():
        return ZImageTransformer2DModel().double()

    def call(model):
        t = 1 - S[1:2] if single else 1 - S
        return torch.stack(model(list(X), t, None, return_dict)[0])

    weight = min_snr(S[1:2] if single else S)
    assert_means(make, call, weight, scheduler)
    weight = weight.expand(4, 1, 1, 1).clone()
    weight[2:] = 1
    assert_means(make, call, weight, scheduler, sample_mask="first_half")


def test_timestep_comes_before_the_adapter():
    scheduler = FlowMatchEulerDiscreteScheduler()

    def told(hidden_states, timestep):
        return 1000 * (1 - timestep)

    assert_means(
        lambda: stand_in("FluxTransformer2DModel"),
        lambda model: model(X, 1 - S),
        min_snr(S),
        scheduler,
        timestep=told,
    )


# the classes ----------------------------------------------------------------------------------------------------------


def class_named(name):
    return WuerstchenPrior if name == "WuerstchenPrior" else getattr(diffusers, name)


@pytest.mark.parametrize("name", sorted(set(ADAPTERS) - IN_EXAMPLES_ONLY))
def test_each_class_takes_its_timestep_where_the_adapter_says(name):
    cls, argument = class_named(name), ADAPTERS[name].argument
    assert issubclass(cls, nn.Module)
    model = object.__new__(cls)
    position = position_of(model, argument)
    arguments = [object() for _ in range(position + 1)]
    bound = inspect.signature(cls.forward).bind_partial(model, *arguments)
    assert bound.arguments[argument] is arguments[position]
    named_too = inspect.signature(cls.forward).bind_partial(model, **{argument: arguments[0]})
    assert named_too.arguments[argument] is arguments[0]
    assert adapter_of(model) is ADAPTERS[name]
    assert refusal_of(model) is None
    assert adapter_of(object.__new__(type("Mine", (cls,), {}))) is ADAPTERS[name]


def test_what_is_in_examples_only_is_not_in_diffusers():
    assert not [name for name in IN_EXAMPLES_ONLY if hasattr(diffusers, name)]
    assert set(ADAPTERS) >= IN_EXAMPLES_ONLY


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_each_refused_class_exists(name):
    cls = getattr(diffusers, name)
    assert refusal_of(object.__new__(cls)) == REFUSED[name]
    assert adapter_of(object.__new__(cls)) is None


CONTROLNETS = sorted(n for n in dir(diffusers) if "ControlNet" in n and n.endswith("Model") and n not in ADAPTERS)


@pytest.mark.parametrize("name", [*CONTROLNETS, "T2IAdapter"])
def test_what_returns_residuals_is_refused(name):
    assert "attach to the denoiser that it steers" in refusal_of(object.__new__(getattr(diffusers, name)))


def test_there_are_controlnets():
    assert len(CONTROLNETS) > 5


def test_a_class_that_is_not_known_has_no_adapter_and_no_position():
    assert adapter_of(nn.Linear(1, 1)) is None
    assert refusal_of(nn.Linear(1, 1)) is None
    assert position_of(nn.Linear(1, 1), "timestep") is None
