"""``attach(sampler=...)``: timesteps redrawn inside ``add_noise``, and gradients whose mean stays what it was."""

import copy
import gc
import math
import pickle

import pytest
import torch
from attaching import F64, Denoiser, assert_weighted, denoiser, distance, given, gradient, unet, weights
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from safetensors.torch import load, save
from snrweights.integrations.attachment import attachments
from snrweights.integrations.audit import DoubleWeightingError
from torch._dynamo.utils import counters

import snrweights
from snrweights import ImportanceSampler, TimestepSampler, per_sample_mse
from snrweights.densities import Normal
from snrweights.samplers import Draw

STEPS, ROWS = 12, 4
GENERATOR = torch.Generator().manual_seed(5)
X0, NOISE = torch.randn(2, ROWS, 1, 8, 8, generator=GENERATOR, dtype=F64)


def ddpm(**options):
    """A schedule of few timesteps, which can be gone through one by one."""
    options = {"num_train_timesteps": STEPS, "beta_start": 0.01, "beta_end": 0.5, **options}
    return DDPMScheduler(**options)


def attach(model, scheduler, method="min_snr", **options):
    options = {"sampler": "gradient", "on_double_weighting": "ignore", "dtype": F64, **options}
    if isinstance(model, Denoiser):
        options = {"timestep": given, **options}
    return snrweights.attach(model, scheduler, method, **options)


def own_draw(rows=ROWS):
    """Timesteps of the script; those of ``replayed`` samplers never are."""
    return torch.zeros(rows, dtype=torch.int64)


def loss_of(model, scheduler, t=None):
    """A batch of an unmodified loop, its loss not yet differentiated; return it and the timesteps."""
    t = own_draw() if t is None else t
    noisy = scheduler.add_noise(X0[: len(t)], NOISE[: len(t)], t)
    return torch.nn.functional.mse_loss(model(noisy, t), NOISE[: len(t)]), t


def step(model, scheduler, t=None):
    loss, t = loss_of(model, scheduler, t)
    model.zero_grad()
    loss.backward()
    return t


def explicit(scheduler, t, weight):
    """Return the gradients of a loop with explicit weights (B,) at timesteps t."""
    model = denoiser()
    noisy = type(scheduler).add_noise(scheduler, X0, NOISE, t)
    losses = per_sample_mse(model(noisy, t), NOISE)
    (weight * losses).mean().backward()
    return gradient(model)


def skewed(scheduler, rule="gradient", bins=STEPS, **options):
    """A sampler that has seen losses which differ by noise level, and draws accordingly."""
    sampler = ImportanceSampler(scheduler, rule, bins=bins, warm_up=1, refresh_every=1, **options)
    t = torch.arange(STEPS).repeat_interleave(10)
    sampler.update(t, 1.0 + (t % 4) * (4.0 + (torch.arange(len(t)) % 10)))
    sampler.refresh()
    return sampler


def probabilities(sampler):
    """Return q of each timestep, which has a bin of its own; checked by a grid of uniform numbers."""
    q = sampler.probabilities()[1].flip(0)
    u = (torch.arange(6000, dtype=F64) + 0.5) / 6000
    torch.testing.assert_close(sampler.at(u).t.bincount(minlength=STEPS) / 6000, q.float(), rtol=0, atol=1 / 5000)
    return q


def replaying(sampler, t):
    """Let a sampler draw this one timestep for all, under its own q."""
    t = torch.full((ROWS,), t)
    sampler.draw = lambda batch_size, *, index=None, device="cpu": Draw(t, sampler.weight(t))


# the gradient ---------------------------------------------------------------------------------------------------------

METHODS = {
    "none": (None, {}),
    "min_snr": ("min_snr", {"gamma": 1.0}),
    "auto": ("auto", {"data_variance": 0.3}),
}


