"""The processes of the reference script: what they draw, ask for and sample."""

from types import SimpleNamespace

import pytest
import torch
from snrweights.integrations.processes import PROCESSES
from snrweights.integrations.sampling import guided, heun, karras_sigmas

from snrweights.drawn import as_density
from snrweights.process import alpha_sigma, target

OPTIONS = {
    "prediction_type": "epsilon",
    "beta_schedule": "linear",
    "num_train_timesteps": 1000,
    "rescale_betas_zero_snr": False,
    "time_density": "uniform",
    "density_mean": 0.0,
    "density_std": 1.0,
    "shift": 1.0,
    "sigma_data": 0.5,
    "sigma_min": 0.002,
    "sigma_max": 80.0,
}
CASES = [
    ("discrete", {"prediction_type": "epsilon"}),
    ("discrete", {"prediction_type": "sample"}),
    ("discrete", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    ("flow", {"time_density": "uniform", "shift": 3.0}),
    ("flow", {"time_density": "logit_normal", "density_mean": 0.5, "shift": 2.0}),
    ("edm", {"time_density": "log_normal", "density_mean": -1.2, "density_std": 1.2}),
    ("edm", {"time_density": "log_uniform"}),
]


def make(name, changes):
    return PROCESSES[name](SimpleNamespace(**{**OPTIONS, **changes}))


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_timesteps_follow_the_density_they_are_weighted_by(name, changes):
    process = make(name, changes)
    u = (torch.arange(20000) + 0.5) / 20000
    log_snr = process.schedule.log_snr(process.timesteps(u)).sort().values
    density = as_density(process.density, process.schedule)
    quantiles = density.icdf(torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]))
    found = log_snr[[2000, 6000, 10000, 14000, 18000]]
    torch.testing.assert_close(found, quantiles, rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_uniform_numbers_at_the_ends_give_timesteps_of_the_schedule(name, changes):
    process = make(name, changes)
    process.schedule.check(process.timesteps(torch.tensor([0.0, 1 - 2.0**-24])))


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_the_sampler_turns_noise_into_the_data_of_an_exact_model(name, changes):
    """For Gaussian data the best prediction is known; samples must have the data's moments."""
    process = make(name, changes)
    mean, deviation = 0.1, 0.2  # inside [-1, 1], to which DDIM clips

    def predict(x, t):
        log_snr = process.schedule.log_snr(t.expand(len(x)))
        alpha, sigma = (v.to(x).reshape(-1, 1, 1, 1) for v in alpha_sigma(log_snr, process.schedule.coords))
        gain = alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2)
        x0 = mean + gain * (x - alpha * mean)
        noise = (x - alpha * x0) / sigma
        return target(process.prediction_type, x0, noise, log_snr, process.schedule.sigma_data)

    noise = torch.randn(20000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    samples = process.sample(predict, noise, 1000)
    assert samples.mean().item() == pytest.approx(mean, abs=0.01)
    assert samples.std().item() == pytest.approx(deviation, abs=0.01)


def test_heun_is_of_second_order():
    """dx/dsigma = (x - D) / sigma with D = x / (1 + sigma²) has the solution x = √(1 + sigma²) x(0)."""

    def denoise(x, sigma):
        return x / (1 + sigma**2)

    exact = torch.ones(1, dtype=torch.float64)
    errors = []
    for steps in (40, 80, 160):
        noise = exact * (1 + 80.0**2) ** 0.5 / 80.0
        errors.append(abs(heun(denoise, noise, karras_sigmas(steps)) - exact).item())
    assert errors[0] / errors[1] > 3.3
    assert errors[1] / errors[2] > 3.3
    assert errors[2] < 1e-3


def test_karras_levels():
    sigmas = karras_sigmas(18)
    assert sigmas[0] == pytest.approx(80)
    assert sigmas[-2] == pytest.approx(0.002)
    assert sigmas[-1] == 0
    with pytest.raises(ValueError, match="`steps` must be >= 2, got 1"):
        karras_sigmas(1)


def test_guidance_goes_from_the_unconditional_through_the_label():
    def denoiser(x, t, class_labels):
        return class_labels.float()

    x, t, labels = torch.zeros(2, 1), torch.zeros(2), torch.tensor([1, 2])
    assert guided(denoiser, labels, 1.0, 10)(x, t).tolist() == [1, 2]
    assert guided(denoiser, labels, 3.0, 10)(x, t).tolist() == [10 + 3 * (1 - 10), 10 + 3 * (2 - 10)]
    assert guided(denoiser, None, 3.0, 10) is denoiser


@pytest.mark.parametrize(
    ("name", "choices"), [("flow", "'uniform', 'logit_normal'"), ("edm", "'log_normal', 'log_uniform'")]
)
def test_a_density_of_another_process_is_refused(name, choices):
    with pytest.raises(ValueError, match=rf"must be one of \[{choices}\], got 'mode'"):
        make(name, {"time_density": "mode"})
