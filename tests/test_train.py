"""The reference script, run as a user runs it and checked down to its files."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from diffusers import DDPMPipeline, UNet2DModel
from PIL import Image
from snrweights.integrations.config import load_preset
from training import EXAMPLES, TINY, assert_bit_equal, final_state, main

import snrweights
from snrweights import get_weighting
from snrweights.runs import read_runs

pytestmark = pytest.mark.slow
SCRIPT = EXAMPLES / "train.py"
QUICK = ["--max-steps", "3", "--logging-steps", "2", "--num-samples", "6", "--num-inference-steps", "2"]
MEASURED = ["--process", "edm", "--time-density", "log_normal", "--method", "alsr", "--set"]
PRESETS = sorted(path.stem for path in (EXAMPLES / "configs").glob("digits*.yaml"))


def launch(*argv, cwd):
    command = [sys.executable, "-m", "accelerate.commands.launch", str(SCRIPT), *argv]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def offline(monkeypatch):
    for library in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{library}.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    done = launch(*QUICK, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "digits-smoothed_kl", done


def test_launched_without_a_flag_it_says_where_everything_is(run):
    output, done = run
    assert "runs/digits-smoothed_kl" in done.stdout
    assert "fd_pixels" in done.stdout
    assert {path.name for path in output.iterdir()} == {
        *("config.yaml", "metrics.jsonl", "samples.png", "loss_by_noise.png", "weights.png", "tracker.safetensors"),
        *("model", "results.json", "tensorboard"),
    }


def test_configuration_and_metrics(run):
    config = yaml.safe_load((run[0] / "config.yaml").read_text())
    expected = {"method": "smoothed_kl", "set": ["tau=0.2"], "normalize": "mean", "clamp_max": None}
    assert config["weight"] == {**expected, "learned_uncertainty": False}
    lines = [json.loads(line) for line in (run[0] / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == [2, 3]
    assert all(0 < line["loss"] < 10 for line in trained)
    assert trained[-1]["lr"] == pytest.approx(2e-3 * 3 / 100)
    (held_out,) = (line for line in lines if "validation_loss" in line)
    assert held_out["step"] == 3
    assert len(held_out["log_snr"]) == len(held_out["validation_loss_by_log_snr"]) > 15


def test_tracker_saw_every_sample(run):
    assert snrweights.LossVarianceTracker.load(run[0] / "tracker.safetensors").compute().count.sum() == 3 * 64


def test_model_loads_and_samples(run):
    pipeline = DDPMPipeline.from_pretrained(run[0] / "model")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.beta_schedule == "linear"
    assert 6e5 < sum(p.numel() for p in pipeline.unet.parameters()) < 8e5
    assert pipeline(batch_size=1, num_inference_steps=2).images[0].size == (8, 8)


def test_results(run):
    results = json.loads((run[0] / "results.json").read_text())
    assert results["seed"] == 0
    assert results["fd_pixels_6"] > results["fd_pixels_6_real_vs_real"] > 0
    assert results["kid_pixels_6"] > results["kid_pixels_6_real_vs_real"]
    assert "fid_6" not in results  # a distance in pixels is not one
    assert "_interpreter_path" not in results
    assert str(sys.prefix) not in json.dumps(results)


@pytest.mark.parametrize("name", ["samples.png", "loss_by_noise.png", "weights.png"])
def test_pictures_show_something(run, name):
    picture = Image.open(run[0] / name).convert("L")
    assert min(picture.size) > 60
    assert len(set(picture.resize((64, 64)).tobytes())) > 8


def test_a_run_is_not_overwritten_unasked(run):
    again = launch(*QUICK, cwd=run[0].parents[1])
    assert again.returncode != 0
    assert "holds a run" in again.stderr
    assert "--resume latest" in again.stderr


@pytest.mark.parametrize("preset", PRESETS)
def test_every_digits_preset_learns(tmp_path, preset):
    argv = [*TINY, "--max-steps", "40", "--logging-steps", "10", "--train-batch-size", "16", "--lr-scheduler"]
    main([*argv, "constant_with_warmup", "--preset", preset, "--output-dir", str(tmp_path / "run")])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # draws that move to where the gap is make the weighted loss larger; what is learnt is the gap
    losses = [line.get("gap", line["loss"]) for line in lines if "loss" in line]
    assert losses[-1] < 0.85 * losses[0]


@pytest.mark.parametrize(
    "options",
    [
        ["--prediction-type", "v_prediction", "--rescale-betas-zero-snr", "--method", "min_snr", "--set", "gamma=3"],
        ["--prediction-type", "sample", "--random-flip", "--normalize", "none", "--gradient-accumulation-steps", "2"],
        ["--mixed-precision", "bf16", "--dataloader-num-workers", "1", "--lr-scheduler", "linear"],
        ["--process", "edm", "--time-density", "log_uniform", "--method", "edm", "--gradient-checkpointing"],
        ["--process", "flow", "--shift", "3", "--method", "native", "--num-classes", "10", "--guidance-scale", "2"],
        ["--compile", "--max-steps", "2"],
        ["--features", "pixels", "lite0"],
        ["--process", "flow", "--method", "elbo", "--clamp-max", "100"],
    ],
    ids=lambda options: options[0] + "=" + options[1] if len(options) > 1 else options[0],
)
def test_options(tmp_path, options):
    main([*TINY, *QUICK, "--output-dir", str(tmp_path / "run"), *options])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["fd_pixels_6"] > 0
    assert ("fd_lite0_6" in results) == ("lite0" in options)


def test_a_conditional_model_is_given_the_classes(tmp_path):
    main([*TINY, *QUICK, "--num-classes", "10", "--class-dropout", "0", "--output-dir", str(tmp_path / "run")])
    unet = UNet2DModel.from_pretrained(tmp_path / "run" / "model" / "unet")
    assert unet.class_embedding.num_embeddings == 11
    x, t = torch.zeros(1, 1, 8, 8), torch.tensor([5])
    one, two = (unet(x, t, class_labels=torch.tensor([label])).sample for label in (1, 2))
    assert not torch.equal(one, two)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--method", "snr_plus_one", "--rescale-betas-zero-snr"], r"'epsilon' is not finite at t = 999"),
        (["--method", "min_snr", "--set", "gama=3"], r"no hyperparameter 'gama'; it takes \['gamma'\]"),
        (["--dataset", "no/such_data"], "neither a folder here nor a hub data set"),
        (["--validation-images", "5000"], r"`validation_images` must be in \[0, 1797\), got 5000"),
        (
            ["--process", "flow", "--time-density", "log_normal"],
            "must be one of .'uniform', 'logit_normal'",
        ),
        (["--gradient-accumulation-steps", "0"], "`--gradient-accumulation-steps` must be > 0, got 0"),
        (["--num-inference-steps", "1"], "`--num-inference-steps` must be > 1, got 1"),
        (["--ema-decay", "2"], r"`--ema-decay` must be in \[0, 1\), got 2"),
        (["--attention", "True", "False"], "`--attention` needs one entry per level, 1, got 2"),
        (["--features", "inception"], r"pip install 'snrweights\[fid\]'"),
        (["--resume", "nowhere"], "nowhere cannot be used"),
        (
            [*MEASURED, "form=loss_zscore", "center=batch", "--gradient-accumulation-steps", "2"],
            "compares the losses of a whole step.*center=ema",
        ),
        (
            [*MEASURED, "center=batch", "--importance", "gradient"],
            "takes its centre from what is drawn.*--set center=fixed",
        ),
        (
            ["--importance", "gradient", "--importance-floor", "0"],
            r"`--importance-floor` must be in \(0, 1\]",
        ),
        (["--importance-mode", "reweight"], "`--importance-mode reweight` does nothing.*give --importance"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, monkeypatch, argv, said):
    offline(monkeypatch)
    with pytest.raises(SystemExit, match=said):
        main([*TINY, *QUICK, "--output-dir", str(tmp_path / "run"), *argv])


def test_a_label_that_is_no_class_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"outside \[0, 3\): set `num_classes`"):
        main([*TINY, *QUICK, "--output-dir", str(tmp_path / "run"), "--num-classes", "3"])


PARAMETERS = {
    "cifar10-linear": 35_746_307,
    "cifar10-cosine": 35_746_307,
    "cifar10-edm": 35_746_307,
    "cifar100-edm": 35_746_307,
    "celeba64-cosine": 78_700_803,
    "cifar10-edm-optimal": 59_024_643,
    "cifar10-flow-optimal": 59_024_643,
    "fashion-mnist": 651_041,
}


@pytest.mark.parametrize("preset", PARAMETERS)
def test_a_dry_run_touches_everything_and_leaves_nothing(tmp_path, monkeypatch, capsys, preset):
    monkeypatch.chdir(tmp_path)
    offline(monkeypatch)
    main(["--preset", preset, "--dry-run"])
    said = capsys.readouterr().out
    assert "random images of the same schema stand in" in said
    assert f"parameters: {PARAMETERS[preset] / 1e6:.2f} M" in said
    assert ("pixels stand in" in said) == (preset != "fashion-mnist")
    assert "hours on one A100" in said
    assert "30% utilisation" in said
    assert list(tmp_path.iterdir()) == []


def preset_options(name):
    sys.path.insert(0, str(EXAMPLES))
    from options import Options, check_options

    options = load_preset(Options, EXAMPLES / "configs", name)
    check_options(options)
    return options


@pytest.mark.parametrize("preset", PARAMETERS)
def test_the_network_of_a_preset_has_the_size_that_is_stated(preset):
    options = preset_options(preset)
    from trainer import make_network

    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in make_network(options).parameters()) == PARAMETERS[preset]


def test_presets_of_a_study_differ_in_what_the_study_compares():
    linear, cosine = (preset_options(f"cifar10-{name}") for name in ("linear", "cosine"))
    cosine.process.beta_schedule, cosine.preset = "linear", linear.preset
    assert cosine == linear
    ten, hundred = preset_options("cifar10-edm"), preset_options("cifar100-edm")
    assert (hundred.data.dataset, hundred.data.label_column) == ("uoft-cs/cifar100", "fine_label")
    hundred.data, hundred.preset = ten.data, ten.preset
    assert hundred == ten


@pytest.mark.parametrize("name", ["digits-edm-optimal", "cifar10-edm-optimal", "cifar10-flow-optimal"])
def test_presets_of_the_optimal_loss_are_weighted_and_drawn_by_it(name):
    options = preset_options(name)
    asked = options.weight.method, options.sampler.importance, options.sampler.importance_mode
    assert asked == ("optimal_loss", "gap", "uncorrected")
    assert options.output.optimal_loss == "measure"


def test_the_settings_of_the_alsr_study():
    options = preset_options("cifar10-edm")
    process, optimizer = options.process, options.optimizer
    assert (process.density_mean, process.density_std, process.sigma_data) == (-1.2, 1.2, 0.5)
    assert (process.sigma_min, process.sigma_max, options.output.num_inference_steps) == (0.002, 80, 50)
    assert (optimizer.max_steps, optimizer.train_batch_size, optimizer.learning_rate) == (60_000, 128, 2e-4)
    assert optimizer.ema_decay == 0.9995
    assert {10_000, 30_000} < set(options.output.evaluation_steps)
    assert (options.output.num_samples, set(options.output.evaluation_samples)) == (50_000, {5_000, 50_000})


def test_presets_are_complete():
    sys.path.insert(0, str(EXAMPLES))
    from options import Options

    for path in (EXAMPLES / "configs").glob("*.yaml"):
        assert load_preset(Options, path.parent, path.stem).preset == path.stem


@pytest.mark.parametrize("form", ["cauchy", "loss_zscore"])
def test_a_measured_centre_is_resumed_bit_equal(tmp_path, form):
    argv = [*TINY, *QUICK, "--gradient-accumulation-steps", "2", "--checkpointing-steps", "2"]
    argv += [*MEASURED, f"form={form}", "center=ema"]
    first, second = tmp_path / "first", tmp_path / "second"
    main([*argv, "--output-dir", str(first)])
    (second / "checkpoints").mkdir(parents=True)
    (second / "checkpoints" / "step-00000002").symlink_to(first / "checkpoints" / "step-00000002")
    main([*argv, "--output-dir", str(second), "--resume", "latest"])
    state = final_state(first, 3)
    assert_bit_equal(state, final_state(second, 3))
    # of 4 samples a pass, 2 passes a step: timesteps fade by step, losses by pass
    batches = [8] * 3 if form == "cauchy" else [4] * 6
    assert state["weight.sums"][0].item() == pytest.approx(sum(n * 0.99**i for i, n in enumerate(batches)))


def test_the_variance_of_runs_is_drawn_from_their_folders(run, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    import variance_by_noise

    figure = tmp_path / "variance.png"
    monkeypatch.setattr(sys, "argv", ["variance_by_noise.py", str(run[0]), str(run[0]), "-o", str(figure)])
    variance_by_noise.main()
    assert str(figure) in capsys.readouterr().out
    assert figure.stat().st_size > 10_000
    (read,) = read_runs([run[0]])
    assert read.statistics().count.sum() == 3 * 64  # no snapshot before half of the run
    assert repr(read.curve.weighting) == "SmoothedKL(tau=0.2, coords='vp')"
    (run[0].parent / "empty").mkdir()
    (run[0].parent / "empty" / "results.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["variance_by_noise.py", str(run[0].parent / "empty")])
    with pytest.raises(SystemExit, match=r"empty has no tracker.safetensors or no weight. there is no config.yaml"):
        variance_by_noise.main()


def stub_trainer(options):
    sys.path.insert(0, str(EXAMPLES))
    import train

    trainer = object.__new__(train.Trainer)
    trainer.options, trainer.process, trainer.accumulation = (
        options,
        train.PROCESSES[options.process.process](options.process),
        1,
    )
    return trainer


class OneOf:
    """In an Accelerator's place: one of so many processes."""

    device = torch.device("cpu")

    def __init__(self, rank, world):
        self.process_index, self.num_processes = rank, world


