"""``attach`` with torch.compile, autocast and GradScaler."""

import shutil

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils.operations import convert_outputs_to_fp32
from attaching import (
    F64,
    FLOW,
    INDICES,
    Denoiser,
    X,
    Y,
    assert_weighted,
    attach,
    cases,
    denoiser,
    distance,
    expected,
    given,
    gradient,
    in_epsilon,
    train,
    unet,
    weights,
)
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import snrweights
from snrweights import per_sample_mse

T = INDICES

# torch's own compiler looks at .grad of what is no leaf, as it traces a hook on it
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
    "ignore:Could not look whether .* is weighted already. the model is compiled:UserWarning",
)


# torch.compile --------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(model, backend="aot_eager"):
    # aot_eager traces as inductor does, without the C++ compiler that inductor needs
    return torch.compile(model, fullgraph=True, backend=backend)


def steps_without_recompiling(model, t, steps=3):
    """Train one step that compiles and some that must not; return the gradients of each."""
    found = [train(model, t)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        found += [train(model, t) for _ in range(steps)]
    return found


def test_a_recompilation_would_be_noticed():
    model = compiled(denoiser())
    train(model, T)
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(torch._dynamo.exc.RecompileError):
        train(model, T.double())


@pytest.mark.parametrize("track", [False, True])
@pytest.mark.parametrize("order", ["attached, then compiled", "compiled, then attached", "model.compile()", "in use"])
@pytest.mark.parametrize("case", ["epsilon", "flow"])
def test_gradients_in_one_graph(case, order, track):
    scheduler, t = cases()[case]
    inner, counter = denoiser(), CompileCounterWithBackend("aot_eager")
    wanted, plain = expected(denoiser, t, scheduler)
    if order == "attached, then compiled":
        handle = attach(inner, scheduler, track=track)
        model = compiled(inner, counter)
    elif order == "model.compile()":
        model = inner
        model.compile(fullgraph=True, backend=counter)
        handle = attach(model, scheduler, track=track)
    else:
        model = compiled(inner, counter)
        if order == "in use":
            assert distance(train(model, t), plain) < 1e-10
        handle = snrweights.attach(model, scheduler, dtype=F64, track=track, timestep=given)
    train(model, t)
    graphs = counter.frame_count
    assert graphs > 0
    for found in steps_without_recompiling(model, t):
        assert_weighted(found, wanted, plain)
    assert counter.frame_count == graphs
    assert not counters["graph_break"]
    assert handle.weighted
    if track:
        statistics = handle.tracker.compute()
        loss = in_epsilon(per_sample_mse(denoiser()(X, t), Y).detach(), t, scheduler).flip(0)
        assert statistics.count[statistics.count > 0].tolist() == [5] * 4
        torch.testing.assert_close(statistics.mean[statistics.count > 0], loss, rtol=1e-10, atol=0)
    handle.detach()
    assert distance(train(model, t), plain) < 1e-10


def test_evaluation_in_between_does_not_recompile_the_step():
    inner, scheduler = denoiser(), DDPMScheduler()
    attach(inner, scheduler)
    model = compiled(inner)
    train(model, T)
    with torch.no_grad():
        model(X, T)
    for found in steps_without_recompiling(model, T):
        assert_weighted(found, *expected(denoiser, T, scheduler))


def test_a_last_batch_that_is_smaller():
    def run(model, weight=1.0):
        model.zero_grad()
        (weight * (model(X[:3], T[:3]) - Y[:3]).square()).mean().backward()
        return gradient(model)

    inner, scheduler = denoiser(), DDPMScheduler()
    attach(inner, scheduler)
    model = compiled(inner)
    train(model, T)
    assert_weighted(run(model), run(denoiser(), weights(T[:3], scheduler)), run(denoiser()))


def test_a_compiled_unet_with_all_options():
    inner, scheduler = unet(), DDPMScheduler()
    attach(inner, scheduler, "smoothed_kl", normalize="mean", sample_mask=lambda rows: torch.arange(rows) < 3)
    weight = weights(T, scheduler, method="smoothed_kl", normalize="mean")
    weight[3:] = 1
    plain = train(unet(), T)
    wanted = train(unet(), T, weight)
    for found in steps_without_recompiling(compiled(inner), T):
        assert_weighted(found, wanted, plain)


def test_checkpointing_inside_a_compiled_loop():
    inner, scheduler = denoiser(), DDPMScheduler()
    attach(inner, scheduler)
    step = compiled(lambda x, t: checkpoint(inner, x, t, use_reentrant=False))
    inner.zero_grad()
    (step(X, T) - Y).square().mean().backward()
    assert_weighted(gradient(inner), *expected(denoiser, T, scheduler))


@pytest.mark.parametrize("steps", [0, 2])
def test_a_scheduler_that_changes_under_a_compiled_model(steps):
    inner, scheduler = denoiser(), DDPMScheduler()
    attach(inner, scheduler)
    model = compiled(inner)
    for _ in range(steps):
        train(model, T)
    scheduler.register_to_config(prediction_type="v_prediction")
    assert_weighted(train(model, T), *expected(denoiser, T, scheduler))


def test_a_loss_scale_that_changes_under_a_compiled_model():
    inner, scheduler, scale = denoiser(), DDPMScheduler(), {"now": 1.0}
    handle = attach(inner, scheduler, track=True, loss_scale=lambda: scale["now"])
    model = compiled(inner)
    for scale["now"] in (1.0, 0.5, 0.25):
        (scale["now"] * (model(X, T) - Y).square().mean()).backward()
    statistics = handle.tracker.compute()
    loss = per_sample_mse(denoiser()(X, T), Y).detach().flip(0)
    assert statistics.count[statistics.count > 0].tolist() == [3] * 4
    torch.testing.assert_close(statistics.mean[statistics.count > 0], loss, rtol=1e-10, atol=0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_inductor():
    inner, scheduler = denoiser(), DDPMScheduler()
    attach(inner, scheduler)
    for found in steps_without_recompiling(compiled(inner, "inductor"), T):
        assert_weighted(found, *expected(denoiser, T, scheduler))


# autocast -------------------------------------------------------------------------------------------------------------

X32, Y32 = X.float(), Y.float()


def autocast_step(model, t, dtype, weight=None, scale=1.0):
    """Do a step as scripts do it under plain autocast; the model's output is in half precision."""
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype):
        prediction = model(X32, t)
    error = (prediction.float() - Y32).square()
    (scale * (error if weight is None else weight.float() * error).mean()).backward()
    return gradient(model)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
@pytest.mark.parametrize("case", ["epsilon", "flow"])
def test_autocast_is_as_exact_as_half_precision(case, dtype, tolerance):
    scheduler, t = cases()[case]
    wanted = autocast_step(Denoiser(), t, dtype, weights(t, scheduler))
    plain = autocast_step(Denoiser(), t, dtype)
    model = Denoiser()
    snrweights.attach(model, scheduler, timestep=given)
    assert_weighted(autocast_step(model, t, dtype), wanted, plain, tolerance)


def test_a_model_in_bfloat16():
    model, scheduler = Denoiser().bfloat16(), DDPMScheduler()
    wanted, plain = expected(denoiser, T, scheduler)
    snrweights.attach(model, scheduler, timestep=given)
    (model(X.bfloat16(), T).float() - Y32).square().mean().backward()
    assert gradient(model).dtype == torch.bfloat16
    assert_weighted(gradient(model).double(), wanted, plain, tolerance=0.03)


@pytest.mark.parametrize("rows", [1, 4])
def test_the_weight_is_not_rounded_to_the_gradients_precision(rows):
    """Of one sample as of several: torch demotes what has no dimensions."""
    model, scheduler, seen = Denoiser().bfloat16(), DDPMScheduler(), []
    t = torch.tensor([20, 30, 40, 60])[:rows]
    snrweights.attach(model, scheduler, timestep=given)
    prediction = model(X[:rows].bfloat16(), t)
    prediction.register_hook(seen.append)
    incoming = Y[:rows].bfloat16()
    prediction.backward(incoming)
    exact = incoming.double() * weights(t, scheduler)
    assert torch.equal(seen[0], exact.float().bfloat16())
    assert not torch.equal(seen[0], incoming * weights(t, scheduler).bfloat16())


def test_bfloat16_by_accelerate():
    AcceleratorState._reset_state(True)
    try:
        accelerator, scheduler = Accelerator(cpu=True, mixed_precision="bf16"), DDPMScheduler()
        found = []
        for weight, attached in ((weights(T, scheduler).float(), False), (1.0, False), (1.0, True)):
            model = Denoiser()
            if attached:
                snrweights.attach(model, scheduler, timestep=given)
            model = accelerator.prepare(model)
            prediction = model(X32, T)
            assert prediction.dtype == torch.float32
            accelerator.backward((weight * (prediction - Y32).square()).mean())
            found.append(gradient(model))
    finally:
        AcceleratorState._reset_state(True)
    wanted, plain, actual = found
    assert_weighted(actual, wanted, plain, tolerance=1e-6)  # the output is float32, so the hook comes before bfloat16


# GradScaler -----------------------------------------------------------------------------------------------------------


def scaled_step(scale, t, outputs, *, weight=None, scheduler=None):
    """Do a step with a loss scale; return whether it is skipped, the unscaled gradients, and the next loss scale.

    Args:
        outputs: "fp16", what autocast returns; or "fp32", to which accelerate's prepare() converts it.
    """
    model = Denoiser()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = [p.detach().clone() for p in model.parameters()]
    if scheduler is not None:
        snrweights.attach(model, scheduler, timestep=given)
    call = torch.autocast("cpu", dtype=torch.float16)(model.forward)
    model.forward = convert_outputs_to_fp32(call) if outputs == "fp32" else call
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10_000)
    prediction = model(X32, t)
    assert prediction.dtype == {"fp16": torch.float16, "fp32": torch.float32}[outputs]
    error = (prediction.float() - Y32).square()
    scaler.scale((error if weight is None else weight.float() * error).mean()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    skipped = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert skipped == (scaler.get_scale() < scale)
    return skipped, gradient(model)


SCALES = [2.0**k for k in range(0, 34, 2)]
LOW = torch.tensor([2, 5, 8, 12])  # min-SNR's weights on epsilon: 0.002 to 0.015


@pytest.mark.parametrize("t", [INDICES, LOW], ids=["all noise levels", "low ones"])
def test_with_accelerates_float32_outputs_the_same_steps_are_skipped(t):
    scheduler, skips = DDPMScheduler(), []
    weight = weights(t, scheduler)
    for scale in SCALES:
        wanted = scaled_step(scale, t, "fp32", weight=weight)
        actual = scaled_step(scale, t, "fp32", scheduler=scheduler)
        plain = scaled_step(scale, t, "fp32")
        assert actual[0] == wanted[0], f"at scale {scale}"
        if not wanted[0]:
            assert distance(actual[1], wanted[1]) < 1e-3
            assert plain[0] or distance(plain[1], wanted[1]) > 0.05
        skips.append((actual[0], plain[0]))
    assert skips[0] == (False, False)
    assert skips[-1] == (True, True)
    assert (False, True) in skips  # the unweighted loop would skip a step that this one takes


def test_with_float16_outputs_no_step_is_taken_that_the_weighted_loop_skips():
    """An unweighted gradient that overflows at the output cannot be weighted: such a step is skipped, needlessly."""
    scheduler, needless = DDPMScheduler(), []
    weight = weights(LOW, scheduler)
    for scale in SCALES:
        wanted = scaled_step(scale, LOW, "fp16", weight=weight)
        actual = scaled_step(scale, LOW, "fp16", scheduler=scheduler)
        overflows = scale * 2 * float((Denoiser()(X32, LOW) - Y32).detach().abs().max()) / Y.numel() > 65504
        assert actual[0] == (wanted[0] or overflows), f"at scale {scale}"
        if not actual[0]:
            assert distance(actual[1], wanted[1]) < 3e-3
        needless.append(actual[0] and not wanted[0])
    assert any(needless)


def test_float16_with_weights_near_one_skips_the_same_steps():
    scheduler, skips = DDPMScheduler(), []
    weight = weights(INDICES, scheduler)
    for scale in SCALES:
        wanted = scaled_step(scale, INDICES, "fp16", weight=weight)
        actual = scaled_step(scale, INDICES, "fp16", scheduler=scheduler)
        assert actual[0] == wanted[0], f"at scale {scale}"
        skips.append(actual[0])
    assert skips[0] is False
    assert skips[-1] is True


def test_a_weight_that_overflows_float16_skips_the_step():
    """x0's weights go up to 1118 here: the weighted gradient overflows where the unweighted one does not."""
    scheduler = DDPMScheduler(prediction_type="sample")
    seen = []
    for scale in SCALES:
        wanted = scaled_step(scale, INDICES, "fp16", weight=weights(INDICES, scheduler, method="ddpm"))
        model_skips = scaled_step_with(scale, scheduler)
        assert model_skips == wanted[0], f"at scale {scale}"
        seen.append((model_skips, scaled_step(scale, INDICES, "fp16")[0]))
    assert (True, False) in seen


def scaled_step_with(scale, scheduler):
    model = Denoiser()
    snrweights.attach(model, scheduler, "ddpm", timestep=given)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    with torch.autocast("cpu", dtype=torch.float16):
        prediction = model(X32, INDICES)
    scaler.scale((prediction.float() - Y32).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale() < scale


def test_flow_in_bfloat16_reads_sigma_as_it_was_given():
    scheduler, model = FlowMatchEulerDiscreteScheduler(), Denoiser()
    t = FLOW.bfloat16()
    snrweights.attach(model, scheduler, timestep=given)
    wanted = autocast_step(Denoiser(), t, torch.bfloat16, weights(t.double(), scheduler))
    assert_weighted(
        autocast_step(model, t, torch.bfloat16), wanted, autocast_step(Denoiser(), t, torch.bfloat16), tolerance=0.02
    )


def test_that_a_compiled_model_is_not_audited_is_said():
    inner, scheduler = denoiser(), DDPMScheduler()
    attach(inner, scheduler)
    with pytest.warns(UserWarning, match=r"Could not look whether Denoiser's loss is weighted already: the model is"):
        train(compiled(inner), T)
