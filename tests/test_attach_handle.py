"""What ``attach`` returns: taking it off, copies of the model, and the report."""

import copy
import json
import pickle
import re
from typing import NamedTuple

import pytest
import torch
from attaching import (
    INDICES,
    X,
    assert_weighted,
    attach,
    denoiser,
    expected,
    given,
    train,
    unet,
    weights,
)
from diffusers import (
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from snrweights.integrations.attachment import attachments
from snrweights.integrations.denoisers import with_prediction

from snrweights.densities import FlowUniform

T = INDICES


# taking it off --------------------------------------------------------------------------------------------------------


def traces(model, scheduler):
    """Everything that an attachment could leave behind."""
    return (
        [sorted(vars(module)) for module in model.modules()],
        [{name: len(value) for name, value in vars(m).items() if name.endswith("hooks")} for m in model.modules()],
        sorted(vars(type(model))),
        list(scheduler.__dict__.items()),
        list(model.state_dict()),
        type(model).__call__,
        model.forward.__func__,
    )


def test_nothing_is_left_after_detach():
    model, scheduler = unet(), DDPMScheduler()
    wanted, plain = expected(unet, T, scheduler)
    before = traces(model, scheduler)
    handle = attach(model, scheduler, track=True)
    assert traces(model, scheduler) != before
    assert_weighted(train(model, T), wanted, plain)
    handle.detach()
    assert traces(model, scheduler) == before
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not model._backward_hooks
    assert not model._forward_hooks_with_kwargs
    assert torch.equal(train(model, T), plain)
    handle.detach()
    assert torch.equal(train(model, T), plain)


def test_detach_leaves_the_hooks_of_others():
    model, calls = denoiser(), []
    model.register_forward_hook(lambda *call: calls.append(call))
    handle = attach(model, DDPMScheduler())
    handle.detach()
    train(model, T)
    assert len(model._forward_hooks) == len(calls) == 1


def test_a_context_detaches():
    model, scheduler = denoiser(), DDPMScheduler()
    wanted, plain = expected(denoiser, T, scheduler)
    with attach(model, scheduler) as handle:
        assert_weighted(train(model, T), wanted, plain)
    assert handle.weighted
    assert torch.equal(train(model, T), plain)
    with pytest.raises(KeyError), attach(model, scheduler):
        raise KeyError
    assert not model._forward_hooks


def test_a_second_attachment_is_refused_and_one_after_detach_is_not():
    model, scheduler = denoiser(), DDPMScheduler()
    first = attach(model, scheduler)
    with pytest.raises(ValueError, match=re.escape(f"`model` is weighted already, by {first!r}; detach() that first.")):
        attach(model, scheduler, "smoothed_kl")
    assert_weighted(train(model, T), *expected(denoiser, T, scheduler))
    first.detach()
    attach(model, scheduler, "smoothed_kl")
    assert_weighted(train(model, T), *expected(denoiser, T, scheduler, method="smoothed_kl"))


def test_a_second_attachment_is_refused_through_a_wrapper_too():
    model = denoiser()
    attach(model, DDPMScheduler())
    with pytest.raises(ValueError, match="`model` is weighted already, by <attached Denoiser: MinSNR"):
        attach(torch.compile(model), DDPMScheduler(), timestep=given)


# copies ---------------------------------------------------------------------------------------------------------------


def test_a_deep_copy_is_weighted_too_and_shares_the_tracker():
    model, scheduler = unet(), DDPMScheduler()
    handle = attach(model, scheduler, track=True)
    clone = copy.deepcopy(model)
    wanted = expected(unet, T, scheduler)
    assert_weighted(train(clone, T), *wanted)
    assert attachments(clone)[0] is not handle
    assert attachments(clone)[0].tracker is handle.tracker
    assert int(handle.tracker.compute().count.sum()) == 4
    assert_weighted(train(model, T), *wanted)
    assert int(handle.tracker.compute().count.sum()) == 8
    scheduler.register_to_config(prediction_type="v_prediction")
    assert_weighted(train(clone, T), *expected(unet, T, scheduler))


def test_detaching_the_original_leaves_the_deep_copy():
    model, scheduler = denoiser(), DDPMScheduler()
    handle = attach(model, scheduler)
    wanted, plain = expected(denoiser, T, scheduler)
    clone = copy.deepcopy(model)
    handle.detach()
    assert torch.equal(train(model, T), plain)
    assert_weighted(train(clone, T), wanted, plain)


def test_detaching_a_deep_copy_leaves_the_original():
    model, scheduler = denoiser(), DDPMScheduler()
    attach(model, scheduler)
    wanted, plain = expected(denoiser, T, scheduler)
    clone = copy.deepcopy(model)
    attachments(clone)[0].detach()
    assert torch.equal(train(clone, T), plain)
    assert_weighted(train(model, T), wanted, plain)


def test_a_pickled_model_is_weighted_too():
    model, scheduler = unet(), DDPMScheduler()
    attach(model, scheduler, track=True)
    wanted, plain = expected(unet, T, scheduler)
    clone = pickle.loads(pickle.dumps(model))
    assert_weighted(train(clone, T), wanted, plain)
    (handle,) = attachments(clone)
    assert int(handle.tracker.compute().count.sum()) == 4
    assert int(attachments(model)[0].tracker.compute().count.sum()) == 0
    handle.detach()
    assert torch.equal(train(clone, T), plain)
    assert_weighted(train(model, T), wanted, plain)


# the report -----------------------------------------------------------------------------------------------------------


def test_the_report_says_what_was_done():
    model, scheduler = unet(), DDPMScheduler()
    handle = attach(model, scheduler, gamma=2.0, normalize="mean", track=True)
    train(model, T)
    report = handle.report()
    assert (report.model, report.scheduler, report.method) == ("UNet2DModel", "DDPMScheduler", "MinSNR(gamma=2.0)")
    assert (report.prediction_type, report.normalize, report.weighted, report.reason) == ("epsilon", "mean", True, None)
    assert report.mean_weight == pytest.approx(1, abs=1e-9)
    assert report.density == "uniform over the scheduler's timesteps"
    assert sum(row["count"] for row in report.loss["bins"]) == 4
    assert None in [row["mean"] for row in report.loss["bins"]]
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False)) == report.as_dict()