@pytest.mark.parametrize("rule", ["gradient", "loss_second_moment", "variance"])
@pytest.mark.parametrize("name", METHODS)
def test_the_expected_gradient_is_that_of_uniform_draws(name, rule):
    """The sum over all timesteps, with their probabilities, of what one draw gives."""
    (method, hp), scheduler = METHODS[name], ddpm()
    sampler = skewed(scheduler, rule)
    q = probabilities(sampler)
    assert q.max() > 1.5 * q.min()
    model = denoiser()
    attach(model, scheduler, method, sampler=sampler, **hp)
    found, wanted, plain = 0, 0, 0
    for t in range(STEPS):
        replaying(sampler, t)
        assert step(model, scheduler).tolist() == [t] * ROWS
        all_t = torch.full((ROWS,), t)
        weight = torch.ones(ROWS) if method is None else weights(all_t, scheduler, method=method, **hp).flatten()
        found = found + q[t] * gradient(model)
        wanted = wanted + explicit(ddpm(), all_t, weight) / STEPS
        plain = plain + q[t] * explicit(ddpm(), all_t, weight)
    assert distance(found, wanted) < 1e-6  # the factors are float32
    assert distance(plain, wanted) > 0.02


def test_auto_over_a_density_is_the_sigmoid_objective():
    """Without a sampler too: the weight for what the script draws."""
    scheduler, density, t = DDPMScheduler(), Normal(0.0, 3.0), torch.tensor([50, 200, 500, 800])
    log_snr = snrweights.as_schedule(scheduler).log_snr(t)
    # w_KG of epsilon per unit of log-SNR, over the density that the timesteps have
    weight = torch.sigmoid(-log_snr - math.log(0.3)) / density.log_prob(log_snr).exp()
    wanted, plain, model = explicit(scheduler, t, weight), explicit(scheduler, t, torch.ones(4)), denoiser()
    attach(model, scheduler, "auto", data_variance=0.3, density=density, sampler=None)
    torch.nn.functional.mse_loss(model(scheduler.add_noise(X0, NOISE, t), t), NOISE).backward()
    assert_weighted(gradient(model), wanted, plain)


@pytest.mark.parametrize("mask", ["first_half", lambda rows: torch.tensor([False, True, True, False])])
def test_what_is_not_weighted_has_the_factor_too(mask):
    scheduler = ddpm()
    sampler, model = skewed(scheduler), denoiser()
    attach(model, scheduler, gamma=1.0, sampler=sampler, sample_mask=mask)
    t = step(model, scheduler)
    factor = sampler.weight(t)
    assert factor.max() > 1.1 * factor.min()
    selected = torch.arange(ROWS) < 2 if mask == "first_half" else mask(ROWS)
    weight = torch.where(selected, weights(t, scheduler, gamma=1.0).flatten(), 1.0)
    wanted = explicit(scheduler, t, weight * factor)
    assert_weighted(gradient(model), wanted, explicit(scheduler, t, weight))


def test_each_batch_has_the_q_that_it_was_drawn_with():
    """The backward pass of one comes after the draw of the next, which has computed q anew."""
    scheduler = ddpm()
    sampler, model = skewed(scheduler), denoiser()
    handle = attach(model, scheduler, None, sampler=sampler)
    first, t = loss_of(model, scheduler)
    before = sampler.weight(t)
    sampler.update(torch.arange(STEPS), torch.linspace(0, 900, STEPS, dtype=F64))
    second, later = loss_of(model, scheduler)
    after = sampler.weight(later)
    assert not torch.allclose(sampler.weight(t), before, rtol=0.1)
    (first + second).backward()
    wanted = explicit(scheduler, t, before) + explicit(scheduler, later, after)
    assert_weighted(gradient(model), wanted, explicit(scheduler, t, sampler.weight(t)), tolerance=1e-9)
    assert handle.sampler is sampler


