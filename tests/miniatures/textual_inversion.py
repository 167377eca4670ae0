"""Textual inversion: only an embedding is trained; the UNet is frozen, and no one prepares it."""

import torch
from diffusers import DDPMScheduler
from miniature import Run, small_unet

run = Run()
embedding, unet = torch.nn.Embedding(10, 8), small_unet()
unet.requires_grad_(False)
noise_scheduler = DDPMScheduler()
run.attach(unet, noise_scheduler)
text_encoder = run.accelerator.prepare(embedding)


def loss_of_a_batch():
    latents, noise = torch.randn(2, 8, 4, 8, 8)
    timesteps = (run.uniform(8) * noise_scheduler.config.num_train_timesteps).long()
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    encoder_hidden_states = text_encoder(torch.randint(10, (8, 3)))
    return run.mse(unet(noisy, timesteps, encoder_hidden_states).sample, noise, timesteps, noise_scheduler)


run.train(text_encoder, loss_of_a_batch, lr=1e4)
