"""Flux: packed latents, and the model is given timesteps / 1000."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from miniature import Run

run = Run()
transformer = FluxTransformer2DModel(
    in_channels=16,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=8,
    pooled_projection_dim=8,
    guidance_embeds=True,
    axes_dims_rope=(4, 4, 8),
)
noise_scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
run.attach(transformer, noise_scheduler)
transformer = run.accelerator.prepare(transformer)
prompt_embeds, pooled_prompt_embeds = torch.randn(8, 3, 8), torch.randn(8, 8)
text_ids, image_ids = torch.zeros(3, 3), FluxPipeline._prepare_latent_image_ids(8, 4, 4, "cpu", torch.float32)


def loss_of_a_batch():
    latents, noise = torch.randn(2, 8, 4, 8, 8)
    timesteps = noise_scheduler.timesteps[(run.uniform(8) * noise_scheduler.config.num_train_timesteps).long()]
    sigmas = (timesteps / 1000)[:, None, None, None]
    noisy = (1.0 - sigmas) * latents + sigmas * noise
    packed = transformer(
        hidden_states=FluxPipeline._pack_latents(noisy, batch_size=8, num_channels_latents=4, height=8, width=8),
        timestep=timesteps / 1000,
        guidance=torch.full((8,), 3.5),
        pooled_projections=pooled_prompt_embeds,
        encoder_hidden_states=prompt_embeds,
        txt_ids=text_ids,
        img_ids=image_ids,
        return_dict=False,
    )[0]
    prediction = FluxPipeline._unpack_latents(packed, height=64, width=64, vae_scale_factor=8)
    return run.mse(prediction, noise - latents, timesteps, noise_scheduler)


run.train(transformer, loss_of_a_batch, lr=0.1)
