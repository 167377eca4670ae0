"""Whole images without a condition: `model(noisy, timesteps).sample` against the noise."""

import torch
from diffusers import DDPMScheduler, UNet2DModel
from miniature import Run

run = Run()
model = UNet2DModel(
    sample_size=8,
    block_out_channels=(8,),
    layers_per_block=1,
    norm_num_groups=4,
    down_block_types=("DownBlock2D",),
    up_block_types=("AttnUpBlock2D",),
    attention_head_dim=4,
)
noise_scheduler = DDPMScheduler()
run.attach(model, noise_scheduler)
model = run.accelerator.prepare(model)


def loss_of_a_batch():
    images, noise = torch.randn(2, 8, 3, 8, 8)
    timesteps = (run.uniform(8) * noise_scheduler.config.num_train_timesteps).long()
    noisy = noise_scheduler.add_noise(images, noise, timesteps)
    return run.mse(model(noisy, timesteps).sample, noise, timesteps, noise_scheduler)


run.train(model, loss_of_a_batch, lr=0.5)
