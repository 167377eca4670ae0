"""examples/train_masked.py, run as a user runs it and checked down to its files; its model, weights and draws."""

import ast
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from scipy.integrate import quad
from sklearn.datasets import load_digits
from snrweights.integrations.config import load_preset
from snrweights.integrations.data import ImageTensors, load_images, split
from snrweights.integrations.masked_sampling import SAMPLERS
from snrweights.integrations.results import image_grid, to_bytes
from training import EXAMPLES, assert_bit_equal, main, start

from snrweights.masked import get_masked_schedule, list_masked_weightings, negative_elbo
from snrweights.seeds import generator

sys.path.insert(0, str(EXAMPLES))
import masked_trainer
from base_trainer import SAMPLES, VALIDATION
from masked_model import PixelTransformer, to_images, to_tokens
from masked_options import Options, check_options

pytestmark = pytest.mark.slow
PRESETS = EXAMPLES / "configs" / "masked"
SMALL = ["--hidden-size", "16", "--num-layers", "1", "--num-heads", "2", "--train-batch-size", "4", "--elbo-draws", "2"]
TINY = [
    *SMALL,
    "--validation-images",
    "4",
    "--num-samples",
    "4",
    "--num-inference-steps",
    "2",
    "--lr-warmup-steps",
    "3",
]
STEPS = 5
RUN = [*TINY, "--max-steps", str(STEPS), "--checkpointing-steps", "2", "--dropout", "0.1", "--num-classes", "10"]
RUN += ["--gradient-accumulation-steps", "2", "--logging-steps", "2", "--checkpoints-total-limit", "9"]


def lines(run, name):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in found if name in line}


def train(output, *argv):
    main([*map(str, argv), "--output-dir", str(output)], script="train_masked")


