"""``attach``: the gradients of an unmodified loop are those of an explicitly weighted one."""

import pytest
import torch
from attaching import (
    F64,
    FLOW,
    INDICES,
    SIGMAS,
    X,
    Y,
    assert_weighted,
    attach,
    batch,
    cases,
    denoiser,
    distance,
    expected,
    gradient,
    output,
    train,
    unet,
    weights,
)
from diffusers import DDPMScheduler
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from snrweights.densities import Normal

T = INDICES

# every prediction type, weighting and loss ----------------------------------------------------------------------------

WEIGHTINGS = {
    "min_snr": {"method": "min_snr", "gamma": 5.0},
    "smoothed_kl": {"method": "smoothed_kl", "tau": 0.2},
    "soft_min_snr": {"method": "soft_min_snr", "gamma": 4.0},
    "mean": {"method": "min_snr", "normalize": "mean"},
    "density": {"method": "sigmoid", "density": Normal(0.0, 4.0), "clamp_max": 50.0},
}
SCRIPTS = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=F64).reshape(-1, 1, 1, 1)  # a weight that a script itself applies

# what a script computes, and the error of each element in it
LOSSES = {
    "mse": (F.mse_loss, lambda p, y: (p - y).square()),
    "huber": (lambda p, y: F.huber_loss(p, y, delta=0.3), lambda p, y: F.huber_loss(p, y, reduction="none", delta=0.3)),
    "l1": (F.l1_loss, lambda p, y: (p - y).abs()),
    "mean over each, then over all": (
        lambda p, y: F.mse_loss(p, y, reduction="none").mean(dim=[1, 2, 3]).mean(),
        lambda p, y: (p - y).square(),
    ),
    "flow scripts'": (
        lambda p, y: torch.mean((SCRIPTS * (p - y) ** 2).reshape(len(p), -1), 1).mean(),
        lambda p, y: SCRIPTS * (p - y).square(),
    ),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("case", cases())
def test_gradients_are_those_of_the_weighted_loss(case, weighting, loss):
    scheduler, t = cases()[case]
    options, (whole, elements) = WEIGHTINGS[weighting], LOSSES[loss]
    model = denoiser()
    (weights(t, scheduler, **options) * elements(model(X, t), Y)).mean().backward()
    wanted = gradient(model)
    model.zero_grad()
    whole(model(X, t), Y).backward()
    plain = gradient(model)
    attach(model, scheduler, **options, on_double_weighting="ignore")  # the scripts' loss has weights of its own
    model.zero_grad()
    value = whole(model(X, t), Y)
    value.backward()
    assert_weighted(gradient(model), wanted, plain)
    assert value.item() == whole(denoiser()(X, t), Y).item()  # what is printed is the unweighted loss


@pytest.mark.parametrize("case", cases())
def test_a_unet_with_min_snr_as_it_is_written_in_the_paper(case):
    scheduler, t = cases()[case]
    if case == "flow":
        s = FLOW / 1000
        snr = ((1 - s) / s) ** 2
        weight = snr.clamp(max=5) * s**2
    elif case == "edm":
        snr = SIGMAS**-2
        weight = snr.clamp(max=5) * (0.5 * SIGMAS) ** 2 / (SIGMAS**2 + 0.25)
    else:
        snr = (scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)).double()[t]
        weight = snr.clamp(max=5) / {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones(4)}[case]
    assert snr.max() > 5 > snr.min()
    model = unet()
    attach(model, scheduler, gamma=5.0)
    wanted = train(unet(), t, weight.reshape(-1, 1, 1, 1))
    assert_weighted(train(model, t), wanted, train(unet(), t), tolerance=2e-4)  # the scheduler's table is float32
    assert_weighted(train(model, t), *expected(unet, t, scheduler))


# how loops call the model ---------------------------------------------------------------------------------------------


def test_gradient_accumulation():
    model, scheduler = denoiser(), DDPMScheduler()
    wanted = sum(train(model, t, weights(t, scheduler)) for t in (T, T.flip(0)))
    plain = sum(train(model, t) for t in (T, T.flip(0)))
    attach(model, scheduler)
    model.zero_grad()
    for t in (T, T.flip(0)):
        (model(X, t) - Y).square().mean().backward()
    assert_weighted(gradient(model), wanted, plain)


