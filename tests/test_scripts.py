"""diffusers' own training scripts, unmodified: plain, launched, with the --snr_gamma that some have, and audited.

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
from diffusers import UNet2DModel
from PIL import Image
from safetensors.torch import load_file
from tiny_pipelines import save_controlnet, save_sd3, save_sdxl, save_stable_diffusion

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
    """Folders of the same images: alone, with captions, with a condition each, and with what they are edited to."""
    names, generator = [f"{i}.png" for i in range(8)], np.random.default_rng(0)
    images = {name: Image.fromarray(generator.integers(256, size=(20, 18, 3), dtype=np.uint8)) for name in names}
    texts = [f"a {'cat' if i % 2 else 'dog'} on a mat" for i in range(8)]
    others = names[1:] + names[:1]
    columns = {
        "instances": {},
        "captioned": {"file_name": names, "text": texts},
        "conditioned": {"file_name": names, "conditioning_image_file_name": others, "text": texts},
        "edited": {"input_image_file_name": names, "edit_prompt": texts, "edited_image_file_name": others},
    }
    folders = {}
    for kind, table in columns.items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        for name, image in images.items():
            image.save(folders[kind] / name)
        rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
        if rows:
            (folders[kind] / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folders


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The folder of a Stable Diffusion with few parameters, random ones."""
    return save_stable_diffusion(tmp_path_factory.mktemp("pipeline"))


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
    """Run one of the scripts; return its stdout and stderr."""
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
    return done.stdout, done.stderr


PLAIN = [sys.executable]
SNRWEIGHTS = Path(sys.executable).with_name("snrweights")
LAUNCH = [SNRWEIGHTS, "launch", "--method", "min_snr", "--set", f"gamma={GAMMA}"]


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
        _, errors[name] = run(script, options | more, folder / name, before)
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


UNCONDITIONAL = COMMON | {"ddpm_num_inference_steps": 2, "eval_batch_size": 1, "ddpm_beta_schedule": "linear"}


def test_unconditional(image_model, images, tmp_path):
    """It has no --snr_gamma; the same weights come from a formula that is put in place of its mse_loss."""
    options = {"model_config_name_or_path": image_model, "train_data_dir": images["instances"], "num_epochs": 2}
    options |= UNCONDITIONAL
    script = "unconditional_image_generation/train_unconditional.py"
    errors = {
        "plain": run(script, options, tmp_path / "plain", PLAIN)[1],
        "launch": run(script, options, tmp_path / "launch", LAUNCH)[1],
        "own": run(script, options, tmp_path / "own", [*PLAIN, STAND_INS / "min_snr_by_hand.py"])[1],
    }
    trained = {name: load_file(tmp_path / name / UNET) for name in errors}
    torch.manual_seed(0)  # as seeded.py; the model is the first that draws
    start = flat(UNet2DModel.from_config(UNet2DModel.load_config(image_model)).state_dict())
    assert distance(trained["launch"], trained["own"], start) < 1e-5
    assert distance(trained["plain"], trained["own"], start) > 1e-2
    assert "snrweights: <attached UNet2DModel: MinSNR(gamma=5.0) on the MSE of 'epsilon'" in errors["launch"]


# what they weigh ------------------------------------------------------------------------------------------------------

STEPS = 8
SHORT = COMMON | {"seed": 0, "max_train_steps": 2 * STEPS, "learning_rate": 1e-3}
MIN_SNR = {"snr_gamma": GAMMA}


def audit(script, options, folder):
    """Audit a script, which is ended before it saves anything; return what was read."""
    before = [SNRWEIGHTS, "audit", "--steps", STEPS, "--json", folder / "audit.json"]
    out, _ = run(script, options, folder / "trained", before)
    assert out.count(f"audit of {STEPS} steps, ") == 1
    found = json.loads((folder / "audit.json").read_text())
    assert found["steps"] == STEPS
    assert found["is_mse"]
    assert found["not_read"] == []
    assert found["constant"] == ("the same at every noise level" in out)
    return found


