"""Weights of a batch, per-sample errors, and their weighted mean."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr

from snrweights import EDMSchedule, FlowSchedule, get_weighting, loss_weight, per_sample_mse, weighted_loss
from snrweights.densities import Laplace
from snrweights.schedules import alphas_cumprod_from_betas

T = torch.tensor([0, 10, 500, 999])
EPSILON = {"prediction_type": "epsilon"}


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# loss_weight ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize": "mean"},
        {"prediction_type": "v_prediction"},
        {"clamp_max": 0.5},
        {"density": Laplace(), "normalize": "mean"},
        {"dtype": torch.float64},
    ],
)
@pytest.mark.parametrize(("method", "hp"), [("min_snr", {"gamma": 3.0}), ("p2", {}), ("smoothed_kl", {"tau": 0.1})])
def test_it_is_bind_with_the_look_up_done(method, hp, options):
    scheduler = DDPMScheduler()
    expected = get_weighting(method, **hp).bind(scheduler, **options)(T)
    for _ in range(2):  # built, then looked up
        actual = loss_weight(T, scheduler, method, **options, **hp)
        assert torch.equal(actual, expected)
        assert actual.dtype == options.get("dtype", torch.float32)


@pytest.mark.parametrize(
    "other", [{"gamma": 2.0}, {"normalize": "mean"}, {"prediction_type": "sample"}, {"clamp_max": 0.1}]
)
def test_other_arguments_are_not_looked_up_as_the_first(other):
    scheduler = DDPMScheduler()
    first = loss_weight(T, scheduler)
    assert not torch.allclose(loss_weight(T, scheduler, **other), first)
    assert torch.equal(loss_weight(T, scheduler), first)


def test_a_single_timestep_and_small_integers():
    whole = loss_weight(T, "linear", **EPSILON)
    assert torch.equal(loss_weight(500, "linear", **EPSILON), whole[2])
    assert torch.equal(loss_weight(500.0, "linear", **EPSILON), whole[2])
    assert torch.equal(loss_weight(torch.tensor([10], dtype=torch.uint8), "linear", **EPSILON), whole[[1]])


def test_methods_that_are_objects():
    weighting = get_weighting("min_snr", gamma=2.0)
    assert torch.equal(loss_weight(T, "linear", weighting, **EPSILON), loss_weight(T, "linear", gamma=2.0, **EPSILON))
    halved = loss_weight(T, "linear", lambda log_snr: torch.full_like(log_snr, 0.5), **EPSILON)
    assert halved.tolist() == [0.5] * 4


def test_a_scheduler_states_its_prediction_type_and_an_argument_overrides_it():
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    assert torch.equal(loss_weight(T, scheduler), loss_weight(T, scheduler, prediction_type="v_prediction"))
    assert torch.equal(loss_weight(T, scheduler, **EPSILON), loss_weight(T, DDPMScheduler()))


def replace_table(scheduler):
    scheduler.alphas_cumprod = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod


def halve_table(scheduler):
    scheduler.alphas_cumprod.mul_(0.5)


def rescale_to_zero_snr(scheduler):
    scheduler.betas = rescale_zero_terminal_snr(scheduler.betas)
    scheduler.alphas_cumprod = alphas_cumprod_from_betas(scheduler.betas).float()


def change_prediction_type(scheduler):
    scheduler.register_to_config(prediction_type="v_prediction")  # as train_text_to_image does inside its loop


@pytest.mark.parametrize("mutate", [replace_table, halve_table, rescale_to_zero_snr, change_prediction_type])
def test_a_scheduler_that_changed_is_bound_anew(mutate):
    scheduler = DDPMScheduler()
    before = loss_weight(T, scheduler)
    mutate(scheduler)
    after = loss_weight(T, scheduler)
    assert torch.equal(after, get_weighting("min_snr").bind(scheduler)(T))
    assert not torch.allclose(after, before, rtol=1e-3)


def test_a_table_that_was_written_into_is_bound_anew():
    table = DDPMScheduler().alphas_cumprod.clone()
    before = loss_weight(T, table, **EPSILON)
    table.mul_(0.5)
    after = loss_weight(T, table, **EPSILON)
    assert torch.equal(after, loss_weight(T, table.clone(), **EPSILON))
    assert not torch.allclose(after, before, rtol=1e-3)


def test_many_schedulers_do_not_mix():
    schedulers = [DDPMScheduler(beta_end=0.01 + 0.0001 * i) for i in range(80)]  # more than are remembered
    first = [loss_weight(T, scheduler) for scheduler in schedulers]
    again = [loss_weight(T, scheduler) for scheduler in schedulers]
    expected = [get_weighting("min_snr").bind(scheduler)(T) for scheduler in schedulers]
    assert torch.equal(torch.stack(first), torch.stack(expected))
    assert torch.equal(torch.stack(again), torch.stack(expected))


BAD = [
    ({"t": [5]}, TypeError, "`t` must be a tensor of timesteps or a number, got list."),
    ({"t": True}, TypeError, "`t` must be a tensor of timesteps or a number, got bool."),
    ({"t": torch.tensor([True])}, TypeError, "`t` must be integer or floating point, got torch.bool."),
    ({"t": torch.zeros(2, 2)}, ValueError, "`t` must have shape (B,) with B >= 1, or (), got (2, 2)."),
    ({"t": torch.zeros(0)}, ValueError, "`t` must have shape (B,) with B >= 1, or (), got (0,)."),
    ({"t": torch.tensor([1, 1000])}, IndexError, "`t` must lie in [0, 999], got 1000."),
    ({"t": -1}, IndexError, "`t` must lie in [0, 999], got -1."),
    ({"t": math.nan}, IndexError, "`t` must lie in [0, 999], got nan."),
    ({"t": torch.tensor([1.0, 999.5])}, IndexError, "`t` must lie in [0, 999], got 999.5."),
    ({"t": torch.tensor([0.5, math.nan]), "schedule": FlowSchedule()}, ValueError, "`t` must lie in [0, 1], got nan."),
    ({"t": torch.tensor([2]), "schedule": FlowSchedule()}, ValueError, "`t` must lie in [0, 1], got 2"),
    (
        {"t": torch.tensor([1001]), "schedule": FlowMatchEulerDiscreteScheduler()},
        ValueError,
        "`t` must lie in (0, 1000], got 1001",
    ),
    ({"t": torch.tensor([-1]), "schedule": EDMSchedule()}, ValueError, "`t` must lie in (0, "),
    ({"schedule": 7}, TypeError, "Cannot read a noise schedule from int;"),
    ({"schedule": "quadratic"}, ValueError, "Unknown schedule 'quadratic'; choose one of ["),
    ({"method": "minsnr"}, ValueError, "Unknown weighting 'minsnr'; choose one of ['ddpm', "),
    ({"method": 3}, TypeError, "`method` must be a name in ['ddpm', "),
    ({"gama": 5}, ValueError, "Weighting 'min_snr' has no hyperparameter 'gama'; it takes ['gamma']."),
    ({"gamma": 0}, ValueError, "`MinSNR(gamma=...)` must be > 0, got 0."),
    ({"gamma": [5]}, TypeError, "`method`, `density` and hyperparameters must be hashable, got "),
    (
        {"prediction_type": None},
        ValueError,
        "`prediction_type` is not stated by the schedule and must be given; choose",
    ),
    ({"prediction_type": "eps"}, ValueError, "Unknown prediction_type 'eps'; choose one of ['epsilon', 'sample', "),
    ({"density": 3}, TypeError, "`density` must be a Density, a name in ['cosine', "),
    ({"normalize": "sum"}, ValueError, "`normalize` must be 'mean' or None, got 'sum'."),
    ({"clamp_max": -1.0}, ValueError, "`clamp_max` must be > 0, got -1.0."),
    ({"dtype": torch.int32}, ValueError, "`dtype` must be one of [torch.float64, torch.float32, "),
]


@pytest.mark.parametrize(("changed", "kind", "message"), BAD)
def test_a_bad_argument_is_named_with_its_value_and_the_choices(changed, kind, message):
    arguments = {"t": T, "schedule": "linear", "prediction_type": "epsilon", **changed}
    with pytest.raises(kind) as raised:
        loss_weight(**arguments)
    assert str(raised.value).startswith(message)


# per_sample_mse -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 8, 8), (1, 1)])
def test_it_is_the_mean_over_all_but_the_batch(shape):
    prediction, target = randn(*shape), randn(*shape, seed=1)
    expected = (prediction - target).square().reshape(shape[0], -1).mean(1)
    actual = per_sample_mse(prediction, target)
    assert actual.shape == (shape[0],)
    torch.testing.assert_close(actual, expected)


def test_low_precision_is_accumulated_in_float32():
    prediction, target = randn(2, 1000).bfloat16(), randn(2, 1000, seed=1).bfloat16()
    actual = per_sample_mse(prediction, target)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, (prediction.float() - target.float()).square().mean(1))
    assert per_sample_mse(prediction, target.double()).dtype == torch.float64


@pytest.mark.parametrize("mask_shape", [(4, 1, 5, 5), (4, 3, 5, 5), (1, 1, 5, 5)])
def test_a_mask_averages_over_its_mass(mask_shape):
    prediction, target = randn(4, 3, 5, 5), randn(4, 3, 5, 5, seed=1)
    mask = (randn(*mask_shape, seed=2) > 0).float()
    full = mask.expand(4, 3, 5, 5).bool()
    squared = (prediction - target).square()
    expected = torch.stack([squared[i][full[i]].mean() for i in range(4)])
    torch.testing.assert_close(per_sample_mse(prediction, target, mask), expected)
    torch.testing.assert_close(per_sample_mse(prediction, target, mask.bool()), expected)
    torch.testing.assert_close(per_sample_mse(prediction, target, 3 * mask), expected)


def test_a_sample_that_is_masked_out_has_no_loss_and_no_gradient():
    prediction = randn(2, 3).requires_grad_()
    loss = per_sample_mse(prediction, torch.zeros(2, 3), torch.tensor([[1.0], [0.0]]))
    assert loss[1] == 0
    loss.sum().backward()
    assert prediction.grad[0].abs().min() > 0
    assert torch.equal(prediction.grad[1], torch.zeros(3))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3), (3,)), "`prediction` (2, 3) and `target` (3,) differ in shape."),
        (((), ()), "`prediction` must have shape (B, ...) with B >= 1, got ()."),
        (((0, 3), (0, 3)), "`prediction` must have shape (B, ...) with B >= 1, got (0, 3)."),
        (((2, 3), (2, 3), (4,)), "`mask` (4,) does not broadcast to (2, 3)."),
    ],
)
def test_shapes_that_do_not_go_together(shapes, message):
    with pytest.raises(ValueError, match=r"must have shape|differ in shape|does not broadcast") as raised:
        per_sample_mse(*(torch.ones(shape) for shape in shapes))
    assert str(raised.value) == message


# weighted_loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_the_loop_written_out(reduction, masked):
    prediction, target = randn(4, 3, 5, 5), randn(4, 3, 5, 5, seed=1)
    mask = (randn(4, 1, 5, 5, seed=2) > 0).expand(4, 3, 5, 5) if masked else torch.ones(4, 3, 5, 5, dtype=torch.bool)
    scheduler = DDPMScheduler()
    losses = []
    for i in range(4):
        weight = loss_weight(T[i], scheduler, "min_snr", gamma=3.0)
        losses.append(weight * (prediction[i] - target[i])[mask[i]].square().mean())
    expected = {"mean": torch.mean, "sum": torch.sum, "none": lambda x: x}[reduction](torch.stack(losses))
    options = {"mask": mask if masked else None, "reduction": reduction, "gamma": 3.0}
    actual = weighted_loss(prediction, target, T, scheduler, "min_snr", **options)
    torch.testing.assert_close(actual, expected)


def test_gradients_are_those_of_the_explicitly_weighted_loss():
    prediction, target = randn(4, 6).double().requires_grad_(), randn(4, 6, seed=1).double()
    weight = loss_weight(T, "linear", dtype=torch.float64, **EPSILON)
    weighted_loss(prediction, target, T, "linear", dtype=torch.float64, **EPSILON).backward()
    expected = weight[:, None] * 2 * (prediction.detach() - target) / (6 * 4)
    torch.testing.assert_close(prediction.grad, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("t", [5, torch.tensor(5), torch.tensor([5]), torch.tensor([5, 6, 7])])
def test_a_loss_needs_one_timestep_per_sample(t):
    with pytest.raises(ValueError, match=r"`t` must have one timestep per sample, shape \(2,\), got \("):
        weighted_loss(torch.ones(2, 3), torch.zeros(2, 3), t, "linear", **EPSILON)


def test_an_unknown_reduction_lists_the_choices():
    with pytest.raises(ValueError, match=r"Unknown reduction 'average'; choose one of \['mean', 'sum', 'none'\]."):
        weighted_loss(torch.ones(4, 3), torch.zeros(4, 3), T, "linear", reduction="average", **EPSILON)


@pytest.mark.parametrize("schedule", ["linear", "cosine", FlowSchedule(), EDMSchedule(0.5)])
def test_on_a_device_nothing_is_waited_for(schedule):
    """A ``meta`` tensor has no values to read."""
    t = torch.empty(4, device="meta", dtype=torch.float32)
    assert loss_weight(t, schedule, "min_snr", prediction_type="epsilon").device.type == "meta"


def test_a_negative_weight_is_said_to_be_one():
    with pytest.raises(ValueError, match=r"`method` must return weights >= 0, got -\d"):
        loss_weight(torch.tensor([3]), "linear", lambda log_snr: log_snr, prediction_type="epsilon")


def test_an_empty_prediction_type_is_none():
    with pytest.raises(ValueError, match="prediction_type"):
        loss_weight(torch.tensor([3]), DDPMScheduler(), "min_snr", prediction_type="")