def test_two_forwards_before_one_backward():
    model, scheduler = denoiser(), DDPMScheduler()
    wanted = sum(train(model, t, weights(t, scheduler)) for t in (T, T.flip(0)))
    plain = sum(train(model, t) for t in (T, T.flip(0)))
    attach(model, scheduler)
    model.zero_grad()
    first, second = model(X, T), model(X, T.flip(0))
    ((first - Y).square().mean() + (second - Y).square().mean()).backward()
    assert_weighted(gradient(model), wanted, plain)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_the_whole_model(reentrant):
    model, scheduler = unet(), DDPMScheduler()
    attach(model, scheduler)
    x = X.clone().requires_grad_()

    def call(_, t):
        return checkpoint(model, x, t, None, False, use_reentrant=reentrant)

    assert_weighted(train(model, T, call=call), *expected(unet, T, scheduler))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_inside_the_model(reentrant):
    model, scheduler = unet(), DDPMScheduler()
    calls = []

    def counted(module, *args):
        calls.append(module)
        return checkpoint(module, *args, use_reentrant=reentrant)

    model.enable_gradient_checkpointing(counted)
    attach(model, scheduler)
    assert_weighted(train(model, T), *expected(unet, T, scheduler))
    assert calls


@pytest.mark.parametrize("mask", ["first_half", lambda rows: torch.tensor([True, True, False, False])])
def test_prior_preservation_weighs_the_instances_only(mask):
    t, scheduler = T[[0, 2, 1, 3]], DDPMScheduler()

    def both(model, weight):
        instances, classes = (weight * (model(X, t) - Y).square()).chunk(2)
        model.zero_grad()
        (instances.mean() + 0.7 * classes.mean()).backward()
        return gradient(model)

    weight = weights(t, scheduler)
    everywhere, plain = both(denoiser(), weight), both(denoiser(), torch.ones_like(weight))
    weight[2:] = 1
    wanted = both(denoiser(), weight)
    model = denoiser()
    attach(model, scheduler, sample_mask=mask)
    actual = both(model, torch.ones_like(weight))
    assert_weighted(actual, wanted, plain)
    assert distance(everywhere, wanted) > 0.05


@pytest.mark.parametrize("wrong", [torch.ones(3, dtype=torch.bool), torch.ones(4, 1, dtype=torch.bool), torch.ones(4)])
def test_a_mask_of_another_shape_or_dtype_is_an_error(wrong):
    model = denoiser()
    attach(model, DDPMScheduler(), sample_mask=lambda rows: wrong)
    with pytest.raises(ValueError, match=r"`sample_mask` must return a bool tensor of shape \(4,\), got \(") as raised:
        model(X, T)
    assert f"{tuple(wrong.shape)} {wrong.dtype}" in str(raised.value)


def test_repeated_rows():
    model, t, scheduler = denoiser(), T[[0, 2]].repeat(2), DDPMScheduler()
    attach(model, scheduler)
    assert_weighted(train(model, t), *expected(denoiser, t, scheduler))


def test_a_learned_variance_that_the_loss_leaves_out():
    def run(model, weight):
        model.zero_grad()
        prediction, _ = model(X.expand(-1, 3, -1, -1), T).sample.chunk(2, dim=1)
        (weight * (prediction - Y).square()).mean().backward()
        return gradient(model)

    def make():
        return unet(in_channels=3, out_channels=6)

    scheduler, model = DDPMScheduler(variance_type="learned_range"), make()
    attach(model, scheduler)
    actual = run(model, 1.0)
    assert_weighted(actual, run(make(), weights(T, scheduler)), run(make(), 1.0))


@pytest.mark.parametrize("t", [20, torch.tensor(20), torch.tensor([20]), torch.tensor([[20]])], ids=repr)
@pytest.mark.parametrize("rows", [1, 4])
def test_one_timestep_for_all(t, rows):
    scheduler, (x, y) = DDPMScheduler(), batch(rows)
    call = t if not isinstance(t, torch.Tensor) or t.ndim < 2 else t[0]

    def run(model, weight):
        model.zero_grad()
        (weight * (output(model(x, call)) - y).square()).mean().backward()
        return gradient(model)

    model = unet()
    attach(model, scheduler, timestep=lambda sample, timestep: t)
    assert_weighted(run(model, 1.0), run(unet(), weights(20, scheduler)), run(unet(), 1.0))


@pytest.mark.parametrize(
    "call",
    [
        lambda model, x, t: model(x, t).sample,
        lambda model, x, t: model(x, t, return_dict=False)[0],
        lambda model, x, t: model(x, timestep=t).sample,
        lambda model, x, t: model(timestep=t, sample=x).sample,
        lambda model, x, t: model(x, t.int()).sample,
        lambda model, x, t: model(x, t.double()).sample,
        lambda model, x, t: dict(model(x, t))["sample"],
        lambda model, x, t: model(x.contiguous(memory_format=torch.channels_last), t).sample,
    ],
)
def test_ways_to_call_the_model(call):
    model, scheduler = unet(), DDPMScheduler()
    attach(model, scheduler)
    wanted = expected(unet, T, scheduler)
    assert_weighted(train(model, T, call=lambda x, t: call(model, x, t)), *wanted)


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8])
def test_timesteps_of_a_small_integer_type(dtype):
    scheduler, model = DDPMScheduler(), denoiser()
    t = torch.tensor([5, 50, 100, 250]).to(dtype)
    attach(model, scheduler)
    assert_weighted(train(model, t), *expected(denoiser, t, scheduler))


