"""DreamBooth: instance and class images in one batch, chunked for a loss each. Only the instance loss is weighted."""

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from miniature import Run, small_unet

run = Run()
unet = small_unet()
noise_scheduler = DDPMScheduler()
run.attach(unet, noise_scheduler, sample_mask="first_half")
unet = run.accelerator.prepare(unet)
encoder_hidden_states = torch.randn(8, 3, 8)


def loss_of_a_batch():
    latents, noise = torch.randn(2, 8, 4, 8, 8)
    timesteps = (torch.cat([run.uniform(4), run.uniform(4)]) * noise_scheduler.config.num_train_timesteps).long()
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    prediction = unet(noisy, timesteps, encoder_hidden_states, class_labels=None, return_dict=False)[0]
    prediction, prediction_prior = torch.chunk(prediction, 2, dim=0)
    target, target_prior = torch.chunk(noise, 2, dim=0)
    prior_loss = F.mse_loss(prediction_prior.float(), target_prior.float(), reduction="mean")
    return run.mse(prediction, target, timesteps[:4], noise_scheduler) + 0.5 * prior_loss


run.train(unet, loss_of_a_batch, lr=0.5)