def state(run, step=STEPS):
    tensors = load_file(run / "checkpoints" / f"step-{step:08d}" / "state.safetensors")
    del tensors["seconds"]
    assert {name.split(".")[0] for name in tensors} == {"model", "optimizer", "ema", "running"}
    saved = load_file(run / "model" / "diffusion_pytorch_model.safetensors")
    return tensors | {f"saved.{name}": value for name, value in saved.items()}


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Without a flag but those that make it short."""
    folder = tmp_path_factory.mktemp("launch")
    command = [sys.executable, "-m", "accelerate.commands.launch", str(EXAMPLES / "train_masked.py")]
    command += ["--max-steps", "3", "--num-samples", "6", "--num-inference-steps", "3", "--elbo-draws", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "masked-digits-simple", done.stdout


def test_launched_without_a_flag_it_says_where_everything_is(launched):
    output, said = launched
    assert "Everything is in runs/masked-digits-simple" in said
    assert "fd_pixels_6" in said
    names = {"config.yaml", "metrics.jsonl", "samples.png", "weights.png", "model", "results.json", "tensorboard"}
    assert {path.name for path in output.iterdir()} == names
    for name in ("samples.png", "weights.png"):
        assert len(set(Image.open(output / name).convert("L").resize((64, 64)).tobytes())) > 8


def test_configuration_and_results(launched):
    output, _ = launched
    config = yaml.safe_load((output / "config.yaml").read_text())
    assert config["weight"] == {"method": "simple", "set": [], "normalize": "mean"}
    assert config["masking"] == {"schedule": "linear", "counts": "independent", "draws": "antithetic"}
    results = json.loads((output / "results.json").read_text())
    assert results["fd_pixels_6"] > results["fd_pixels_6_real_vs_real"] > 0
    assert results["sampler"] == "ancestral"
    # untrained: about ln 17 nats for each of 64 pixels
    assert results["negative_elbo"] == pytest.approx(64 * math.log(17), rel=0.05)
    assert results["bits_per_dim"] == pytest.approx(results["negative_elbo"] / 64 / math.log(2), rel=1e-12)
    assert 0 < results["bits_per_dim_standard_error"] < 0.1


def test_the_saved_model_loads(launched):
    network = PixelTransformer.from_pretrained(launched[0] / "model")
    assert sum(parameter.numel() for parameter in network.parameters()) == 210_116
    logits = network(torch.full((2, 64), 17))
    assert logits.shape == (2, 64, 17)
    assert logits.isfinite().all()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "run"
    train(output, *RUN, "--evaluation-steps", 2, 3, "--evaluation-samples", 6, "--validation-steps", 2)
    return output


def test_the_elbo_and_distances_are_logged_over_steps(run):
    assert set(lines(run, "negative_elbo")) == {2, 4, 5}
    for name in ("", "_standard_error"):
        nats, bits = lines(run, f"negative_elbo{name}"), lines(run, f"bits_per_dim{name}")
        assert bits == pytest.approx({step: value / (64 * math.log(2)) for step, value in nats.items()})
    assert set(lines(run, "fd_pixels_6")) == {2, 3, 5}
    assert set(lines(run, "loss")) == {2, 4, 5}
    assert len(set(lines(run, "fd_pixels_6").values())) == 3


def test_what_is_measured_is_the_averaged_model_that_is_saved(run):
    """Its ELBO on the held-out images, and its samples, made anew from the files."""
    options = load_preset(Options, PRESETS, "digits")
    network = PixelTransformer.from_pretrained(run / "model").eval()
    _, held_out = split(ImageTensors(load_images("digits"), "image", 8, 1, "label", 10), 4, 0)
    images, labels = map(torch.stack, zip(*held_out, strict=True))
    found = negative_elbo(
        lambda tokens: network(tokens, labels), to_tokens(images, 17), 17, draws=2, generator=generator(0, VALIDATION)
    )
    assert found.nats == pytest.approx(lines(run, "negative_elbo")[STEPS], rel=1e-6)
    sampled = SAMPLERS["ancestral"](
        lambda tokens: network(tokens, torch.arange(6)),
        torch.full((6, 64), 17),
        17,
        get_masked_schedule(options.output.sampling_schedule),
        2,
        generators=[generator(0, SAMPLES, i) for i in range(6)],
    )
    grid = image_grid(to_bytes(to_images(sampled, 17, 1, 8)))
    assert grid.tobytes() == Image.open(run / "samples.png").tobytes()


def test_measuring_changes_no_bit_of_the_run_and_neither_does_a_restart(run, tmp_path):
    shutil.copytree(run / "checkpoints" / "step-00000002", tmp_path / "run" / "checkpoints" / "step-00000002")
    train(tmp_path / "run", *RUN, "--resume", "latest")
    assert_bit_equal(state(tmp_path / "run"), state(run))
    assert set(lines(tmp_path / "run", "loss")) == {4, 5}
    assert lines(tmp_path / "run", "negative_elbo")[5] == lines(run, "negative_elbo")[5]
    assert lines(tmp_path / "run", "fd_pixels_4") == {5: lines(run, "fd_pixels_4")[5]}


def test_a_signal_leaves_a_checkpoint_and_a_damaged_one_is_passed_over(run, tmp_path):
    output = tmp_path / "run"
    child = start([*RUN, "--output-dir", str(output), "--max-steps", "5000"], script="train_masked")
    metrics, end = output / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and "\n" in metrics.read_text()):
        assert time.monotonic() < end
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGTERM)
    child.join(60)
    assert child.exitcode == 128 + signal.SIGTERM
    last = sorted((output / "checkpoints").iterdir())[-1]
    shutil.rmtree(output / "checkpoints")
    for step, damaged in ((2, False), (4, True)):
        copied = output / "checkpoints" / f"step-{step:08d}"
        shutil.copytree(run / "checkpoints" / copied.name, copied)
        if damaged:
            with (copied / "state.safetensors").open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"\xff")
    assert int(last.name.removeprefix("step-")) >= 2
    train(output, *RUN, "--resume", "latest")
    assert_bit_equal(state(output), state(run))


def test_options_that_change_the_run_are_refused(run):
    with pytest.raises(SystemExit, match=r"masking\.schedule: linear -> cosine; weight\.method: simple -> flow"):
        train(run, *RUN, "--resume", "latest", "--schedule", "cosine", "--method", "flow")


@pytest.mark.parametrize(
    "options",
    [
        [
            "--sampler",
            "confidence",
            "--method",
            "sigmoid",
            "--set",
            "bias=2",
            "--patch-size",
            "1",
            "--draws",
            "stratified",
        ],
        ["--num-classes", "10", "--guidance-scale", "2", "--schedule", "cosine", "--method", "simple", "--random-flip"],
        ["--counts", "exact", "--method", "edm", "--mixed-precision", "bf16", "--gradient-checkpointing"],
        [
            "--schedule",
            "polynomial",
            "--method",
            "flow",
            "--levels",
            "256",
            "--normalize",
            "none",
            "--temperature",
            "0.9",
        ],
    ],
    ids=lambda options: options[1],
)
def test_options(tmp_path, options):
    train(tmp_path / "run", *TINY, "--max-steps", 2, *options)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["fd_pixels_4"] > 0
    assert 0 < results["negative_elbo"] < 1000
    assert results["method"] == options[options.index("--method") + 1] if "--method" in options else True


def test_it_learns(tmp_path):
    argv = ["--max-steps", 60, "--train-batch-size", 32, "--hidden-size", 32, "--validation-steps", 20]
    train(tmp_path / "run", *TINY, *argv, "--lr-scheduler", "constant_with_warmup", "--elbo-draws", 16)
    bits = list(lines(tmp_path / "run", "bits_per_dim").values())
    assert bits[0] > bits[1] > bits[2]
    assert bits[2] < 0.75 * math.log2(17)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--method", "min_snr"], r"choose one of \['elbo', 'simple', 'flow', 'sigmoid', 'iddpm', 'edm'\]"),
        (["--method", "sigmoid", "--set", "bais=1"], r"no hyperparameter 'bais'; it takes \['bias'\]"),
        (["--patch-size", "3"], "`--patch-size` must divide `--resolution`, 8, got 3"),
        (["--num-heads", "3"], "`--num-heads` must divide `--hidden-size`, 16, got 3"),
        (["--levels", "257"], "`--levels` must be at most 256"),
        (["--levels", "1"], "`--levels` must be > 1, got 1"),
        (["--temperature", "-1"], "`--temperature` must be >= 0, got -1.0"),
        (["--choice-temperature", "2"], "`--choice-temperature 2.0` does nothing.*give --sampler confidence"),
        (["--elbo-draws", "0"], "`--elbo-draws` must be > 0, got 0"),
        (["--preset", "digit"], r"Unknown preset 'digit'; choose one of \['digits', 'imagenet64'\]"),
        (["--prediction-type", "sample"], "Unknown option '--prediction-type'"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, argv, said):
    with pytest.raises(SystemExit, match=said):
        train(tmp_path / "run", *TINY, *argv)


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path, monkeypatch):
    """As torchrun starts them where there is no GPU, without ACCELERATE_USE_CPU."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match=r"2 processes were launched, but accelerate sees 1: .*ACCELERATE_USE_CPU"):
        train(tmp_path / "run", *TINY)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_touches_everything_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    """Of ImageNet-64 with a smaller transformer: the whole one takes minutes on a CPU."""
    monkeypatch.chdir(tmp_path)
    for library in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{library}.HF_HUB_OFFLINE", True)
    argv = ["--preset", "imagenet64", "--dry-run", "--hidden-size", "16", "--num-layers", "1", "--num-heads", "2"]
    main(argv, script="train_masked")
    said = capsys.readouterr().out
    assert "random images of the same schema stand in" in said
    assert re.search(r"estimated time: [\d.]+ hours on one A100", said)
    assert "32 x 8 images per process" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("preset", "size"), [("digits", 210_116), ("imagenet64", 310_691_840)])
