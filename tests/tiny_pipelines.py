"""Folders of pipelines with few and random parameters, which diffusers' own training scripts take for real ones."""

import json

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)


def tokenizer_of_letters(folder):
    """Return a CLIPTokenizer that knows letters."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    words = [*"abcdefghijklmnopqrstuvwxyz", *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz")]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=16)


def clip(tokenizer, projection=None):
    """Return a text encoder, with a projection where its width is given."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2 if projection else 1,  # the last but one is used
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        projection_dim=projection or 8,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def autoencoder(**options):
    return AutoencoderKL(
        block_out_channels=(4, 4),
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=16,
        **options,
    )


def unet(**options):
    return UNet2DConditionModel(
        **{
            **{"sample_size": 8, "block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4},
            **{"cross_attention_dim": 8, "attention_head_dim": 4},
            **{"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)},
            **options,
        }
    )


def ddpm(**options):
    """A scheduler of little noise, so that about half of the timesteps are on either side of gamma."""
    return DDPMScheduler(beta_start=1e-4, beta_end=1e-3, steps_offset=1, clip_sample=False, **options)


def save_stable_diffusion(folder, **scheduler):
    torch.manual_seed(0)
    tokenizer = tokenizer_of_letters(folder)
    text_encoder = clip(tokenizer)
    StableDiffusionPipeline(
        unet=unet(),
        vae=autoencoder(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=ddpm(**scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def save_controlnet(folder, pipeline):
    """With one halving of the conditioning image, as the autoencoder has one."""
    of_pipeline = UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet")
    ControlNetModel.from_unet(of_pipeline, conditioning_embedding_out_channels=(8, 8)).save_pretrained(folder)
    return folder


def save_sdxl(folder, **scheduler):
    torch.manual_seed(0)
    tokenizer = tokenizer_of_letters(folder)
    model = unet(
        cross_attention_dim=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8,
        use_linear_projection=True,
    )
    StableDiffusionXLPipeline(
        unet=model,
        vae=autoencoder(),
        text_encoder=clip(tokenizer),
        text_encoder_2=clip(tokenizer, 8),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_of_letters(folder),
        scheduler=ddpm(**scheduler),
    ).save_pretrained(folder)
    return folder


def save_sd3(folder):
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    torch.manual_seed(0)
    tokenizer, t5 = tokenizer_of_letters(folder), T5TokenizerFast(extra_ids=0, model_max_length=16)
    StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=4,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=8,
            pooled_projection_dim=16,
        ),
        vae=autoencoder(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(tokenizer, 8),
        text_encoder_2=clip(tokenizer, 8),
        text_encoder_3=T5EncoderModel(
            T5Config(vocab_size=len(t5), d_model=16, d_ff=16, d_kv=4, num_layers=1, num_heads=2, num_decoder_layers=1)
        ),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_of_letters(folder),
        tokenizer_3=t5,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    ).save_pretrained(folder)
    return folder
