"""diffusers' own training scripts, unmodified: plain, launched, and with the --snr_gamma that some of them have.

SNRWEIGHTS_DIFFUSERS_EXAMPLES=.../diffusers/examples pytest -m scripts
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel, UNet2DModel
from PIL import Image
from safetensors.torch import load_file

EXAMPLES = os.environ.get("SNRWEIGHTS_DIFFUSERS_EXAMPLES")
STAND_INS = Path(__file__).parent / "stand_ins"
GAMMA = 5.0

pytestmark = [
    pytest.mark.scripts,
    pytest.mark.slow,
    pytest.mark.skipif(not EXAMPLES, reason="set SNRWEIGHTS_DIFFUSERS_EXAMPLES to diffusers' folder `examples`"),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of images, with captions beside it."""
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    captions = []
    for i in range(8):
        Image.fromarray(generator.integers(256, size=(20, 18, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        captions.append({"file_name": f"{i}.png", "text": f"a {'cat' if i % 2 else 'dog'} on a mat"})
    without = tmp_path_factory.mktemp("instances")
    for file in folder.iterdir():
        (without / file.name).write_bytes(file.read_bytes())
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in captions))
    return {"captioned": folder, "instances": without}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The folder of a Stable Diffusion with few parameters, random ones."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pipeline")
    words = [*"abcdefghijklmnopqrstuvwxyz", *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz")]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=16)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=vocabulary["<|startoftext|>"],
            eos_token_id=vocabulary["<|endoftext|>"],
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 4),
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=16,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        # little noise, so that about half of the timesteps are on either side of gamma
        scheduler=DDPMScheduler(beta_start=1e-4, beta_end=1e-3, steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image_model(tmp_path_factory):
    """The config of a small UNet2DModel."""
    folder = tmp_path_factory.mktemp("model")
    UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    ).save_config(folder)
    return folder / "config.json"


# With so large an epsilon Adam is SGD with momentum: it neither hides factors nor blows up what is only rounding.
OPTIMIZER = {"adam_epsilon": 1, "adam_weight_decay": 0, "learning_rate": 1, "lr_scheduler": "constant"}
COMMON = OPTIMIZER | {"train_batch_size": 4, "resolution": 16, "lr_warmup_steps": 0, "center_crop": True}
FINE_TUNING = COMMON | {"seed": 0, "max_train_steps": 4, "max_grad_norm": 1e6}


def arguments(options):
    return [str(part) for name, value in options.items() for part in (f"--{name}", value) if part is not True]


def python_path():
    try:
        importlib.import_module("torchvision.transforms")
    except (ImportError, RuntimeError):
        return str(STAND_INS)
    return ""


def run(script, options, output, before=()):
    """Run one of the scripts; return its stderr."""
    environment = os.environ | {
        "PYTHONPATH": python_path(),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(output.parent / "home"),
        "ACCELERATE_USE_CPU": "true",
    }
    seeded = [] if "seed" in options else [STAND_INS / "seeded.py"]
    command = [*before, *seeded, Path(EXAMPLES) / script, *arguments(options | {"output_dir": output})]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stderr


PLAIN = [sys.executable]
LAUNCH = [Path(sys.executable).with_name("snrweights"), "launch", "--method", "min_snr", "--set", f"gamma={GAMMA}"]


def flat(tensors):
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def distance(one, other, start):
    one, other = flat(one) - start, flat(other) - start
    return ((one - other).norm() / other.norm()).item()


def compare(script, options, weights, folder, start):
    """Train plainly, launched, and by the script's own formula; compare what they have trained."""
    errors = {}
    ways = {"plain": (PLAIN, {}), "launch": (LAUNCH, {}), "own": (PLAIN, {"snr_gamma": GAMMA})}
    for name, (before, more) in ways.items():
        errors[name] = run(script, options | more, folder / name, before)
    trained = {name: load_file(folder / name / weights) for name in ways}
    if start is None:  # of LoRA's two matrices the one that starts at zero
        trained = {name: {k: v for k, v in part.items() if "lora.up" in k} for name, part in trained.items()}
        start = {k: torch.zeros_like(v) for k, v in trained["plain"].items()}
    start = flat(start)
    assert distance(trained["launch"], trained["own"], start) < 1e-5
    assert distance(trained["plain"], trained["own"], start) > 1e-2
    assert "snrweights: <attached UNet2DConditionModel: MinSNR(gamma=5.0) on the MSE of 'epsilon'" in errors["launch"]


UNET = "unet/diffusion_pytorch_model.safetensors"


def test_text_to_image(pipeline, images, tmp_path):
    options = FINE_TUNING | {"pretrained_model_name_or_path": pipeline, "train_data_dir": images["captioned"]}
    compare("text_to_image/train_text_to_image.py", options, UNET, tmp_path, load_file(pipeline / UNET))


def test_text_to_image_lora(pipeline, images, tmp_path):
    options = FINE_TUNING | {"pretrained_model_name_or_path": pipeline, "train_data_dir": images["captioned"]}
    options |= {"rank": 2, "learning_rate": 10}
    compare("text_to_image/train_text_to_image_lora.py", options, "pytorch_lora_weights.safetensors", tmp_path, None)


def test_dreambooth(pipeline, images, tmp_path):
    options = FINE_TUNING | {"pretrained_model_name_or_path": pipeline, "instance_data_dir": images["instances"]}
    options |= {"instance_prompt": "a cat on a mat"}
    compare("dreambooth/train_dreambooth.py", options, UNET, tmp_path, load_file(pipeline / UNET))


def test_unconditional(image_model, images, tmp_path):
    """It has no --snr_gamma; the same weights come from a formula that is put in place of its mse_loss."""
    options = COMMON | {"model_config_name_or_path": image_model, "train_data_dir": images["instances"]}
    options |= {"num_epochs": 2, "ddpm_num_inference_steps": 2, "eval_batch_size": 1, "ddpm_beta_schedule": "linear"}
    script = "unconditional_image_generation/train_unconditional.py"
    errors = {
        "plain": run(script, options, tmp_path / "plain", PLAIN),
        "launch": run(script, options, tmp_path / "launch", LAUNCH),
        "own": run(script, options, tmp_path / "own", [*PLAIN, STAND_INS / "min_snr_by_hand.py"]),
    }
    trained = {name: load_file(tmp_path / name / UNET) for name in errors}
    torch.manual_seed(0)  # as seeded.py; the model is the first that draws
    start = flat(UNet2DModel.from_config(UNet2DModel.load_config(image_model)).state_dict())
    assert distance(trained["launch"], trained["own"], start) < 1e-5
    assert distance(trained["plain"], trained["own"], start) > 1e-2
    assert "snrweights: <attached UNet2DModel: MinSNR(gamma=5.0) on the MSE of 'epsilon'" in errors["launch"]