def assert_constant(found, target_as_expected=True):
    assert (found["constant"], found["target_as_expected"]) == (True, target_as_expected)


def assert_known_as(name, found):
    assert not found["constant"]
    assert found["known_as"][0] == name
    assert found["target_as_expected"] is True


@pytest.fixture
def text_to_image(pipeline, images):
    options = SHORT | {"pretrained_model_name_or_path": pipeline, "train_data_dir": images["captioned"]}
    return "text_to_image/train_text_to_image.py", options


@pytest.fixture
def with_an_instance(images):
    """What all DreamBooth scripts are told."""
    return SHORT | {"instance_data_dir": images["instances"], "instance_prompt": "a cat on a mat"}


def test_audit_of_text_to_image(text_to_image, tmp_path):
    script, options = text_to_image
    assert_constant(audit(script, options, tmp_path))
    assert not list((tmp_path / "trained").rglob("*.safetensors"))  # it was ended


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_audit_of_text_to_image_with_min_snr(prediction_type, text_to_image, tmp_path):
    script, options = text_to_image
    found = audit(script, options | MIN_SNR | {"prediction_type": prediction_type}, tmp_path)
    assert_known_as("min_snr(gamma=5)", found)


def test_audit_of_text_to_image_with_dream(text_to_image, tmp_path):
    script, options = text_to_image
    assert_constant(audit(script, options | {"dream_training": True}, tmp_path), target_as_expected=False)


def test_audit_of_text_to_image_with_input_perturbation(text_to_image, tmp_path):
    script, options = text_to_image
    options |= {"input_perturbation": 0.1}
    assert_constant(audit(script, options, tmp_path))
    assert_weighted_once(script, options, tmp_path)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_audit_of_unconditional(prediction_type, image_model, images, tmp_path):
    options = {"model_config_name_or_path": image_model, "train_data_dir": images["instances"], "num_epochs": STEPS}
    options |= UNCONDITIONAL | {"learning_rate": 1e-3, "prediction_type": prediction_type}
    found = audit("unconditional_image_generation/train_unconditional.py", options, tmp_path)
    if prediction_type == "sample":
        assert_known_as("the plain MSE of epsilon", found)
    else:
        assert_constant(found)


def test_audit_of_prior_preservation(pipeline, images, with_an_instance, tmp_path):
    prior = {"class_data_dir": images["instances"], "class_prompt": "a dog on a mat", "num_class_images": 8}
    prior |= {"with_prior_preservation": True, "prior_loss_weight": 0.5}
    options = with_an_instance | prior | {"pretrained_model_name_or_path": pipeline}
    found = audit("dreambooth/train_dreambooth.py", options, tmp_path)
    assert_constant(found)
    assert {round(weight, 3) for weight in found["weight"]} == {2.0, 1.0}


def test_audit_of_sdxl_with_min_snr_on_the_velocity(with_an_instance, tmp_path):
    pipeline = save_sdxl(tmp_path / "pipeline", prediction_type="v_prediction")
    options = with_an_instance | MIN_SNR | {"pretrained_model_name_or_path": pipeline, "rank": 2}
    found = audit("dreambooth/train_dreambooth_lora_sdxl.py", options, tmp_path)
    assert_known_as("diffusers_min_snr_v_plus_one(gamma=5)", found)


@pytest.mark.parametrize(
    ("script", "more"), [("train_dreambooth_sd3.py", {}), ("train_dreambooth_lora_sd3.py", {"rank": 2})]
)
def test_audit_of_sd3(script, more, with_an_instance, tmp_path):
    options = with_an_instance | more | {"max_sequence_length": 16}
    options |= {"pretrained_model_name_or_path": save_sd3(tmp_path / "pipeline")}
    assert_known_as("the plain MSE of sample", audit(f"dreambooth/{script}", options, tmp_path))


