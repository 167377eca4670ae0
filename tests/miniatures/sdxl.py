"""SDXL: added conditions, a velocity as the target, and a prediction type that is set inside the loop."""

import torch
from diffusers import DDPMScheduler
from miniature import Run, small_unet

run = Run()
unet = small_unet(
    addition_embed_type="text_time",
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=6 * 4 + 8,
    use_linear_projection=True,
)
noise_scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
run.attach(unet, noise_scheduler)
unet = run.accelerator.prepare(unet)
prompt_embeds, pooled_prompt_embeds = torch.randn(8, 3, 8), torch.randn(8, 8)
add_time_ids = torch.tensor([[8, 8, 0, 0, 8, 8]]).repeat(8, 1)


def loss_of_a_batch():
    latents, noise = torch.randn(2, 8, 4, 8, 8)
    timesteps = (run.uniform(8) * noise_scheduler.config.num_train_timesteps).long()
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    prediction = unet(
        noisy,
        timesteps,
        prompt_embeds,
        added_cond_kwargs={"time_ids": add_time_ids, "text_embeds": pooled_prompt_embeds},
        return_dict=False,
    )[0]
    noise_scheduler.register_to_config(prediction_type="v_prediction")
    target = noise_scheduler.get_velocity(latents, noise, timesteps)
    return run.mse(prediction, target, timesteps, noise_scheduler)


run.train(unet, loss_of_a_batch, lr=0.5)
