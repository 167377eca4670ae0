"""ControlNet: it is trained and steers a frozen UNet, whose output is compared with the target."""

import torch
from diffusers import ControlNetModel, DDPMScheduler
from miniature import Run, small_unet

run = Run()
unet = small_unet()
controlnet = ControlNetModel.from_unet(unet, conditioning_channels=3)
for zero_convolution in [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]:
    torch.nn.init.normal_(zero_convolution.weight)  # so that a few steps train more than these
unet.requires_grad_(False)
noise_scheduler = DDPMScheduler()
run.attach(unet, noise_scheduler)
controlnet = run.accelerator.prepare(controlnet)
encoder_hidden_states = torch.randn(8, 3, 8)


def loss_of_a_batch():
    latents, noise = torch.randn(2, 8, 4, 8, 8)
    timesteps = (run.uniform(8) * noise_scheduler.config.num_train_timesteps).long()
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    down, middle = controlnet(
        noisy,
        timesteps,
        encoder_hidden_states=encoder_hidden_states,
        controlnet_cond=torch.randn(8, 3, 64, 64),
        return_dict=False,
    )
    prediction = unet(
        noisy,
        timesteps,
        encoder_hidden_states=encoder_hidden_states,
        down_block_additional_residuals=list(down),
        mid_block_additional_residual=middle,
        return_dict=False,
    )[0]
    return run.mse(prediction, noise, timesteps, noise_scheduler)


run.train(controlnet, loss_of_a_batch, lr=0.05)