# launched, without a formula to compare with --------------------------------------------------------------------------


def assert_weighted_once(script, options, folder, passed_over=(), target_as_expected=True, sampler=None):
    before = [*LAUNCH, "--report", folder / "report.json", *(("--sampler", sampler) if sampler else ())]
    run(script, options, folder / "launched", before)
    report = json.loads((folder / "report.json").read_text())
    [attached] = report["attached"]
    assert attached["model"] == "UNet2DConditionModel"
    assert attached["weighted"]
    assert attached["method"] == "MinSNR(gamma=5.0)"
    found = attached["audit"]
    assert (found["steps"], found["is_mse"], found["not_read"]) == (8, True, [])
    assert_constant(found, target_as_expected)
    assert list(report["passed_over"]) == list(passed_over)
    assert (attached["sampler"] is None) == (sampler is None)


def test_launch_of_dreambooth_lora(pipeline, with_an_instance, tmp_path):
    options = with_an_instance | {"pretrained_model_name_or_path": pipeline, "rank": 2}
    assert_weighted_once("dreambooth/train_dreambooth_lora.py", options, tmp_path)


def test_launch_of_textual_inversion(pipeline, images, tmp_path):
    options = SHORT | {"pretrained_model_name_or_path": pipeline, "train_data_dir": images["instances"]}
    options |= {"placeholder_token": "zzz", "initializer_token": "a"}
    assert_weighted_once("textual_inversion/textual_inversion.py", options, tmp_path)


def test_launch_of_controlnet(pipeline, images, tmp_path):
    options = SHORT | {"pretrained_model_name_or_path": pipeline, "train_data_dir": images["conditioned"]}
    options |= {"controlnet_model_name_or_path": save_controlnet(tmp_path / "controlnet", pipeline)}
    del options["center_crop"]
    assert_weighted_once("controlnet/train_controlnet.py", options, tmp_path, passed_over=["ControlNetModel"])


def test_launch_of_instruct_pix2pix(pipeline, images, tmp_path):
    options = SHORT | {"pretrained_model_name_or_path": pipeline, "train_data_dir": images["edited"]}
    options |= {"original_image_column": "input_image", "edited_image_column": "edited_image"}
    options |= {"edit_prompt_column": "edit_prompt"}
    # the input has more channels than the noisy latents, so that the target cannot be told
    assert_weighted_once("instruct_pix2pix/train_instruct_pix2pix.py", options, tmp_path, target_as_expected=None)


# launched with timesteps that are redrawn: those of the noise, if the target is as expected ---------------------------

OPTIONS = [{"prediction_type": "v_prediction"}, {"dream_training": True}, {"input_perturbation": 0.1}]


@pytest.mark.parametrize("option", OPTIONS)
def test_sampler_in_text_to_image(option, text_to_image, tmp_path):
    script, options = text_to_image
    as_expected = "dream_training" not in option
    assert_weighted_once(script, options | option, tmp_path, target_as_expected=as_expected, sampler="gradient")


def test_sampler_in_dreambooth_and_accumulation(pipeline, with_an_instance, tmp_path):
    options = with_an_instance | {"pretrained_model_name_or_path": pipeline, "gradient_accumulation_steps": 2}
    assert_weighted_once("dreambooth/train_dreambooth.py", options, tmp_path, sampler="variance")


def test_sampler_is_refused_in_a_flow_script(with_an_instance, tmp_path):
    options = with_an_instance | {"max_sequence_length": 16, "output_dir": tmp_path / "out"}
    options |= {"pretrained_model_name_or_path": save_sd3(tmp_path / "pipeline")}
    before = [*LAUNCH, "--sampler", "gradient"]
    with pytest.raises(AssertionError, match="loops that train on FlowMatchEulerDiscreteScheduler mix noise in by"):
        run("dreambooth/train_dreambooth_sd3.py", options, tmp_path / "out", before)
