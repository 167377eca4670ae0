"""``attach(track=True)``: the loss of each sample, recovered from its gradient."""

import pytest
import torch
from attaching import (
    F64,
    FLOW,
    INDICES,
    Denoiser,
    X,
    Y,
    attach,
    cases,
    denoiser,
    given,
    train,
)
from diffusers import (
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
)

import snrweights
from snrweights import per_sample_mse
from snrweights.predictions import log_error_ratio

T = INDICES


class ZImageTransformer2DModel(Denoiser):
    """Stands in for the class of this name: a list in, a list out, and 1 - sigma as ``t``."""

    def forward(self, x, t):
        return (list(super().forward(torch.stack(x), t).unbind()),)


def tracked(handle, t, scheduler):
    """Return the tracked loss of each sample; each is in a bin of its own."""
    statistics = handle.tracker.compute()
    log_snr = snrweights.as_schedule(scheduler).log_snr(t)
    bins = torch.bucketize(log_snr, statistics.edges[1:-1])
    assert len(set(bins.tolist())) == len(t)
    assert bool((statistics.count[bins] > 0).all())
    assert int(statistics.count.gt(0).sum()) == len(t)
    output_type = handle._live.output_type
    assert statistics.unit == "epsilon"
    sigma_data = handle._live.schedule.sigma_data
    ratio = log_error_ratio(output_type, log_snr, sigma_data) - log_error_ratio("epsilon", log_snr, sigma_data)
    return statistics.mean[bins] * ratio.exp()


@pytest.mark.parametrize("method", ["min_snr", None])
@pytest.mark.parametrize("case", cases())
def test_the_loss_of_each_sample_is_recovered(case, method):
    scheduler, t = cases()[case]
    model = denoiser()
    handle = attach(model, scheduler, method, track=True)
    train(model, t)
    wanted = per_sample_mse(denoiser()(X, t), Y)
    assert wanted.max() > 1.1 * wanted.min()
    torch.testing.assert_close(tracked(handle, t, scheduler), wanted.detach(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("scale", [0.25, 1024.0, lambda: 0.25, lambda: torch.tensor(0.25, dtype=F64)])
def test_what_multiplies_the_loss_is_divided_out(scale):
    model, scheduler = denoiser(), DDPMScheduler()
    handle = attach(model, scheduler, track=True, loss_scale=scale)
    factor = float(scale() if callable(scale) else scale)
    for t in (T, T + 1):  # accumulated
        (factor * (model(X, t) - Y).square().mean()).backward()
    wanted = (per_sample_mse(denoiser()(X, T), Y) + per_sample_mse(denoiser()(X, T + 1), Y)) / 2
    torch.testing.assert_close(tracked(handle, T, scheduler), wanted.detach(), rtol=1e-10, atol=0)
    assert int(handle.tracker.compute().count.sum()) == 8


def test_outputs_of_which_a_part_is_sliced_off():
    model, scheduler = denoiser(out=2), DDPMScheduler()
    handle = attach(model, scheduler, track=True)
    (model(X, T)[:, :1] - Y).square().mean().backward()
    wanted = per_sample_mse(denoiser(out=2)(X, T)[:, :1], Y)
    torch.testing.assert_close(tracked(handle, T, scheduler), wanted.detach(), rtol=1e-10, atol=0)


@pytest.fixture
def every_warning():
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


@pytest.mark.usefixtures("every_warning")
def test_one_timestep_for_all_is_tracked_for_each():
    model, scheduler = denoiser(), DDPMScheduler()
    handle = attach(model, scheduler, track=True)
    train(model, 20)
    wanted = per_sample_mse(denoiser()(X, 20), Y).detach()
    statistics = handle.tracker.compute()
    assert int(statistics.count.max()) == int(statistics.count.sum()) == 4
    torch.testing.assert_close(statistics.mean[statistics.count > 0], wanted.mean()[None], rtol=1e-10, atol=0)
    variance = statistics.variance[statistics.count > 0]
    torch.testing.assert_close(variance, wanted.var(correction=0)[None], rtol=1e-8, atol=0)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("mask", [None, "first_half", lambda rows: torch.arange(rows) < 1])
def test_parts_of_a_batch_with_means_of_their_own(mask, listed):
    model = (ZImageTransformer2DModel if listed else Denoiser)().double()
    scheduler = FlowMatchEulerDiscreteScheduler()
    first = {None: 4, "first_half": 2}.get(mask, 1)

    def call(t):
        return torch.stack(model(list(X), 1 - t / 1000)[0]) if listed else model(X, t)

    handle = snrweights.attach(
        model, scheduler, dtype=F64, track=True, sample_mask=mask, timestep=None if listed else given
    )
    error = (call(FLOW) - Y).square()
    sum(part.mean() for part in error.split([first, 4 - first]) if len(part)).backward()
    torch.testing.assert_close(tracked(handle, FLOW, scheduler), error.flatten(1).mean(1).detach(), rtol=1e-10, atol=0)