def test_checkpointing_of_the_whole_model_recomputes_with_the_q_of_the_draw():
    scheduler = ddpm()
    sampler, inner = skewed(scheduler), denoiser()
    attach(inner, scheduler, None, sampler=sampler)

    def model(x, t):
        return torch.utils.checkpoint.checkpoint(inner, x.requires_grad_(), t, use_reentrant=True)

    first, t = loss_of(model, scheduler)
    before = sampler.weight(t)
    sampler.update(torch.arange(STEPS), torch.linspace(0, 900, STEPS, dtype=F64))
    loss_of(model, scheduler)
    first.backward()
    assert not torch.allclose(sampler.weight(t), before, rtol=0.1)
    assert distance(gradient(inner), explicit(scheduler, t, before)) < 1e-9


# what the script sees -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "dtype"),
    [
        (DDPMScheduler, torch.int64),
        (DDIMScheduler, torch.int32),
        (EulerDiscreteScheduler, torch.float32),  # as its own timesteps are
    ],
)
def test_the_scripts_own_tensor_holds_what_was_drawn(cls, dtype):
    scheduler, model = cls(), denoiser()
    sampler = TimestepSampler(scheduler, Normal(0.0, 2.0), seed=3)
    wanted = TimestepSampler(scheduler, Normal(0.0, 2.0), seed=3).draw(ROWS).t
    attach(model, scheduler, None, sampler=sampler)
    t = torch.zeros(ROWS, dtype=dtype)
    noisy = scheduler.add_noise(X0, NOISE, timesteps=t)
    assert t.dtype == dtype
    assert t.tolist() == wanted.tolist()
    assert torch.equal(noisy, cls().add_noise(X0, NOISE, wanted.to(dtype)))
    model(noisy, t).sum().backward()


def test_all_that_is_noised_with_one_tensor_has_one_draw():
    scheduler, model = ddpm(), denoiser()
    handle, t = attach(model, scheduler), own_draw()
    noisy = scheduler.add_noise(X0, NOISE, t)
    drawn = t.clone()
    again = scheduler.add_noise(X0, NOISE, t.view(-1))
    assert torch.equal(t, drawn)
    assert torch.equal(noisy, again)
    t.zero_()  # the next draw of a script that keeps one buffer
    scheduler.add_noise(X0, NOISE, t)
    assert t.any()
    assert handle.sampler.drawn == 2


def test_pipelines_noise_undisturbed():
    scheduler, model = ddpm(), denoiser()
    handle, t = attach(model, scheduler), own_draw()
    with torch.no_grad():
        model(scheduler.add_noise(X0, NOISE, t), t)
    assert not t.any()
    assert handle.sampler.drawn == 0


@pytest.mark.parametrize("rows", [1, 3])
def test_one_timestep_for_the_whole_batch(rows):
    scheduler = ddpm()
    sampler, model = skewed(scheduler), denoiser()
    attach(model, scheduler, None, sampler=sampler)
    t = torch.zeros(1, dtype=torch.int64)
    noisy = scheduler.add_noise(X0[:rows], NOISE[:rows], t)
    (model(noisy, t) - NOISE[:rows]).square().mean().backward()
    plain = denoiser()
    (plain(noisy, t) - NOISE[:rows]).square().mean().backward()
    assert distance(gradient(model), sampler.weight(t) * gradient(plain)) < 1e-9


def test_a_unet_and_a_smaller_last_batch():
    scheduler, model = ddpm(), unet()
    handle = attach(model, scheduler, track=True)
    for rows in (4, 4, 2, 4):
        t = own_draw(rows)
        noisy = scheduler.add_noise(X0[:rows], NOISE[:rows], t)
        (model(noisy, t).sample - NOISE[:rows]).square().mean().backward()
    assert int(handle.tracker.compute().count.sum()) == 14
    assert int(handle.sampler.evidence.compute().count.sum()) > 0


