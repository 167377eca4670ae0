"""The forward process against diffusers' schedulers and the definitions."""

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from snrweights import as_schedule
from snrweights.process import EDMPreconditioned, add_noise, alpha_sigma, target, to_x0

PREDICTIONS = ("sample", "epsilon", "v_prediction", "flow_prediction", "edm")


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2)]


def test_noise_and_velocity_are_those_of_ddpm(pair):
    scheduler, (x0, noise) = DDPMScheduler(), pair
    t = torch.tensor([0, 1, 10, 500, 998, 999])
    log_snr = as_schedule(scheduler).log_snr(t)
    torch.testing.assert_close(add_noise(x0, noise, log_snr), scheduler.add_noise(x0, noise, t), rtol=1e-5, atol=1e-5)
    velocity = scheduler.get_velocity(x0, noise, t)
    torch.testing.assert_close(target("v_prediction", x0, noise, log_snr), velocity, rtol=1e-5, atol=1e-5)


def test_noise_is_that_of_flow_matching(pair):
    scheduler, (x0, noise) = FlowMatchEulerDiscreteScheduler(shift=3.0), pair
    t = scheduler.timesteps[[0, 1, 400, 800, 998, 999]]
    log_snr = as_schedule(scheduler).log_snr(t)
    torch.testing.assert_close(
        add_noise(x0, noise, log_snr, "flow"), scheduler.scale_noise(x0, t, noise), rtol=1e-6, atol=1e-6
    )


def test_preconditioning_is_that_of_diffusers_edm(pair):
    scheduler, (x0, noise) = EDMEulerScheduler(), pair
    t = scheduler.timesteps[[0, 1, 400, 800, 998, 999]]
    sigma = torch.exp(4 * t.double())
    log_snr = -2 * torch.log(sigma)
    x = add_noise(x0, noise, log_snr, "ve")
    torch.testing.assert_close(x, scheduler.add_noise(x0, noise, t), rtol=1e-5, atol=1e-4)
    network = target("edm", x0, noise, log_snr, 0.5)
    for i, s in enumerate(sigma):
        restored = scheduler.precondition_outputs(x[i], network[i], s)
        torch.testing.assert_close(restored, x0[i], rtol=1e-9, atol=1e-9)

    class Network(torch.nn.Module):
        def forward(self, x, t, return_dict):
            self.seen = x, t
            return (network,)

    wrapped = EDMPreconditioned(Network(), 0.5)
    torch.testing.assert_close(wrapped.denoise(x, sigma), x0, rtol=1e-9, atol=1e-9)
    seen_x, seen_t = wrapped.model.seen
    torch.testing.assert_close(seen_t, t.double(), rtol=1e-6, atol=1e-6)
    for i, s in enumerate(sigma):
        torch.testing.assert_close(seen_x[i], scheduler.precondition_inputs(x[i], s), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("coords", ["vp", "ve", "flow"])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_x0_comes_back_from_every_target_in_all_coordinates(pair, prediction_type, coords):
    x0, noise = pair
    log_snr = torch.linspace(-6, 6, 6, dtype=torch.float64)
    asked = target(prediction_type, x0, noise, log_snr, 0.5)
    restored = to_x0(asked, add_noise(x0, noise, log_snr, coords), log_snr, prediction_type, coords, 0.5)
    torch.testing.assert_close(restored, x0, rtol=1e-10, atol=1e-10)


def test_coordinates_keep_their_promise_at_every_level():
    log_snr = torch.tensor([-torch.inf, -30.0, 0.0, 30.0, torch.inf], dtype=torch.float64)
    alpha, sigma = alpha_sigma(log_snr, "vp")
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(5, dtype=torch.float64))
    alpha, sigma = alpha_sigma(log_snr, "flow")
    torch.testing.assert_close(alpha + sigma, torch.ones(5, dtype=torch.float64))
    assert alpha[0] == 0
    assert sigma[-1] == 0
    torch.testing.assert_close(2 * torch.log(alpha / sigma)[1:4], log_snr[1:4])


def test_bad_input(pair):
    x0, noise = pair
    with pytest.raises(ValueError, match=r"Unknown coords 'vpp'; choose one of \['vp', 've', 'flow'\]"):
        alpha_sigma(torch.zeros(1), "vpp")
    with pytest.raises(ValueError, match="Unknown prediction_type 'v'"):
        target("v", x0, noise, torch.zeros(6))
    with pytest.raises(ValueError, match="`sigma_data`, got None"):
        target("edm", x0, noise, torch.zeros(6))
