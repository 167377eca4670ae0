"""``snrweights diagnose``: models and runs in folders."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from snrweights.integrations.data import load_images
from snrweights.integrations.processes import PROCESSES
from snrweights.integrations.reference_data import load_reference
from snrweights.integrations.trained import load_trained
from training import TINY, main

from snrweights.cli import main as cli
from snrweights.process import add_noise, to_x0

QUICK = ("--levels", "4", "--log-snr", "-4", "2", "--draws", "32")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two tiny runs: discrete with its floor measured, and EDM without."""
    folder = tmp_path_factory.mktemp("runs")
    for preset, extra in (("digits", ["--optimal-loss", "measure"]), ("digits-edm", [])):
        main(["--preset", preset, *TINY, "--max-steps", "3", "--output-dir", str(folder / preset), *extra])
    return folder


def test_runs_are_diagnosed_side_by_side_on_the_data_that_they_were_trained_on(runs, tmp_path, capsys):
    status = cli(["diagnose", str(runs / "digits"), str(runs / "digits-edm"), *QUICK, "-o", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert status == 0, out
    found = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("digits", "digits-edm")}
    for name, facts in found.items():
        assert f"# {name}\n" in out
        assert len(facts["levels"]) == 4
        assert facts["gap_nats"] > 10 * facts["gap_nats_stderr"] > 0  # three steps teach nothing
        assert facts["warnings"] == []
    discrete = [level["log_snr"] for level in found["digits"]["levels"]]
    table = PROCESSES["discrete"](_options()).schedule.log_snr_table
    assert all(min(abs(table - level)) < 1e-9 for level in discrete)
    assert [level["log_snr"] for level in found["digits-edm"]["levels"]] == pytest.approx([-4, -2, 0, 2])
    assert (tmp_path / "out" / "table.md").read_text() in out
    with Image.open(tmp_path / "out" / "gap.png") as figure:
        assert figure.size[0] > 1000


def _options():
    return SimpleNamespace(
        prediction_type="epsilon", beta_schedule="linear", num_train_timesteps=1000, rescale_betas_zero_snr=False
    )


def test_a_model_told_to_be_of_fewer_data_is_found_out(runs, tmp_path, capsys):
    curve, out = str(tmp_path / "curve.safetensors"), str(tmp_path / "out")
    assert cli(["optimal-loss", "digits", "--sigmas", "30", "--sigma-min", "0.1", "-o", curve]) == 0
    options = ["--data", "digits", "--curve", curve, "--flips", "--draws", "256", "-o", out]
    assert cli(["diagnose", str(runs / "digits-edm"), *QUICK, *options]) == 1
    assert "Something does not match. The curve is of other data" in capsys.readouterr().out


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_pipeline_denoises_as_its_target_says(prediction_type, tmp_path):
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(32,),
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path)
    model = load_trained(tmp_path, "m")
    assert model.prediction_type == prediction_type
    x0, noise = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([10, 400, 900])
    level = model.schedule.log_snr(t).float()
    x = add_noise(x0, noise, level)
    with torch.no_grad():
        expected = to_x0(unet.eval()(x, t).sample, x, level, prediction_type)
        found = model.denoise(x0 + torch.exp(-level / 2)[:, None, None, None] * noise, level)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_flow_and_edm_models_denoise_as_in_training(tmp_path):
    flow = SimpleNamespace(time_density="uniform", density_mean=0, density_std=1, shift=1.0)
    edm = SimpleNamespace(
        time_density="log_normal", density_mean=-1.2, density_std=1.2, sigma_data=0.5, sigma_min=0.002, sigma_max=80.0
    )
    for name, options in (("flow", flow), ("edm", edm)):
        process = PROCESSES[name](options)
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(32,),
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        ).eval()  # fmt: skip
        DDPMPipeline(unet, process.scheduler).save_pretrained(tmp_path / name)
        model = load_trained(tmp_path / name, name)
        x0, noise = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        level = torch.tensor([-3.0, 0.0, 3.0])
        x, _ = process.noisy_and_target(x0, noise, level)
        t = process.schedule.timestep_of(level).float()
        with torch.no_grad():
            prediction = process.wrap(unet)(x, t)
            expected = to_x0(
                prediction, x, level, process.prediction_type, process.schedule.coords, process.schedule.sigma_data
            )
            found = model.denoise(x0 + torch.exp(-level / 2)[:, None, None, None] * noise, level)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no folder"),
        (["{empty}"], "holds neither a pipeline (model_index.json) nor a model (config.json)"),
        (["{run}/model"], "`--data` must be given"),
        (["{run}/model/unet", "--data", "digits"], "has no scheduler beside it: name one with `--scheduler`"),
        (["{run}/model/unet", "--data", "digits", "--scheduler", "linear"], "`prediction_type` of unet must be given"),
        (["{run}", "--data", "digits", "--labels", "label"], "is told no class"),
        (["{run}", "--curve", "nowhere.safetensors"], "nowhere.safetensors"),
        (["{run}", "--unit", "edm"], "`--unit edm` needs a sigma_data, which digits has none of"),
        (["{run}", "--levels", "1"], "`--levels` must be at least 2, got 1"),
        (["{run}", "--log-snr", "20", "30"], "has not two noise levels at log-SNR 20.0 to 30.0: its schedule reaches"),
    ],
)
def test_what_it_cannot_diagnose_is_named(runs, tmp_path, arguments, message, capsys):
    (tmp_path / "empty").mkdir()
    places = {"run": str(runs / "digits"), "empty": str(tmp_path / "empty")}
    filled = [word.format(**places) for word in arguments]
    assert cli(["diagnose", *filled, "--draws", "32", "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_images_in_a_file_are_taken_as_they_are(runs, tmp_path, capsys):
    pixels = torch.stack(list(load_reference("digits")[0]))
    np.save(tmp_path / "digits.npy", pixels.numpy())
    for source in ("digits", str(tmp_path / "digits.npy")):
        options = ["--data", source, "-o", str(tmp_path / "out")]
        assert cli(["diagnose", str(runs / "digits-edm"), *QUICK, *options]) == 0
    first, second = capsys.readouterr().out.split("Wrote")[:2]
    assert first.strip() == second.split("/\n", 1)[1].strip()
    np.save(tmp_path / "colour.npy", pixels.expand(-1, 3, -1, -1).numpy())
    assert cli(["diagnose", str(runs / "digits-edm"), "--data", str(tmp_path / "colour.npy")]) == 2
    assert "has 3 channels; digits-edm takes 1" in capsys.readouterr().err


def test_a_model_is_told_the_classes_as_they_are(tmp_path, monkeypatch, capsys):
    rows = load_images("digits").filter(lambda row: row["label"] in (2, 5, 7))
    rows.save_to_disk(str(tmp_path / "some"))
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(32,),
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), num_class_embeds=10,
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "model")
    told, forward = set(), UNet2DModel.forward

    def listen(self, *args, class_labels, **kwargs):
        told.update(class_labels.tolist())
        return forward(self, *args, class_labels=class_labels, **kwargs)

    monkeypatch.setattr(UNet2DModel, "forward", listen)
    data = ["--data", str(tmp_path / "some"), "-o", str(tmp_path / "out")]
    assert cli(["diagnose", str(tmp_path / "model"), *QUICK, *data, "--labels", "label"]) == 0, capsys.readouterr().out
    assert told == {2, 5, 7}
    unet.register_to_config(num_class_embeds=7)
    monkeypatch.undo()
    small = UNet2DModel.from_config({**unet.config, "num_class_embeds": 7})
    DDPMPipeline(small, DDPMScheduler()).save_pretrained(tmp_path / "small")
    assert cli(["diagnose", str(tmp_path / "small"), *QUICK, *data, "--labels", "label"]) == 2
    assert "`--labels` 'label' holds 2 to 7; small knows 0 to 6" in capsys.readouterr().err


def test_ctrl_c_is_no_traceback(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("snrweights.integrations.diagnosed.load_trained", interrupted)
    assert cli(["diagnose", "/"]) == 130
    assert "snrweights diagnose: interrupted" in capsys.readouterr().err


def test_a_model_of_another_kind_is_refused(tmp_path, capsys):
    (tmp_path / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DConditionModel"]}))
    assert cli(["diagnose", str(tmp_path), "--data", "digits"]) == 2
    assert "a pipeline of {'unet': 'UNet2DConditionModel'}; `diagnose` reads those with" in capsys.readouterr().err