# what it learns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("method", ["min_snr", None])
def test_it_learns_the_losses_and_the_tracker_does_not_see_its_factors(method, scale):
    scheduler = ddpm()
    sampler, model, updates = skewed(scheduler), denoiser(), []
    handle = attach(model, scheduler, method, sampler=sampler, track=True, loss_scale=scale)
    sampler.update = lambda t, loss, **more: updates.append({"t": t, "loss": loss, **more})
    replaying(sampler, 7)
    loss, t = loss_of(model, scheduler)
    assert sampler.weight(t[:1]) != 1
    (scale * loss).backward()
    losses = per_sample_mse(denoiser()(ddpm().add_noise(X0, NOISE, t), t), NOISE).detach()
    [seen] = updates
    assert torch.equal(seen["t"], t)
    torch.testing.assert_close(seen["loss"], losses, rtol=1e-10, atol=0)
    torch.testing.assert_close(seen["gradient_square"], losses * 4 / X0[0].numel(), rtol=1e-10, atol=0)
    if method is None:
        assert seen["weight"] is None
    else:
        torch.testing.assert_close(seen["weight"], weights(t, scheduler).flatten(), rtol=1e-10, atol=0)
    tracked = handle.tracker.compute()
    torch.testing.assert_close(tracked.mean[tracked.count > 0], losses.mean()[None], rtol=1e-10, atol=0)


def test_it_goes_on_where_it_was_saved():
    def run(model, scheduler, steps):
        return torch.stack([step(model, scheduler) for _ in range(steps)])

    model, scheduler = denoiser(), ddpm()
    attach(model, scheduler)
    whole = run(model, scheduler, 40)

    model, scheduler = denoiser(), ddpm()
    handle = attach(model, scheduler)
    assert torch.equal(run(model, scheduler, 25), whole[:25])
    state = load(save({name: value.contiguous() for name, value in handle.sampler.state_dict().items()}))

    model, scheduler = denoiser(), ddpm()
    handle = attach(model, scheduler)
    handle.sampler.load_state_dict(state)
    assert torch.equal(run(model, scheduler, 15), whole[25:])


@pytest.mark.parametrize("density", [None, Normal(0.0, 2.0)])
def test_a_rule_is_a_sampler_for_the_density_of_the_script(density):
    scheduler, model = ddpm(), denoiser()
    torch.manual_seed(11)
    handle = attach(model, scheduler, None, sampler="variance", density=density)
    wanted = ImportanceSampler(scheduler, "variance", density=density, seed=11)
    assert handle.sampler.rule is wanted.rule
    assert torch.equal(step(model, scheduler), wanted.draw(ROWS).t)
    mass, expected = handle.sampler.probabilities()[0], wanted.probabilities()[0]
    assert torch.equal(mass, expected)


def test_attach_says_how_it_draws():
    scheduler, model = ddpm(), denoiser()
    handle = attach(model, scheduler)
    assert f"drawn by {handle.sampler!r}" in repr(handle)
    assert handle.report().as_dict()["sampler"] == repr(handle.sampler)
    assert snrweights.attach(denoiser(), scheduler, timestep=given).report().sampler is None


# taking it off, and copies --------------------------------------------------------------------------------------------


def assert_as_new(scheduler):
    assert "add_noise" not in vars(scheduler)
    assert scheduler.add_noise.__func__ is type(scheduler).add_noise
    t = own_draw()
    scheduler.add_noise(X0, NOISE, t)
    assert not t.any()


def test_detach_leaves_the_scheduler_as_it_was():
    scheduler, model = ddpm(), denoiser()
    before = dict(vars(scheduler))
    handle = attach(model, scheduler)
    step(model, scheduler)
    handle.detach()
    assert vars(scheduler) == before
    assert_as_new(scheduler)
    handle.detach()
    attach(model, scheduler)


def test_detach_brings_back_what_somebody_else_had_put_there():
    scheduler, model, calls = ddpm(), denoiser(), []

    def own(*args, **kwargs):
        calls.append(args)
        return DDPMScheduler.add_noise(scheduler, *args, **kwargs)

    scheduler.add_noise = own
    with attach(model, scheduler):
        calls.clear()
        step(model, scheduler)
        assert len(calls) == 1
    assert scheduler.add_noise is own


