"""``attach`` among evaluation, averages, wrappers and a scheduler that changes; and without waiting for the device."""

import pytest
import torch
from accelerate import Accelerator
from attaching import (
    F64,
    INDICES,
    X,
    Y,
    assert_weighted,
    attach,
    cases,
    denoiser,
    distance,
    expected,
    gradient,
    train,
    unet,
    weights,
)
from cases import NoHostSync
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from peft import LoraConfig, get_peft_model

T = INDICES
BLOCKS = {
    "block_out_channels": (32,),
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}


# evaluation, averages, wrappers ---------------------------------------------------------------------------------------


def test_evaluation_in_between_changes_nothing():
    scheduler, model = DDPMScheduler(), unet()
    attach(model, scheduler)
    random = torch.Generator().manual_seed(0)
    wanted = expected(unet, T, scheduler)
    with torch.no_grad():
        first = model(X, T).sample
    assert torch.equal(first, unet()(X, T).sample.detach())
    assert_weighted(train(model, T), *wanted)
    model.zero_grad()
    prediction = model(X, T).sample
    with torch.inference_mode():
        model.eval()(X, T)
    pipeline = DDPMPipeline(model.float(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(batch_size=2, num_inference_steps=2, generator=random, output_type="np")
    model.double().train()
    (prediction - Y).square().mean().backward()
    assert_weighted(gradient(model), *wanted)
    assert_weighted(train(model, T), *wanted)


def test_averages_of_the_parameters():
    model, scheduler = unet(), DDPMScheduler()
    attach(model, scheduler)
    average = EMAModel(model.parameters(), decay=0.9, model_cls=type(model), model_config=model.config)
    wanted = expected(unet, T, scheduler)
    assert_weighted(train(model, T), *wanted)
    average.step(model.parameters())
    average.store(model.parameters())
    average.copy_to(model.parameters())
    with torch.no_grad():
        model(X, T)
    average.restore(model.parameters())
    assert_weighted(train(model, T), *wanted)


def test_accelerate_after_attaching_and_before():
    scheduler = DDPMScheduler()
    wanted = expected(unet, T, scheduler)
    accelerator = Accelerator(cpu=True)
    for late in (False, True):
        model = unet()
        if late:
            prepared, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
            attach(prepared, scheduler)
        else:
            attach(model, scheduler)
            prepared, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
        model.zero_grad()
        accelerator.backward((prepared(X, T).sample - Y).square().mean())
        assert_weighted(gradient(model), *wanted)


def test_accumulation_by_accelerate():
    model, scheduler = unet(), DDPMScheduler()
    attach(model, scheduler)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward((model(X, T).sample - Y).square().mean())
            optimizer.step()
    assert accelerator.sync_gradients
    assert_weighted(gradient(model), *expected(unet, T, scheduler))


CONDITIONED = {"cross_attention_dim": 8, "attention_head_dim": 8}


@pytest.mark.parametrize("wrap", ["get_peft_model", "get_peft_model, inner", "add_adapter"])
def test_lora(wrap):
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    text = torch.linspace(-1, 1, 4 * 3 * 8, dtype=F64).reshape(4, 3, 8)

    def make():
        torch.manual_seed(0)
        inner = UNet2DConditionModel(8, 1, 1, **{**CONDITIONED, **BLOCKS}).double()
        if wrap == "add_adapter":
            inner.requires_grad_(False)
            inner.add_adapter(config)
        return (inner if wrap == "add_adapter" else get_peft_model(inner, config)).double(), inner

    def run(model, weight=None):
        return train(model, T, weight, call=lambda x, t: model(x, t, text))

    scheduler = DDPMScheduler()
    wanted, plain = run(make()[0], weights(T, scheduler)), run(make()[0])
    model, inner = make()
    attach(inner if wrap.endswith("inner") else model, scheduler)
    assert_weighted(run(model), wanted, plain)
    assert 0 < len(plain) < 3000  # the adapters alone
    assert list(inner._forward_hooks)


# a scheduler that the script changes ----------------------------------------------------------------------------------


def test_a_prediction_type_that_the_loop_registers():
    scheduler, model = DDPMScheduler(), denoiser()
    handle = attach(model, scheduler)
    before, plain = expected(denoiser, T, scheduler)
    assert_weighted(train(model, T), before, plain)
    scheduler.register_to_config(prediction_type="v_prediction")
    wanted, plain = expected(denoiser, T, DDPMScheduler(prediction_type="v_prediction"))
    assert_weighted(train(model, T), wanted, plain)
    assert distance(before, wanted) > 0.05
    assert handle.report().prediction_type == "v_prediction"


def test_a_prediction_type_that_was_given_stays():
    scheduler, model = DDPMScheduler(), denoiser()
    attach(model, scheduler, prediction_type="epsilon")
    scheduler.register_to_config(prediction_type="v_prediction")
    assert_weighted(train(model, T), *expected(denoiser, T, DDPMScheduler()))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_table_that_the_script_changes(in_place):
    scheduler, model = DDPMScheduler(prediction_type="v_prediction"), denoiser()
    attach(model, scheduler, method="smoothed_kl")
    t = torch.tensor([400, 900, 990, 999])
    before, _ = expected(denoiser, t, scheduler, method="smoothed_kl")
    zero = DDPMScheduler(prediction_type="v_prediction", beta_end=0.0021, rescale_betas_zero_snr=True)
    if in_place:
        scheduler.alphas_cumprod.copy_(zero.alphas_cumprod)
    else:
        scheduler.alphas_cumprod = zero.alphas_cumprod
    wanted, plain = expected(denoiser, t, zero, method="smoothed_kl")
    # zero's own betas are read where they reproduce its table; the changed scheduler's do not: the table, then, float32
    assert_weighted(train(model, t), wanted, plain, tolerance=1e-5)
    assert distance(before, wanted) > 1e-2


def test_what_does_not_change_is_bound_once(monkeypatch):
    from snrweights.integrations.live_weighting import LiveWeighting

    binds, bind = [], LiveWeighting._bind
    monkeypatch.setattr(LiveWeighting, "_bind", lambda self: (binds.append(self), bind(self)))
    scheduler, model = DDPMScheduler(), denoiser()
    attach(model, scheduler)
    for _ in range(5):
        scheduler.register_to_config(prediction_type="epsilon")
        train(model, T)
    assert len(binds) == 1
    scheduler.register_to_config(prediction_type="sample")
    for _ in range(3):
        train(model, T)
    assert len(binds) == 2
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.clone()
    for _ in range(3):
        train(model, T)
    assert len(binds) == 3


# waiting --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("track", [False, True])
@pytest.mark.parametrize("case", ["epsilon", "flow", "edm"])
def test_no_step_waits_for_the_device(case, track):
    scheduler, t = cases()[case]
    model = denoiser()
    options = {"track": track, "sample_mask": "first_half", "loss_scale": lambda: torch.ones(())}
    handle = attach(model, scheduler, audit=1, **options)
    train(model, t)  # the audit's only step; and what is copied to the device once is
    with NoHostSync():
        (model(X, t) - Y).square().mean().backward()
    assert handle.weighted
    assert (handle.tracker is not None) == track


def test_a_timestep_that_waits_is_noticed():
    model = denoiser()
    attach(model, DDPMScheduler(), timestep=lambda sample, t: [t[0].item()])
    with pytest.raises(AssertionError, match="it waits for the device"), NoHostSync():
        model(X, T)


def test_a_scheduler_that_cannot_be_weighed_any_more_stays_an_error():
    scheduler, model = DDPMScheduler(), denoiser()
    attach(model, scheduler, "debiased", prediction_type="epsilon")
    zero = DDPMScheduler(rescale_betas_zero_snr=True)
    scheduler.alphas_cumprod, scheduler.betas = zero.alphas_cumprod, zero.betas
    for _ in range(2):
        with pytest.raises(ValueError, match="not finite at t = 999"):
            model(X, INDICES)
