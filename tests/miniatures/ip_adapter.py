"""IP-Adapter: a module of its own is trained and prepared, and calls the UNet inside."""

import torch
from diffusers import DDPMScheduler
from miniature import Run, small_unet


class IPAdapter(torch.nn.Module):
    def __init__(self, unet, image_proj_model):
        super().__init__()
        self.unet = unet
        self.image_proj_model = image_proj_model

    def forward(self, noisy, timesteps, encoder_hidden_states, image_embeds):
        tokens = self.image_proj_model(image_embeds).unflatten(1, (2, 8))
        return self.unet(noisy, timesteps, torch.cat([encoder_hidden_states, tokens], dim=1)).sample


run = Run()
unet = small_unet()
unet.requires_grad_(False)
for name, parameter in unet.named_parameters():
    parameter.requires_grad_("attn2.to_v" in name)
noise_scheduler = DDPMScheduler()
run.attach(unet, noise_scheduler)
ip_adapter = run.accelerator.prepare(IPAdapter(unet, torch.nn.Linear(6, 16)))
encoder_hidden_states = torch.randn(8, 3, 8)


def loss_of_a_batch():
    latents, noise = torch.randn(2, 8, 4, 8, 8)
    timesteps = (run.uniform(8) * noise_scheduler.config.num_train_timesteps).long()
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    prediction = ip_adapter(noisy, timesteps, encoder_hidden_states, torch.randn(8, 6))
    return run.mse(prediction, noise, timesteps, noise_scheduler)


run.train(ip_adapter, loss_of_a_batch, lr=5.0)