def test_a_backward_pass_after_detach_has_its_factor():
    scheduler = ddpm()
    sampler, model = skewed(scheduler), denoiser()
    handle = attach(model, scheduler, None, sampler=sampler)
    loss, t = loss_of(model, scheduler)
    handle.detach()
    loss.backward()
    assert distance(gradient(model), explicit(scheduler, t, sampler.weight(t))) < 1e-9


def test_a_model_that_is_gone_leaves_the_scheduler():
    scheduler, model = ddpm(), denoiser()
    attach(model, scheduler)
    assert "add_noise" in vars(scheduler)
    del model
    gc.collect()
    assert_as_new(scheduler)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))])
def test_a_copy_of_the_scheduler_draws_nothing(how):
    scheduler, model = ddpm(), denoiser()
    handle = attach(model, scheduler)
    twin = how(scheduler)
    t = own_draw()
    noisy = twin.add_noise(X0, NOISE, t)
    assert not t.any()
    assert torch.equal(noisy, ddpm().add_noise(X0, NOISE, t))
    assert twin.add_noise.__self__ is twin
    assert handle.sampler.drawn == 0
    assert ddpm().config == DDPMScheduler.from_config(scheduler.config).config


def test_a_config_that_the_script_registers_counts():
    scheduler, model = ddpm(), denoiser()
    sampler = skewed(scheduler)
    attach(model, scheduler, gamma=1.0, sampler=sampler)
    step(model, scheduler)
    scheduler.register_to_config(prediction_type="v_prediction")
    t = step(model, scheduler)
    weight = weights(t, scheduler, gamma=1.0, prediction_type="v_prediction").flatten()
    assert distance(gradient(model), explicit(scheduler, t, weight * sampler.weight(t))) < 1e-9


def test_a_copy_of_the_model_has_the_draws_of_the_original():
    scheduler, model = ddpm(), denoiser()
    sampler = skewed(scheduler)
    attach(model, scheduler, None, sampler=sampler)
    twin = copy.deepcopy(model)
    t = step(twin, scheduler)
    assert distance(gradient(twin), explicit(scheduler, t, sampler.weight(t))) < 1e-9
    attachments(twin)[0].detach()
    assert step(model, scheduler).any()
    twin = copy.deepcopy(model)
    attachments(model)[0].detach()
    t = step(twin, scheduler)  # of its own draws: nothing redraws
    assert not t.any()
    assert distance(gradient(twin), explicit(scheduler, t, torch.ones(ROWS))) < 1e-9


def test_a_model_that_is_pickled_with_it_draws_nothing():
    scheduler, model = ddpm(), unet()
    attach(model, scheduler)
    t = own_draw()
    (model(scheduler.add_noise(X0, NOISE, t), t).sample - NOISE).square().mean().backward()
    twin = pickle.loads(pickle.dumps(model))
    t = torch.arange(ROWS)
    (twin(ddpm().add_noise(X0, NOISE, t), t).sample - NOISE).square().mean().backward()
    fresh = unet()
    losses = per_sample_mse(fresh(ddpm().add_noise(X0, NOISE, t), t).sample, NOISE)
    (weights(t, ddpm()).flatten() * losses).mean().backward()
    assert distance(gradient(twin), gradient(fresh)) < 1e-9


def test_a_weight_of_the_scripts_own_is_found_nevertheless():
    scheduler, model = DDPMScheduler(), denoiser()
    attach(model, scheduler, on_double_weighting="error")

    def train():
        for _ in range(8):
            t = own_draw()
            noisy = scheduler.add_noise(X0, NOISE, t)
            (weights(t, scheduler).flatten() * per_sample_mse(model(noisy, t), NOISE)).mean().backward()

    with pytest.raises(DoubleWeightingError, match="The script's loss is weighted already"):
        train()


# refusals -------------------------------------------------------------------------------------------------------------


