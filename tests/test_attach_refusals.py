"""What ``attach`` refuses, and that its messages name the thing, the value and the choices."""

import math
import re

import pytest
import torch
from attaching import (
    F64,
    INDICES,
    Denoiser,
    X,
    assert_weighted,
    attach,
    denoiser,
    distance,
    expected,
    given,
    train,
    unet,
)
from diffusers import (
    AmusedScheduler,
    AutoencoderKL,
    ControlNetModel,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UVit2DModel,
    VQModel,
)
from torch import nn

import snrweights

T = INDICES


def test_a_model_that_is_not_known():
    with pytest.raises(TypeError, match=r"How Denoiser takes its timestep is not known: give `timestep=`, a function"):
        snrweights.attach(denoiser(), DDPMScheduler())

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = unet()

    with pytest.raises(TypeError, match=r"How Outer takes .* or attach to what it contains: 'inner' \(UNet2DModel\)\."):
        snrweights.attach(Outer(), DDPMScheduler())


def test_force_takes_an_unknown_model_that_has_a_timestep():
    model = denoiser()
    snrweights.attach(model, DDPMScheduler(), dtype=F64, force=True)
    assert_weighted(train(model, T), *expected(denoiser, T, DDPMScheduler()))
    with pytest.raises(TypeError, match="How Linear takes its timestep is not known"):
        snrweights.attach(nn.Linear(1, 1), DDPMScheduler(), force=True)


def refused_models():
    """Return models that have no weight, each with what the message says of it."""
    shape = {"block_out_channels": (32,), "norm_num_groups": 8}
    return [
        (
            ControlNetModel(
                1,
                down_block_types=("DownBlock2D",),
                cross_attention_dim=8,
                attention_head_dim=8,
                conditioning_embedding_out_channels=(8,),
                **shape,
            ),
            "it returns residuals for another model: attach to the denoiser",
        ),
        (VQModel(num_vq_embeddings=8, **shape), "it is an autoencoder: there is no noise level"),
        (AutoencoderKL(**shape), "it is an autoencoder: there is no noise level"),
        (
            UVit2DModel(
                32,
                cond_embed_dim=8,
                micro_cond_embed_dim=8,
                encoder_hidden_size=8,
                vocab_size=9,
                codebook_size=8,
                in_channels=32,
                block_out_channels=32,
                num_res_blocks=1,
                block_num_heads=2,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
            ),
            "it predicts tokens under a cross entropy",
        ),
    ]


def test_a_class_that_has_no_weight_is_refused_with_the_reason_and_taken_by_force():
    for model, reason in refused_models():
        name = type(model).__name__
        with pytest.raises(TypeError, match=f"^{name} cannot be weighted: {reason}.*`force=True` attaches never"):
            snrweights.attach(model, DDPMScheduler())
        assert not model._forward_hooks
        child = type(f"My{name}", (type(model),), {})
        model.__class__ = child
        with pytest.raises(TypeError, match=f"^My{name} cannot be weighted: {reason}"):
            snrweights.attach(model, DDPMScheduler())
        snrweights.attach(model, DDPMScheduler(), timestep=given)
        assert len(model._forward_hooks) == 1


def test_force_attaches_to_what_is_refused():
    model = refused_models()[0][0]
    snrweights.attach(model, DDPMScheduler(), force=True)
    assert len(model._forward_hooks) == 1


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"model": "unet"}, TypeError, "`model` must be a torch.nn.Module, got str."),
        ({"model": None}, TypeError, "`model` must be a torch.nn.Module, got NoneType."),
        ({"method": "minsnr"}, ValueError, "Unknown weighting 'minsnr'; choose one of ['ddpm',"),
        ({"method": 3}, TypeError, "`method` must be a name in ["),
        ({"gama": 5}, ValueError, "Weighting 'min_snr' has no hyperparameter 'gama'; it takes ['gamma']."),
        ({"gamma": -1}, ValueError, "`MinSNR(gamma=...)` must be > 0, got -1."),
        ({"prediction_type": "eps"}, ValueError, "Unknown prediction_type 'eps'; choose one of ['epsilon', 'sample',"),
        ({"scheduler": "linear"}, ValueError, "`prediction_type` is not stated by the schedule and must be given;"),
        ({"scheduler": "quadratic"}, ValueError, "Unknown schedule 'quadratic'; choose one of ['linear',"),
        ({"scheduler": AmusedScheduler(7)}, TypeError, "AmusedScheduler has no training schedule: it masks or"),
        ({"scheduler": object()}, TypeError, "Cannot read a noise schedule from object; give a diffusers scheduler"),
        (
            {"scheduler": DPMSolverMultistepScheduler()},
            TypeError,
            "DPMSolverMultistepScheduler.add_noise before set_timesteps() reads its sigmas backwards",
        ),
        ({"normalize": "max"}, ValueError, "`normalize` must be 'mean' or None, got 'max'."),
        ({"clamp_max": 0}, ValueError, "`clamp_max` must be > 0, got 0."),
        ({"density": "gauss"}, ValueError, "Unknown density 'gauss'; choose one of ["),
        ({"dtype": torch.int64}, ValueError, "`dtype` must be one of [torch.float64,"),
        (
            {"sample_mask": "second_half"},
            ValueError,
            "`sample_mask` must be a function or one of ['first_half'], got 'second_half'.",
        ),
        ({"method": None, "gamma": 5.0}, (TypeError, ValueError), "gamma"),
    ],
)
def test_a_bad_argument_is_named_and_nothing_is_attached(arguments, kind, message):
    model = unet()
    arguments = {"model": model, "scheduler": DDPMScheduler(), **arguments}
    with pytest.raises(kind) as raised:
        snrweights.attach(**arguments)
    assert message in str(raised.value)
    assert not model._forward_hooks


@pytest.mark.parametrize("t", [T[:3], T.repeat(2), T.reshape(2, 2)[:, :1]])
def test_timesteps_that_are_not_one_a_sample(t):
    model = denoiser()
    attach(model, DDPMScheduler(), timestep=lambda sample, timestep: t)
    message = (
        f"Denoiser was called with timesteps of shape {tuple(t.shape)} and returned 4 samples; give `timestep=`, a "
        f"function from the call's arguments to one t a sample."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        model(X, T)


def test_a_timestep_outside_the_table():
    model = denoiser()
    attach(model, DDPMScheduler())
    with pytest.raises(IndexError, match=r"`t` must lie in \[0, 999\], got 1000\."):
        model(X, T.clamp(min=1000))


def test_a_call_without_a_timestep_says_so():
    class UNet1DModel(Denoiser):  # by name a class that is known
        def forward(self, sample, timestep=None):
            return super().forward(sample, 5 if timestep is None else timestep)

    model = UNet1DModel().double()
    snrweights.attach(model, DDPMScheduler())
    for call in ({}, {"timestep": None}):
        with pytest.raises((TypeError, ValueError), match="timestep"):
            model(X, **call)


def test_an_infinite_weight_is_refused():
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match=r"Weighting 'debiased' .* is not finite at t = 999: give `clamp_max=`"):
        attach(denoiser(), scheduler, "debiased")
    model = denoiser()
    attach(model, scheduler, "debiased", clamp_max=3.0)
    t = torch.tensor([0, 300, 900, 999])
    assert_weighted(train(model, t), *expected(denoiser, t, scheduler, method="debiased", clamp_max=3.0))
    assert math.isinf(snrweights.as_schedule(scheduler).log_snr(t)[3])
    assert distance(train(denoiser(), t), train(model, t)) > 0.05