@pytest.mark.parametrize(
    "form",
    [
        lambda p: (p, None),
        lambda p: {"sample": p, "aux": p.sum()},
        lambda p: ((p, p.detach()), 3),
    ],
)
def test_forms_of_output(form):
    model, scheduler = denoiser(form=form), DDPMScheduler()
    attach(model, scheduler)

    def call(x, t):
        result = model(x, t)
        result = result["sample"] if isinstance(result, dict) else result[0]
        return result if isinstance(result, torch.Tensor) else result[0]

    assert_weighted(train(model, T, call=call), *expected(denoiser, T, scheduler))


def test_an_output_without_a_tensor_is_an_error():
    model = denoiser(form=lambda p: ("no tensor", p))
    attach(model, DDPMScheduler())
    with pytest.raises(TypeError, match=r"No prediction found in an output of type tuple: it begins with <class 'str'"):
        model(X, T)


IN_PLACE = {
    "scaled": lambda p: p.mul_(3.0),
    "less the target": lambda p: p.sub_(Y),
    "a row blanked": lambda p: p[:, :, 0].zero_(),
}


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("change", IN_PLACE)
def test_an_output_that_the_script_modifies_in_place(change, view):
    scheduler = DDPMScheduler()

    def run(model, weight):
        prediction = model(X, T)
        IN_PLACE[change](prediction)
        model.zero_grad()
        (weight * (prediction - Y).square()).mean().backward()
        return gradient(model)

    def make():  # transformers end in a reshape
        return denoiser(form=(lambda p: p.view(4, 1, 8, 8)) if view else (lambda p: p))

    model = make()
    attach(model, scheduler)
    assert_weighted(run(model, 1.0), run(make(), weights(T, scheduler)), run(make(), 1.0))


def test_a_graph_that_is_kept_is_weighted_each_time():
    model, scheduler = denoiser(), DDPMScheduler()
    wanted, plain = expected(denoiser, T, scheduler)
    attach(model, scheduler)
    loss = (model(X, T) - Y).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()
    assert_weighted(gradient(model), 2 * wanted, 2 * plain)


def test_gradients_in_eval_mode():
    model, scheduler = unet(), DDPMScheduler()
    attach(model.eval(), scheduler)
    assert_weighted(train(model, T), *expected(unet, T, scheduler))


def test_a_gradient_by_autograd_grad():
    model, scheduler = denoiser(), DDPMScheduler()
    attach(model, scheduler)
    loss = (model(X, T) - Y).square().mean()
    found = torch.autograd.grad(loss, tuple(model.parameters()))
    assert_weighted(torch.cat([g.flatten() for g in found]), *expected(denoiser, T, scheduler))


def test_functional_calls():
    model, scheduler = denoiser(), DDPMScheduler()
    wanted, plain = expected(denoiser, T, scheduler)
    attach(model, scheduler)
    parameters = dict(model.named_parameters())
    found = torch.func.grad(
        lambda parameters: (torch.func.functional_call(model, parameters, (X, T)) - Y).square().mean()
    )(parameters)
    assert_weighted(torch.cat([g.flatten() for g in found.values()]).detach(), wanted, plain)


def test_an_error_in_forward_leaves_the_next_step_right():
    model, scheduler = denoiser(), DDPMScheduler()
    attach(model, scheduler)
    with pytest.raises(RuntimeError):
        model(X[:, :, :0], T[:3])
    assert_weighted(train(model, T), *expected(denoiser, T, scheduler))


def test_hooks_of_others_go_on_working():
    model, scheduler, seen = denoiser(), DDPMScheduler(), []
    model.register_forward_hook(lambda module, args, result: result.mul(1.0))
    model.register_forward_pre_hook(lambda module, args: seen.append("before"))
    attach(model, scheduler)
    model.register_forward_hook(lambda module, args, result: result.add(0.0))
    model.register_full_backward_hook(lambda module, into, out: seen.append("backward"))
    x = X.clone().requires_grad_()
    found = train(model, T, call=lambda _, t: model(x, t))
    assert_weighted(found, *expected(denoiser, T, scheduler))
    assert seen == ["before", "backward"]
