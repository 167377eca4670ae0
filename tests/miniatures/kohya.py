"""Kohya's trainers: a UNet class of their own, called as `unet(latents, timesteps, context)`."""

import torch
from diffusers import DDPMScheduler
from miniature import Run


class UNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.time = torch.nn.Embedding(1000, 8)
        self.context = torch.nn.Linear(8, 8)
        self.down, self.up = torch.nn.Conv2d(4, 8, 3, padding=1), torch.nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, sample, timestep, context):
        hidden = self.time(timestep) + self.context(context).mean(1)
        return self.up(torch.nn.functional.silu(self.down(sample) + hidden[:, :, None, None]))


run = Run()
unet = UNet()
noise_scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
run.attach(unet, noise_scheduler, timestep=lambda sample, t, *args, **kwargs: t)
unet = run.accelerator.prepare(unet)
context = torch.randn(8, 3, 8)


def loss_of_a_batch():
    latents, noise = torch.randn(2, 8, 4, 8, 8)
    timesteps = (run.uniform(8) * noise_scheduler.config.num_train_timesteps).long()
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    return run.mse(unet(noisy, timesteps, context), noise, timesteps, noise_scheduler)


run.train(unet, loss_of_a_batch, lr=0.5)