def options_of_train():
    sys.path.insert(0, str(EXAMPLES))
    from options import Options

    return Options()


def test_micro_batches_of_a_step_have_the_weights_of_one_batch():
    options = options_of_train()
    options.process.process, options.process.time_density = "edm", "log_normal"
    options.optimizer.train_batch_size = 4
    trainer = stub_trainer(options)
    schedule, weighting = trainer.process.schedule, get_weighting("alsr", center="batch")
    trainer.accumulation = 3

    def bound():
        return weighting.bind(schedule, prediction_type="edm")

    def drawn(rank):
        trainer.accelerator = OneOf(rank, 2)
        trainer.sampler = trainer.make_sampler(weighting)
        return trainer.draw_timesteps(range(6, 9))

    sums = []
    for rank in (0, 1, 0, 1):  # the first two for their sums alone
        trainer.weight, trainer.center_ahead = bound(), True
        trainer.weight.reduce = (lambda own: sums.append(own) or own) if len(sums) < 2 else (lambda own: sum(sums))
        t = [part.t for part in drawn(rank)]
        weights = torch.cat([trainer.weight(part) for part in t])
    everywhere = torch.cat([*(part.t for part in drawn(0)), *t])
    torch.testing.assert_close(weights, bound()(everywhere)[12:], rtol=1e-6, atol=0)