def test_the_network_of_a_preset_has_the_size_that_is_stated(preset, size):
    options = load_preset(Options, PRESETS, preset)
    check_options(options)
    with torch.device("meta"):
        network = masked_trainer.make_network(options)
    assert sum(parameter.numel() for parameter in network.parameters()) == size


def test_digits_are_their_grey_levels_and_bytes_are_bytes():
    images = torch.stack([image for image, _ in ImageTensors(load_images("digits"), "image", 8, 1)])
    tokens = to_tokens(images, 17)
    assert torch.equal(tokens, torch.tensor(load_digits().images).long().flatten(1))
    assert torch.equal(to_bytes(to_images(tokens, 17, 1, 8)), to_bytes(images))
    every = torch.arange(256).reshape(1, 256)
    assert torch.equal(to_tokens(to_images(every, 256, 1, 16), 256), every)
    assert torch.equal(to_bytes(to_images(every, 256, 1, 16)).flatten().long(), every[0])


@pytest.mark.parametrize(("patch_size", "channels"), [(1, 1), (2, 1), (2, 3), (4, 3)])
def test_logits_stand_where_their_tokens_do(patch_size, channels):
    network = PixelTransformer(8, channels, 5, patch_size, hidden_size=8, num_layers=1, num_heads=2)
    tokens = torch.randint(0, 5, (2, channels * 64), generator=torch.Generator().manual_seed(0))
    squares = network._squares(tokens)
    assert squares.shape == (2, (8 // patch_size) ** 2, channels * patch_size**2)
    first = tokens.reshape(2, channels, 8, 8)[:, :, :patch_size, :patch_size]
    assert torch.equal(squares[:, 0], first.flatten(1))
    one_hot = torch.nn.functional.one_hot(squares, 5).flatten(2)
    assert torch.equal(network._pixels(one_hot).argmax(-1), tokens)


def test_every_token_sees_every_other_and_the_class():
    torch.manual_seed(0)
    network = PixelTransformer(4, 1, 3, 2, hidden_size=16, num_layers=1, num_heads=2, num_classes=2).eval()
    torch.nn.init.normal_(network.head.weight)
    tokens, labels = torch.zeros(1, 16, dtype=torch.long), torch.tensor([0])
    before = network(tokens, labels)
    for place in range(16):
        changed = tokens.clone()
        changed[0, place] = 3
        assert (network(changed, labels) - before).abs().amax(-1).gt(1e-6).all()
    assert (network(tokens, labels + 1) - before).abs().amax(-1).gt(1e-6).all()


@pytest.mark.parametrize("num_classes", [0, 2])
def test_logits_are_those_of_their_own_position(num_classes):
    """Seen where blocks do nothing, so that a position knows of itself alone."""
    network = PixelTransformer(4, 1, 3, 2, hidden_size=16, num_layers=1, num_heads=2, num_classes=num_classes).eval()
    torch.nn.init.normal_(network.head.weight)
    for block in network.blocks:
        for layer in (block.self_attn.out_proj, block.linear2):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    tokens, labels = torch.zeros(1, 16, dtype=torch.long), torch.tensor([0])
    changed = tokens.clone()
    changed[0, 6] = 3  # in the square on the upper right
    moved = (network(changed, labels) - network(tokens, labels)).abs().amax(-1)[0]
    assert moved.gt(1e-6).nonzero().flatten().tolist() == [2, 3, 6, 7]


def options_of(*changes):
    options = load_preset(Options, PRESETS, "digits")
    for section, name, value in changes:
        setattr(getattr(options, section), name, value)
    return options


def weight_of(method, schedule, **masking):
    changes = [("weight", "method", method), *(("masking", name, value) for name, value in masking.items())]
    return masked_trainer.MaskedWeight(options_of(*changes), get_masked_schedule(schedule))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial"])
@pytest.mark.parametrize("method", list_masked_weightings())
def test_a_weight_averages_one_over_the_mask_ratio(method, schedule):
    weight = weight_of(method, schedule)

    def at(root):  # r = 1 - root², which takes the infinity of flow away
        return weight(torch.tensor(1 - root**2, dtype=torch.float64)).item() * 2 * root

    assert quad(at, 0, 1, epsabs=1e-9, limit=200)[0] == pytest.approx(1, abs=2e-6)


@pytest.mark.parametrize("counts", ["independent", "exact"])
@pytest.mark.parametrize(("method", "schedule"), [("elbo", "linear"), ("simple", "cosine"), ("sigmoid", "polynomial")])
def test_a_loss_counts_tokens_as_the_elbo_does(method, schedule, counts):
    """Where nothing is known, ln 17 for each token, it is ln 17 on average whatever weight, schedule and counts."""
    weight, count = weight_of(method, schedule, counts=counts), 20_000
    t = (torch.arange(count) + 0.5) / count
    tokens = torch.zeros(count, 16, dtype=torch.long)
    stream = torch.Generator().manual_seed(0)
    _, mask = masked_trainer.mask_tokens(tokens, t, weight.schedule, 17, counts=counts, generator=stream)
    losses = weight.losses(torch.zeros(count, 16, 17), tokens, mask, t)
    assert losses.mean().item() == pytest.approx(math.log(17), rel=0.02)


class OneOf:
    """In an Accelerator's place: one of so many processes."""

    device = torch.device("cpu")

    def __init__(self, rank, world):
        self.process_index, self.num_processes = rank, world


def stub_trainer(options, rank=0, world=1):
    trainer = object.__new__(masked_trainer.MaskedTrainer)
    trainer.options, trainer.accelerator = options, OneOf(rank, world)
    trainer.schedule, trainer.mask_id = get_masked_schedule(options.masking.schedule), options.data.levels
    return trainer


@pytest.mark.parametrize("draws", ["independent", "antithetic", "stratified"])
@pytest.mark.parametrize("counts", ["independent", "exact"])
def test_draws_do_not_depend_on_the_number_of_processes(draws, counts):
    images, labels = torch.rand(8, 1, 8, 8) * 2 - 1, torch.arange(8)

    def drawn(rank, world):
        changes = [("masking", "draws", draws), ("masking", "counts", counts), ("data", "random_flip", True)]
        options = options_of(*changes, ("optimizer", "train_batch_size", 8 // world))
        trainer = stub_trainer(options, rank, world)
        here = slice(8 // world * rank, 8 // world * (rank + 1))
        times = trainer.draw_timesteps(range(6, 8))
        return trainer.draw(images[here], labels[here], 7, times[1])

    alone = drawn(0, 1)
    for one, two in zip(alone, zip(drawn(0, 2), drawn(1, 2), strict=True), strict=True):
        assert torch.equal(one, torch.cat(two))
    _, mask, _, t = alone
    if counts == "exact":
        assert torch.equal(mask.sum(1), (t.double() * 64).ceil().long())


def test_times_are_spread_over_all_that_a_step_draws():
    options = options_of(("masking", "draws", "stratified"), ("optimizer", "train_batch_size", 4))
    times = torch.cat(stub_trainer(options).draw_timesteps(range(2)))
    assert (8 * times).floor().sort().values.tolist() == list(range(8))


def test_the_elbo_is_measured_with_the_class_of_each_image():
    options = options_of(
        ("model", "num_classes", 10), ("optimizer", "train_batch_size", 3), ("output", "elbo_draws", 2)
    )
    trainer = stub_trainer(options)
    trainer.averaged_weights = lambda: torch.no_grad()
    labels = torch.arange(8)
    images = to_images(labels[:, None].expand(8, 64), 17, 1, 8)  # of class i all pixels have level i
    asked = []

    def predict(tokens, classes):
        known = tokens != 17
        assert torch.equal(tokens[known], classes[:, None].expand_as(tokens)[known])
        asked.append(len(tokens))
        return torch.nn.functional.one_hot(classes[:, None].expand_as(tokens), 17) * 50.0

    class Log:
        def write(self, step, **values):
            assert step == 3
            assert values["negative_elbo"] == pytest.approx(0, abs=1e-6)

    trainer.predict = predict
    trainer.validate((images, labels), 3, Log())
    assert asked == [3, 3, 2] * 2


def test_the_guide_has_every_flag_with_its_meaning():
    guides = "".join((EXAMPLES / "guides" / f"{name}.md").read_text() for name in ("bounds", "training"))
    tree = ast.parse((EXAMPLES / "masked_options.py").read_text())
    found = 0
    for body in (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name != "Options"):
        for field, meaning in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign):
                found += 1
                said = " ".join(meaning.value.value.split())
                flag, default = field.target.id.replace("_", "-"), ast.literal_eval(field.value)
                default = " " if default == "" else default
                assert f"| `--{flag}` | `{default}` | {said} |" in guides
    assert found == 19
