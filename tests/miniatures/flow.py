"""SD3: timesteps in [0, 1000], noise mixed in by hand, and optionally outputs that are turned into x0."""

import copy

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from miniature import Run

run = Run("--precondition_outputs")
transformer = SD3Transformer2DModel(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    num_layers=1,
    attention_head_dim=4,
    num_attention_heads=2,
    joint_attention_dim=8,
    caption_projection_dim=8,
    pooled_projection_dim=8,
)
noise_scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
noise_scheduler_copy = copy.deepcopy(noise_scheduler)
target_of_the_loss = "sample" if run.args.precondition_outputs else None
run.attach(transformer, noise_scheduler, prediction_type=target_of_the_loss)
transformer = run.accelerator.prepare(transformer)
prompt_embeds, pooled_prompt_embeds = torch.randn(8, 3, 8), torch.randn(8, 8)


def loss_of_a_batch():
    latents, noise = torch.randn(2, 8, 4, 8, 8)
    indices = (run.uniform(8) * noise_scheduler_copy.config.num_train_timesteps).long()
    timesteps = noise_scheduler_copy.timesteps[indices]
    sigmas = noise_scheduler_copy.sigmas[indices][:, None, None, None]
    noisy = (1.0 - sigmas) * latents + sigmas * noise
    prediction = transformer(
        hidden_states=noisy,
        timestep=timesteps,
        encoder_hidden_states=prompt_embeds,
        pooled_projections=pooled_prompt_embeds,
        return_dict=False,
    )[0]
    target = noise - latents
    if run.args.precondition_outputs:
        prediction, target = prediction * (-sigmas) + noisy, latents
    return run.mse(prediction, target, timesteps, noise_scheduler, prediction_type=target_of_the_loss)


run.train(transformer, loss_of_a_batch, lr=0.1)