def test_each_process_resumes_its_own_history_of_losses():
    options = options_of_train()
    options.sampler.importance = "loss_second_moment"
    trainer, states = stub_trainer(options), []

    def on(rank, gather):
        trainer.accelerator = OneOf(rank, 2)
        trainer.accelerator.gather, trainer.accelerator.reduce = gather, lambda own, reduction: own
        trainer.sampler = trainer.make_sampler(get_weighting("ddpm"))
        return trainer

    for rank in (0, 1):
        of_one = on(rank, lambda own: own)
        of_one.sampler.update(torch.tensor([5]), torch.tensor([1.0 + rank]))
        states.append(of_one.sampler_state())
    together = {name: torch.cat([state[name] for state in states]) for name in states[0]}
    for rank in (0, 1):
        resumed = on(rank, lambda own: own)
        resumed.restore_sampler(together)
        assert resumed.sampler.state_dict()["evidence.losses"].max() == 1 + rank


@pytest.mark.parametrize("draws", ["independent", "antithetic", "stratified"])
def test_draws_do_not_depend_on_the_number_of_processes(draws):
    options = options_of_train()
    options.data.random_flip = True
    trainer, weighting = stub_trainer(options), get_weighting("min_snr")
    images, labels = torch.randn(8, 1, 4, 4), torch.arange(8)
    options.sampler.draws = draws

    def drawn(rank, world):
        trainer.accelerator = OneOf(rank, world)
        here = slice(8 // world * rank, 8 // world * (rank + 1))
        sampler = trainer.make_sampler(weighting)
        return *trainer.draw(images[here], labels[here], 5), *sampler.draw(8 // world, index=5)

    for one, two in zip(drawn(0, 1), zip(drawn(0, 2), drawn(1, 2), strict=True), strict=True):
        assert torch.equal(one, torch.cat(two))