def with_set_timesteps(cls):
    scheduler = cls()
    scheduler.set_timesteps(20)
    return scheduler


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    ("scheduler", "reason"),
    [
        (FlowMatchEulerDiscreteScheduler, "loops that train on FlowMatchEulerDiscreteScheduler mix noise in by"),
        (lambda: "flow", "loops that train on flow mix noise in by themselves"),
        (lambda: "linear", "linear has none; give the scheduler that the loop noises with"),
        (lambda: ddpm().alphas_cumprod, "Tensor has none"),
        (EDMEulerScheduler, "that of EDMEulerScheduler does not take any timestep of a table: draw in the script"),
        (
            lambda: with_set_timesteps(DPMSolverMultistepScheduler),
            "that of this DPMSolverMultistepScheduler does not noise t = [0-9]+ as its table says, nor [0-9]+ more",
        ),
        (
            lambda: with_set_timesteps(EulerDiscreteScheduler),
            "that of this EulerDiscreteScheduler does not noise t = 0 as its table says, nor 999 more",
        ),
    ],
)
def test_schedulers_whose_loops_do_not_call_add_noise_are_refused(scheduler, reason):
    model, scheduler = denoiser(), scheduler()
    options = {"prediction_type": "epsilon"} if isinstance(scheduler, (str, torch.Tensor)) else {}
    with pytest.raises(TypeError, match=f"`sampler` redraws timesteps inside scheduler.add_noise, and {reason}"):
        attach(model, scheduler, **options)
    assert not model._forward_hooks


def test_bad_samplers_are_refused():
    model, scheduler = denoiser(), ddpm()
    rules = r"\['loss_second_moment', 'gradient', 'variance'\]"
    with pytest.raises(ValueError, match=rf"`sampler` must be a TimestepSampler or one of {rules}, got 'uniform'"):
        attach(model, scheduler, sampler="uniform")
    with pytest.raises(ValueError, match=r"`sampler` TimestepSampler.* has another schedule than the scheduler"):
        attach(model, scheduler, sampler=TimestepSampler("linear"))
    with pytest.raises(ValueError, match=r"\['density'\] go with a method, and `method` is None"):
        attach(model, scheduler, None, sampler=None, density="cosine")
    with pytest.raises(ValueError, match=r"\['gamma', 'clamp_max'\] go with a method"):
        attach(model, scheduler, None, gamma=3.0, clamp_max=2.0)
    assert_as_new(scheduler)


def test_two_models_on_one_scheduler_are_refused():
    scheduler, model = ddpm(), denoiser()
    attach(model, scheduler)
    with pytest.raises(ValueError, match=r"DDPMScheduler.add_noise redraws timesteps already, for another model"):
        attach(denoiser(), scheduler)


def test_processes_that_are_not_connected_yet_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"torch.distributed is not initialised: attach after `Accelerator"):
        attach(denoiser(), ddpm())


def noised(scheduler, t):
    return scheduler.add_noise(X0, NOISE, t)


def without_grad(scheduler, t):
    with torch.no_grad():
        return noised(scheduler, t)


@pytest.mark.parametrize(
    ("noise", "reason"),
    [
        (lambda scheduler, t: X0, "the script has not called it"),
        (without_grad, "it was called without gradients only"),
        (
            lambda scheduler, t: noised(scheduler, t[0]),
            r"it was called with timesteps of shape \(\), not with a tensor",
        ),
        (
            lambda scheduler, t: noised(scheduler, t[:1].expand(ROWS)),
            "it was called with one timestep that is expanded",
        ),
        (lambda scheduler, t: noised(scheduler, scheduler.timesteps[:4]), "a part of the scheduler's own table"),
        (lambda scheduler, t: noised(DDPMScheduler(), t), "the script has not called it"),
    ],
)
def test_a_script_that_does_not_noise_with_it_is_told_why(noise, reason):
    scheduler, model, t = ddpm(), denoiser(), torch.tensor([1, 2, 3, 4])
    table = scheduler.timesteps.clone()
    attach(model, scheduler)
    noisy = noise(scheduler, t)
    assert torch.equal(scheduler.timesteps, table)
    assert t.tolist() == [1, 2, 3, 4]
    with pytest.raises(ValueError, match=f"inside DDPMScheduler.add_noise, and .*{reason}"):
        model(noisy, t)