def test_the_mean_weight_is_that_over_the_timesteps():
    scheduler = DDPMScheduler()
    handle = attach(denoiser(), scheduler, "smoothed_kl")
    everywhere = weights(torch.arange(1000), scheduler, method="smoothed_kl")
    assert handle.report().mean_weight == pytest.approx(everywhere.mean().item(), abs=1e-9)
    assert 0.5 < handle.report().mean_weight < 0.95


def test_a_mean_weight_that_is_infinite_is_json_too():
    handle = attach(
        denoiser(), FlowMatchEulerDiscreteScheduler(), "ddpm", prediction_type="sample", density=FlowUniform()
    )
    json.dumps(handle.report().as_dict(), allow_nan=False)


def test_the_report_on_an_edm_scheduler_names_the_density_that_is_meant():
    handle = attach(denoiser(), EDMEulerScheduler(), normalize="mean")
    assert "uniform" not in handle.report().density


def test_the_report_on_a_schedule_that_was_named():
    handle = attach(denoiser(), "linear", prediction_type="epsilon")
    assert repr(handle) == "<attached Denoiser: MinSNR(gamma=5.0) on the MSE of 'epsilon', on linear>"
    assert handle.report().scheduler == "linear"


def test_the_report_without_a_method():
    model = denoiser()
    handle = attach(model, DDPMScheduler(), None, track=True)
    plain = train(denoiser(), T)
    assert torch.equal(train(model, T), plain)
    report = handle.report()
    assert (report.method, report.prediction_type, report.mean_weight) == ("none", None, 1.0)
    assert report.weighted
    assert sum(row["count"] for row in report.loss["bins"]) == 4
    assert repr(handle) == "<attached Denoiser: no weight, on DDPMScheduler, tracked>"


def test_why_nothing_was_weighted():
    model = unet()
    handle = attach(model, DDPMScheduler())
    assert handle.report().reason.startswith("UNet2DModel was not called")
    with torch.no_grad():
        model(X, T)
    assert handle.report().reason == "UNet2DModel was called without gradients only"
    model.requires_grad_(False)
    model(X, T)
    assert handle.report().reason == "no output of UNet2DModel depended on anything that is trained"
    assert not handle.weighted
    assert handle.report().loss is None
    model(X.clone().requires_grad_(), T)
    assert handle.report().reason is None
    assert handle.weighted


def test_repr_before_and_after_detach():
    handle = attach(unet(), DDPMScheduler(), gamma=2.0, normalize="mean", sample_mask="first_half", track=True)
    rest = (
        "UNet2DModel: MinSNR(gamma=2.0) on the MSE of 'epsilon', normalize='mean', on DDPMScheduler, part of each "
        "batch, tracked>"
    )
    assert repr(handle) == f"<attached {rest}"
    handle.detach()
    assert repr(handle) == f"<detached {rest}"


def test_a_named_tuple_stays_one():
    class Output(NamedTuple):
        sample: torch.Tensor
        extra: str

    found = with_prediction(Output(torch.zeros(1), "more"), torch.ones(1))
    assert found == Output(torch.ones(1), "more")
    assert isinstance(found, Output)
