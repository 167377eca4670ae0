"""k-diffusion: a Denoiser around a model that takes c_in x and sigma and predicts EDM's F."""

import torch
from miniature import Run

from snrweights import EDMSchedule


class Inner(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.noise_level = torch.nn.Linear(1, 8)
        self.down, self.up = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x, sigma, **kwargs):
        hidden = self.noise_level(sigma.log()[:, None] / 4)
        return self.up(torch.nn.functional.silu(self.down(x) + hidden[:, :, None, None]))


class Denoiser(torch.nn.Module):
    def __init__(self, inner_model, sigma_data):
        super().__init__()
        self.inner_model = inner_model
        self.sigma_data = sigma_data

    def parts(self, clean, noise, sigma):
        """The prediction F and its target."""
        sigma_ = sigma[:, None, None, None]
        total = sigma_**2 + self.sigma_data**2
        c_skip, c_out, c_in = self.sigma_data**2 / total, sigma_ * self.sigma_data / total.sqrt(), 1 / total.sqrt()
        noised = clean + noise * sigma_
        return self.inner_model(noised * c_in, sigma), (clean - c_skip * noised) / c_out


run = Run()
denoiser = Denoiser(Inner(), sigma_data=0.5)
schedule = EDMSchedule(sigma_data=denoiser.sigma_data, prediction_type="edm")
run.attach(denoiser.inner_model, schedule, timestep=lambda x, sigma, **kwargs: sigma)
denoiser = run.accelerator.prepare(denoiser)


def loss_of_a_batch():
    clean, noise = 0.5 * torch.randn(8, 3, 8, 8), torch.randn(8, 3, 8, 8)
    sigma = (torch.special.ndtri(run.uniform(8)) * 1.2 - 1.2).exp()  # log-normal
    prediction, target = denoiser.parts(clean, noise, sigma)
    return run.mse(prediction, target, sigma, schedule)


run.train(denoiser, loss_of_a_batch, lr=0.1)