def with_a_copy(scheduler, t):
    return noised(scheduler, t.clone())


def changed_afterwards(scheduler, t):
    noisy = noised(scheduler, t)
    t.copy_((t + 1) % STEPS)
    return noisy


@pytest.mark.parametrize("noise", [with_a_copy, changed_afterwards])
@pytest.mark.parametrize("after", [0, 3])
def test_a_model_that_is_given_other_timesteps_is_an_error(noise, after):
    scheduler, model, t = ddpm(), denoiser(), own_draw()
    attach(model, scheduler)
    for _ in range(after):
        step(model, scheduler)
    noisy = noise(scheduler, t)
    with pytest.raises(ValueError, match=r"given other timesteps than DDPMScheduler.add_noise was: `sampler` redraws"):
        model(noisy, t)


def test_after_the_first_calls_other_timesteps_have_no_gradient():
    """Nothing waits for the device any more; what is wrong shows as NaN."""
    scheduler, model = ddpm(), denoiser()
    attach(model, scheduler)
    for _ in range(8):
        step(model, scheduler)
    assert gradient(model).isfinite().all()
    t = own_draw()
    noisy = noised(scheduler, t)
    model.zero_grad()
    model(noisy, torch.zeros_like(t)).sum().backward()
    assert t.any()
    assert gradient(model).isnan().all()


def test_another_number_of_timesteps_is_an_error():
    scheduler, model, t = ddpm(), denoiser(), own_draw()
    attach(model, scheduler)
    noisy = noised(scheduler, t)
    with pytest.raises(ValueError, match=r"model was given 2 timesteps, and DDPMScheduler.add_noise 4"):
        model(noisy[:2], t[:2])


# torch.compile --------------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


COMPILING = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
    "ignore:Could not look whether .* is weighted already. the model is compiled:UserWarning",
)


@COMPILING
@pytest.mark.usefixtures("nothing_compiled")
def test_a_compiled_model_has_the_factors_without_recompiling():
    scheduler, inner = ddpm(), denoiser()
    sampler = skewed(scheduler)
    handle = attach(inner, scheduler, gamma=1.0, sampler=sampler, track=True)
    model = torch.compile(inner, fullgraph=True, backend="aot_eager")
    updates = sampler.evidence.updates

    def check():
        inner.zero_grad()
        loss, t = loss_of(model, scheduler)
        factor = sampler.weight(t)
        sampler.refresh()
        loss.backward()
        weight = weights(t, scheduler, gamma=1.0).flatten()
        plain = explicit(scheduler, t, weight)
        assert_weighted(gradient(inner), explicit(scheduler, t, weight * factor), plain, tolerance=1e-9)

    check()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(12):
            check()
    assert int(handle.tracker.compute().count.sum()) == 13 * ROWS
    assert sampler.evidence.updates == updates + 13
    assert not counters["graph_break"]


@COMPILING
@pytest.mark.usefixtures("nothing_compiled")
def test_a_compiled_model_that_nothing_was_drawn_for_is_an_error():
    scheduler, inner = ddpm(), denoiser()
    attach(inner, scheduler, None)
    model = torch.compile(inner, backend="aot_eager")
    with pytest.raises(ValueError, match=r"inside DDPMScheduler.add_noise, and the script has not called it"):
        model(X0, own_draw())


def test_timesteps_of_several_batches_drawn_at_once():
    """Rows of one tensor share its memory, and each is a draw of its own."""
    scheduler, model = ddpm(), denoiser()
    drawn = torch.full((3, ROWS), -1)
    with attach(model, scheduler, "min_snr", sampler=TimestepSampler(scheduler, seed=0)):
        for t in drawn.unbind(0):
            noisy = scheduler.add_noise(X0, NOISE, t)
            again = t.clone()
            torch.testing.assert_close(scheduler.add_noise(X0, NOISE, t), noisy)  # drawn once
            assert torch.equal(t, again)
            (model(noisy, t) - NOISE).square().mean().backward()
    assert bool((drawn >= 0).all())
