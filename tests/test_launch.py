"""`snrweights launch`: the script runs as python runs it, and what was weighted is said."""

import json
import os
import runpy
import signal
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, DDPMScheduler, ModelMixin, SchedulerMixin

from snrweights import LossVarianceTracker, get_weighting, loss_weight
from snrweights.cli import main

SNRWEIGHTS = Path(sys.executable).with_name("snrweights")
MINIATURES = Path(__file__).parent / "miniatures"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONWARNINGS": "ignore"}

SMALL = """
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel

torch.manual_seed(0)
T = torch.tensor([10, 100, 500, 900])


def small_unet(channels=3):
    return UNet2DModel(
        sample_size=8, in_channels=channels, out_channels=3, block_out_channels=(8,), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )


def train(model, scheduler, steps=2):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        images, noise = torch.randn(2, 4, 3, 8, 8)
        F.mse_loss(model(scheduler.add_noise(images, noise, T), T).sample, noise).backward()
        optimizer.step()
        optimizer.zero_grad()
"""
TRAINING = SMALL + "train(small_unet(), DDPMScheduler())\n"


def write(path, text):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(textwrap.dedent(text))
    return str(path)


@pytest.fixture
def here(monkeypatch, tmp_path):
    """For runs in this process: what a script may change is put back; an empty folder to be in."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [str(MINIATURES), *sys.path])
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield tmp_path
    AcceleratorState._reset_state(reset_partial_state=True)


def run(*command, cwd=None, env=None):
    """Run a command; return exit code, stdout and stderr."""
    command = [str(part) for part in command]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT | (env or {}), timeout=300)
    return done.returncode, done.stdout, done.stderr


def launch(*options):
    return [SNRWEIGHTS, "launch", *options]


def report_of(text, *options):
    """Launch a script, given as text, in this process; return exit code and report."""
    code = main(["launch", "--report", "report.json", *options, write(Path("script.py"), text)])
    return code, json.loads(Path("report.json").read_text())


# as python would run it -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_method_none_is_the_plain_script_bit_for_bit(tmp_path):
    script = MINIATURES / "unconditional.py"
    plain = run(sys.executable, script, tmp_path / "plain")
    assert plain[0] == 0
    assert plain[1].count("loss") == 4
    none = run(*launch("--method", "none"), script, tmp_path / "none")
    assert none == plain
    assert (tmp_path / "none").read_bytes() == (tmp_path / "plain").read_bytes()


def test_tracking_without_a_method_changes_nothing(here, capfd):
    script = str(MINIATURES / "unconditional.py")
    sys.argv = [script, "plain"]
    runpy.run_path(script, run_name="__main__")
    plain = capfd.readouterr().out
    assert (
        main(["launch", "--method", "none", "--track", "tracked", "--report", "report.json", script, "tracked/w"]) == 0
    )
    out, err = capfd.readouterr()
    assert out == plain
    assert err.startswith("snrweights: <attached UNet2DModel: no weight, on DDPMScheduler, tracked>")
    assert Path("tracked/w").read_bytes() == Path("plain").read_bytes()
    assert LossVarianceTracker.load("tracked/tracker.safetensors").compute().count.sum() == 4 * 8


def test_stdout_is_that_of_the_script_with_attach(here, capfd):
    script = str(MINIATURES / "unconditional.py")
    sys.argv = [script, "attach", "--weigh", "attach"]
    runpy.run_path(script, run_name="__main__")
    attached = capfd.readouterr().out
    assert main(["launch", "--set", "gamma=5", script, "launched"]) == 0
    out, err = capfd.readouterr()
    assert out == attached
    assert err.splitlines() == [
        "snrweights: <attached UNet2DModel: MinSNR(gamma=5.0) on the MSE of 'epsilon', on DDPMScheduler>"
    ]
    assert Path("launched").read_bytes() == Path("attach").read_bytes()


ENDS = {
    "exit 7": "import sys; sys.exit(7)",
    "exit with a message": "import sys; sys.exit('enough')",
    "exception": "def step():\n    raise RuntimeError('boom')\nstep()",
    "keyboard interrupt": "raise KeyboardInterrupt",
    "SIGINT": "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)",
    "SIGTERM": "import os, signal, time; os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)",
    "own handler": """
        import os, signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
        os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)
    """,
}


@pytest.mark.parametrize("end", ENDS)
def test_a_script_ends_as_under_python(end, tmp_path):
    script = write(tmp_path / "script.py", "print('begins', flush=True)\n" + textwrap.dedent(ENDS[end]) + "\n")
    code, out, err = run(sys.executable, script)
    launched_code, launched_out, launched_err = run(*launch("--report", tmp_path / "report.json"), script)
    assert (launched_code, launched_out) == (code, out) == (code, "begins\n")
    assert code != 0
    if err:  # the frames of launch come before the script's own
        assert launched_err.splitlines()[-1] == err.splitlines()[-1]
        assert "nothing was weighted" not in launched_err
    if end == "exception":
        assert f'File "{script}", line 3, in step' in launched_err
    if end != "SIGTERM":
        assert json.loads((tmp_path / "report.json").read_text())["attached"] == []


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_from_outside_ends_the_script_itself(sent, tmp_path):
    script = write(tmp_path / "script.py", "import time\nprint('begins', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [SNRWEIGHTS, "launch", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=ENVIRONMENT
    )
    assert process.stdout.readline() == b"begins\n"
    process.send_signal(sent)
    assert process.wait(30) == -sent
    process.stdout.close()


WHAT_A_SCRIPT_SEES = """
import sys
import __main__

class Here:
    pass

print(sys.argv, __name__, sys.path[0], Here.__module__, __spec__ and __spec__.name)
print(__file__)
print(__main__.Here is Here, __main__.__file__ == __file__)
"""


@pytest.mark.parametrize("script", ["there/script.py", "./there/../there/script.py", "absolute"])
def test_a_script_sees_what_it_sees_under_python(script, tmp_path):
    path = write(tmp_path / "there" / "script.py", WHAT_A_SCRIPT_SEES)
    script = path if script == "absolute" else script
    arguments = [script, "--method", "its own", "-m", "--set", "--", "x"]
    code, out, _ = run(sys.executable, *arguments, cwd=tmp_path)
    assert code == 0
    assert run(*launch("--method", "none"), *arguments, cwd=tmp_path)[:2] == (0, out)


def test_under_safe_path_no_folder_is_put_in_place_of_another(tmp_path):
    script = write(tmp_path / "script.py", "import sys\nprint(sys.path)\n")
    safe = {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(tmp_path / "own")}
    _, out, _ = run(sys.executable, script, env=safe)
    assert run(*launch("--method", "none"), script, env=safe)[:2] == (0, out)


def test_what_runs_after_the_script_finds_its_classes(tmp_path):
    script = write(
        tmp_path / "script.py",
        """
        import atexit
        import pickle

        class Here:
            pass

        atexit.register(lambda: print(len(pickle.dumps(Here()))))
        """,
    )
    _, out, _ = run(sys.executable, script)
    assert run(*launch("--method", "none"), script)[:2] == (0, out)


def test_a_module_sees_what_it_sees_under_python(tmp_path):
    write(tmp_path / "package" / "__init__.py", "")
    write(
        tmp_path / "package" / "there.py", WHAT_A_SCRIPT_SEES + "print(__package__)\nfrom . import __name__ as name\n"
    )
    arguments = ["-m", "package.there", "--seed", "1"]
    code, out, _ = run(sys.executable, *arguments, cwd=tmp_path)
    assert code == 0
    assert run(*launch("--method", "none"), *arguments, cwd=tmp_path)[:2] == (0, out)


def test_nothing_is_imported_ahead_of_the_script(tmp_path):
    script = write(
        tmp_path / "script.py",
        """
        import os
        import sys

        ahead = {"diffusers", "accelerate", "transformers", "huggingface_hub", "datasets", "matplotlib"}
        print(ahead & set(sys.modules))
        os.environ["HF_HOME"] = "/somewhere/else"
        from diffusers.utils.constants import HF_MODULES_CACHE
        from huggingface_hub.constants import HF_HOME

        print(HF_HOME, HF_MODULES_CACHE)
        """,
    )
    code, out, _ = run(*launch("--track", tmp_path), script)
    assert (code, out) == (3, "set()\n/somewhere/else /somewhere/else/modules\n")


@pytest.mark.slow
def test_dataloader_workers(tmp_path):
    script = write(
        tmp_path / "script.py",
        """
        import torch


        class Data(torch.utils.data.Dataset):
            def __len__(self):
                return 4

            def __getitem__(self, index):
                return torch.full((3, 8, 8), float(index)), torch.utils.data.get_worker_info().id


        def main():
            from diffusers import DDPMScheduler, UNet2DModel

            model = UNet2DModel(
                sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
                down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
            )
            scheduler = DDPMScheduler()
            for context in ("fork", "spawn"):
                loader = torch.utils.data.DataLoader(
                    Data(), batch_size=4, num_workers=1, multiprocessing_context=context
                )
                for images, worker in loader:
                    t = torch.arange(4) * 200
                    model(scheduler.add_noise(images, torch.randn(4, 3, 8, 8), t), t).sample.sum().backward()
                    print(context, images[:, 0, 0, 0].tolist(), worker.tolist())


        if __name__ == "__main__":
            main()
        """,
    )
    code, out, _ = run(*launch("--method", "min_snr"), "script.py", cwd=Path(script).parent)
    values = "[0.0, 1.0, 2.0, 3.0] [0, 0, 0, 0]"
    assert (code, out) == (0, f"fork {values}\nspawn {values}\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        [sys.executable],
        [Path(sys.executable).with_name("accelerate"), "launch", "--num_processes", "1"],
        [Path(sys.executable).with_name("torchrun"), "--standalone"],
    ],
    ids=["python", "accelerate", "torchrun"],
)
def test_other_launchers(launcher, tmp_path):
    script = write(
        tmp_path / "script.py",
        f"import sys\nfrom accelerate import Accelerator\nprint(sys.argv, Accelerator().device.type)\n{TRAINING}",
    )
    module = ["-m", "snrweights.integrations.launch", "--report", tmp_path / "report.json"]
    home = {"HF_HOME": str(tmp_path)}  # no default_config.yaml of whoever runs the tests
    code, out, err = run(*launcher, *module, script, "--seed", 1, cwd=tmp_path, env=home)
    assert code == 0, err
    assert out.splitlines()[-1] == f"{[script, '--seed', '1']} cpu"
    assert json.loads((tmp_path / "report.json").read_text())["attached"][0]["weighted"]


# what is weighted, and with which scheduler ---------------------------------------------------------------------------


def test_the_report_says_what_was_weighted_and_what_was_passed_over(here):
    script = SMALL + (
        "from diffusers import AutoencoderKL\n"
        "vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8)\n"
        "vae.encode(torch.randn(1, 3, 8, 8))\n"
        "vae(torch.randn(1, 3, 8, 8))\n"
        "train(small_unet(), DDPMScheduler(prediction_type='v_prediction'))\n"
    )
    code, report = report_of(script, "--set", "gamma=4", "--normalize", "mean", "--track", "new/tracks")
    assert code == 0
    assert report["script"] == ["script.py"]
    assert report["passed_over"] == {"AutoencoderKL": "it is an autoencoder: there is no noise level"}
    [attached] = report["attached"]
    loss, audit = attached.pop("loss"), attached.pop("audit")
    assert attached == {
        "model": "UNet2DModel",
        "scheduler": "DDPMScheduler",
        "method": "MinSNR(gamma=4.0)",
        "prediction_type": "v_prediction",
        "normalize": "mean",
        "density": "uniform over the scheduler's timesteps",
        "mean_weight": pytest.approx(1),
        "weighted": True,
        "reason": None,
        "sampler": None,
    }
    assert (audit["steps"], audit["constant"]) == (2, True)
    assert audit["target_as_expected"] is False  # the script's target is the noise, whatever the scheduler says
    assert set(loss) == {"unit", "variance_within", "variance_between", "bins"}
    assert sum(row["count"] for row in loss["bins"]) == 8
    assert all((row["mean"] is None) == (row["count"] == 0) for row in loss["bins"])
    tracked = LossVarianceTracker.load("new/tracks/tracker.safetensors").compute()
    assert tracked.count.tolist() == [row["count"] for row in loss["bins"]]


def test_the_tracked_losses_are_the_scripts_own_under_gradient_accumulation(here, capfd):
    script = SMALL + textwrap.dedent(
        """
        import json
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model, scheduler = small_unet(), DDPMScheduler()
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for _ in range(6):
            with accelerator.accumulate(model):
                images, noise = torch.randn(2, 4, 3, 8, 8)
                t = torch.randint(1000, (4,))
                error = (model(scheduler.add_noise(images, noise, t), t).sample - noise).square()
                print(json.dumps([t.tolist(), error.mean((1, 2, 3)).tolist()]))
                accelerator.backward(error.mean())
                optimizer.step()
                optimizer.zero_grad()
        """
    )
    code, _ = report_of(script, "--track", "tracks")
    assert code == 0
    expected, log_snr = LossVarianceTracker(), get_weighting("ddpm").bind(DDPMScheduler()).schedule.log_snr
    for line in capfd.readouterr().out.splitlines():
        t, errors = json.loads(line)
        expected.update(torch.tensor(errors), log_snr(torch.tensor(t)))
    expected, found = expected.compute(), LossVarianceTracker.load("tracks/tracker.safetensors").compute()
    assert torch.equal(found.count, expected.count)
    assert found.count.sum() == 24
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_inside_another_is_not_weighted_again(checkpointing, here, capsys):
    script = f"""
        import torch
        from diffusers import DDPMScheduler, ModelMixin, UNet2DConditionModel

        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
            attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        )
        unet.train()
        if {checkpointing}:
            unet.enable_gradient_checkpointing()
        scheduler, t = DDPMScheduler(), torch.tensor([10, 900])
        for _ in range(2):
            noisy = scheduler.add_noise(torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), t)
            unet(noisy, t, torch.randn(2, 3, 8)).sample.sum().backward()
        inside = [type(m).__name__ for m in unet.modules() if isinstance(m, ModelMixin)]
        print(len(inside) > 1, [type(m).__name__ for m in unet.modules() if m._forward_hooks])
    """
    code, report = report_of(script)
    assert code == 0
    assert [attached["model"] for attached in report["attached"]] == ["UNet2DConditionModel"]
    assert report["passed_over"] == {}
    assert capsys.readouterr().out == "True ['UNet2DConditionModel']\n"


def test_the_scheduler_is_the_one_that_noises(here):
    code, report = report_of(
        SMALL + "other, noising = DDIMScheduler(), DDPMScheduler()\ntrain(small_unet(), noising)\n"
    )
    assert (code, report["attached"][0]["scheduler"]) == (0, "DDPMScheduler")
    code, report = report_of(
        SMALL + "noising, other = DDIMScheduler(), DDPMScheduler()\ntrain(small_unet(), noising)\n"
    )
    assert (code, report["attached"][0]["scheduler"]) == (0, "DDIMScheduler")


def test_the_scheduler_of_a_validation_pipeline_is_not_taken(here):
    script = SMALL + textwrap.dedent(
        """
        from diffusers import DDIMPipeline

        model, noising = small_unet(), DDPMScheduler()


        def validate():
            pipeline = DDIMPipeline(unet=model, scheduler=DDIMScheduler(beta_schedule="scaled_linear"))
            pipeline.set_progress_bar_config(disable=True)
            pipeline(batch_size=1, num_inference_steps=2, output_type="np")
            with torch.no_grad():  # as in image to image
                pipeline.scheduler.add_noise(torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8), torch.tensor([5]))
            return pipeline


        kept = validate()
        train(model, noising)
        kept = validate()
        train(model, noising)
        """
    )
    code, report = report_of(script)
    assert code == 0
    assert [attached["scheduler"] for attached in report["attached"]] == ["DDPMScheduler"]


def test_noise_added_without_gradients_says_nothing_about_the_loop(here):
    script = SMALL + textwrap.dedent(
        """
        model, noising = small_unet(), DDPMScheduler()
        with torch.no_grad():  # a validation, whose scheduler is gone afterwards
            DDIMScheduler().add_noise(torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), T)
        model(torch.randn(4, 3, 8, 8), T).sample.sum().backward()
        """
    )
    code, report = report_of(script)
    assert (code, report["attached"][0]["scheduler"]) == (0, "DDPMScheduler")


def test_a_scheduler_that_never_noises_is_taken_if_it_is_the_only_one(here):
    by_hand = "model(torch.randn(4, 3, 8, 8), T).sample.sum().backward()\n"
    for made in (
        "scheduler = DDPMScheduler()",
        "import copy; scheduler = DDPMScheduler(); another = copy.deepcopy(scheduler)",
        "scheduler = DDPMScheduler(); another = DDPMScheduler.from_config(scheduler.config)",
        "gone = DDIMScheduler(); del gone; scheduler = DDPMScheduler()",
    ):
        code, report = report_of(f"{SMALL}model = small_unet()\n{made}\n{by_hand}")
        assert (code, report["attached"][0]["scheduler"]) == (0, "DDPMScheduler"), made


def test_a_scheduler_changed_in_the_loop_is_read_anew(here):
    script = SMALL + textwrap.dedent(
        """
        model, scheduler = small_unet(), DDPMScheduler()
        train(model, scheduler, steps=1)
        for _ in range(2):
            scheduler.register_to_config(prediction_type="v_prediction")
            images, noise = torch.randn(2, 4, 3, 8, 8)
            prediction = model(scheduler.add_noise(images, noise, T), T).sample
            prediction.register_hook(lambda gradient: torch.save(gradient, "gradient.pt"))  # comes after the weight
            prediction.sum().backward()
        """
    )
    code, report = report_of(script)
    assert code == 0
    assert len(report["attached"]) == 1
    assert report["attached"][0]["prediction_type"] == "v_prediction"
    weights = torch.load("gradient.pt")[:, 0, 0, 0]
    expected = loss_weight(torch.tensor([10, 100, 500, 900]), DDPMScheduler(prediction_type="v_prediction"))
    torch.testing.assert_close(weights, expected)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",  # by dynamo itself
    "ignore:Could not look whether .* is weighted already. the model is compiled:UserWarning",
)
@pytest.mark.parametrize(
    "compiled",
    [
        "model = torch.compile(unet, backend='aot_eager', fullgraph=True)",
        "unet.compile(backend='aot_eager', fullgraph=True); model = unet",
    ],
    ids=["torch.compile", "Module.compile"],
)
def test_a_model_compiled_before_its_first_call_is_weighted_without_a_graph_break(compiled, here):
    script = f"""
        import torch
        from diffusers import DDPMScheduler, UNet2DConditionModel

        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
            attention_head_dim=4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        )
        {compiled}
        scheduler, t, context = DDPMScheduler(), torch.tensor([10, 100, 500, 900]), torch.randn(4, 3, 8)
        for _ in range(2):
            latents, noise = torch.randn(2, 4, 4, 8, 8)
            prediction = model(scheduler.add_noise(latents, noise, t), t, context).sample
            unet.zero_grad()
            (prediction - noise).square().mean().backward()
        torch.save([prediction.detach() - noise, unet.conv_out.bias.grad], "found.pt")
    """
    torch._dynamo.reset()
    code, report = report_of(script)
    assert code == 0
    assert [attached["model"] for attached in report["attached"]] == ["UNet2DConditionModel"]
    assert not torch._dynamo.utils.counters["graph_break"]
    error, gradient = torch.load("found.pt")
    weights = loss_weight(torch.tensor([10, 100, 500, 900]), DDPMScheduler())
    expected = 2 * (weights[:, None, None, None] * error).sum((0, 2, 3)) / error.numel()
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


def test_files_are_where_they_were_asked_for_if_the_script_goes_elsewhere(here):
    script = write(here / "script.py", f"import os\nos.makedirs('elsewhere')\nos.chdir('elsewhere')\n{TRAINING}")
    assert main(["launch", "--track", "tracks", "--report", "reports/report.json", script]) == 0
    assert (here / "tracks" / "tracker.safetensors").is_file()
    assert (here / "reports" / "report.json").is_file()


def test_a_copy_of_the_model_may_be_called_too(here):
    script = TRAINING.replace("train(", "model = small_unet()\ntrain(model, ").replace("small_unet(), ", "")
    script = SMALL + textwrap.dedent(
        """
        import copy

        model, scheduler = small_unet(), DDPMScheduler()
        train(model, scheduler)
        average = copy.deepcopy(model)
        print(average(torch.randn(4, 3, 8, 8), T).sample.shape)
        """
    )
    code, report = report_of(script)
    assert code == 0
    assert [attached["model"] for attached in report["attached"]] == ["UNet2DModel"]


def test_a_model_can_be_saved_as_a_whole(here):
    script = SMALL + "model = small_unet()\ntrain(model, DDPMScheduler())\ntorch.save(model, 'model.pt')\n"
    assert report_of(script)[0] == 0
    assert Path("model.pt").is_file()


DRAWING = (
    SMALL
    + """
model, scheduler, seen = small_unet(), DDPMScheduler(), []
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(4):
    images, noise = torch.randn(2, 4, 3, 8, 8)
    own = torch.full((4,), step)
    t = own.clone()
    noisy = scheduler.add_noise(images, noise, t)
    seen.append(torch.equal(t, own))
    F.mse_loss(model(noisy, t).sample, noise).backward()
    optimizer.step()
    optimizer.zero_grad()
print(seen)
"""
)


@pytest.mark.parametrize("method", ["none", "min_snr"])
def test_timesteps_are_redrawn_from_the_second_batch_on(method, here, capsys):
    """The model, and with it the scheduler, is noticed when the first batch is noised already."""
    code, report = report_of(DRAWING, "--method", method, "--sampler", "variance", "--audit", "4")
    assert code == 0
    assert capsys.readouterr().out.startswith("[True, False, False, False]\n")
    [attached] = report["attached"]
    assert attached["weighted"]
    assert attached["sampler"].startswith("ImportanceSampler('the loss about its mean")
    assert attached["audit"]["constant"]


def test_a_sampler_in_a_script_that_does_not_noise_with_its_scheduler(here):
    by_hand = TRAINING.replace("scheduler.add_noise(images, noise, T)", "0.6 * images + 0.8 * noise")
    with pytest.raises(ValueError, match=r"inside DDPMScheduler.add_noise, and the script has not called it"):
        main(["launch", "--sampler", "gradient", write(here / "script.py", by_hand)])


@pytest.mark.parametrize("end", ["", "raise RuntimeError('boom')", "raise SystemExit(0)"])
def test_nothing_of_it_remains_afterwards(end, here):
    def patched():
        owners = [ModelMixin, SchedulerMixin, DDPMScheduler, DDIMScheduler, Accelerator, torch]
        names = ["__call__", "register_to_config", "add_noise", "scale_noise", "get_velocity", "backward", "compile"]
        return [vars(owner).get(name) for owner in owners for name in names] + list(sys.meta_path)

    before = patched()
    script = write(here / "script.py", f"{TRAINING}assert torch.compile.__wrapped__\n{end}\n")
    with pytest.raises(RuntimeError, match="boom") if "boom" in end else nullcontext():
        assert main(["launch", "--track", "tracks", script]) == 0
    assert patched() == before


@pytest.mark.slow
def test_nothing_of_it_remains_where_the_script_imports_diffusers_first(tmp_path):
    watching = write(
        tmp_path / "watching.py",
        """
        import sys

        import torch
        from snrweights.cli import main

        compile_, meta_path = torch.compile, list(sys.meta_path)
        assert main(["launch", "--track", "tracks", "script.py"]) == 0
        from accelerate import Accelerator
        from diffusers import DDPMScheduler, ModelMixin, SchedulerMixin

        assert torch.compile is compile_
        assert not [finder for finder in sys.meta_path if "snrweights" in type(finder).__module__], sys.meta_path
        assert "__call__" not in vars(ModelMixin)
        assert "register_to_config" not in vars(SchedulerMixin)
        assert DDPMScheduler.add_noise.__module__ == "diffusers.schedulers.scheduling_ddpm"
        assert not hasattr(DDPMScheduler.add_noise, "__wrapped__")
        assert not hasattr(Accelerator.backward, "__wrapped__")
        """,
    )
    write(tmp_path / "script.py", f"from accelerate import Accelerator\n{TRAINING}")
    assert run(sys.executable, watching, cwd=tmp_path)[::2] == (
        0,
        "snrweights: <attached UNet2DModel: MinSNR(gamma=5.0) on the MSE of 'epsilon', on DDPMScheduler, tracked>\n",
    )


# nothing weighted, and what is refused --------------------------------------------------------------------------------

CUSTOM = """
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

class Custom(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 3, 1)

    def forward(self, sample{and_time}):
        return self.layer(sample)

Custom()(torch.randn(4, 3, 8, 8){and_t}).sum().backward()
"""
NOTHING = {
    "no model": ("", "no diffusers model was called with gradients"),
    "only without gradients": (
        "with torch.no_grad():\n    small_unet()(torch.randn(4, 3, 8, 8), T)\n",
        "no diffusers model was called with gradients",
    ),
    "frozen": (
        "scheduler = DDPMScheduler()\nsmall_unet().requires_grad_(False)(torch.randn(4, 3, 8, 8), T)\n",
        "no output of UNet2DModel depended on anything that is trained",
    ),
    "unknown": (
        CUSTOM.format(and_time=", timestep", and_t=", T"),
        "Custom: how it takes its timestep is not known: put `snrweights.attach(..., timestep=...)` into it",
    ),
    "no timestep": (CUSTOM.format(and_time="", and_t=""), "Custom: it takes no timestep"),
    "controlnet only": (
        "from diffusers import ControlNetModel\n"
        "controlnet = ControlNetModel(\n"
        "    block_out_channels=(8,), norm_num_groups=4, down_block_types=('DownBlock2D',), layers_per_block=1,\n"
        "    conditioning_embedding_out_channels=(8, 8), cross_attention_dim=8,\n"
        ")\n"
        "output = controlnet(torch.randn(4, 4, 8, 8), T, torch.randn(4, 3, 8), torch.randn(4, 3, 16, 16))\n"
        "output.mid_block_res_sample.sum().backward()\n",
        "ControlNetModel: it returns residuals for another model: attach to the denoiser that it steers",
    ),
    "no scheduler": (
        "small_unet()(torch.randn(4, 3, 8, 8), T).sample.sum().backward()\n",
        "UNet2DModel: the script made no noise scheduler that can be read; put `snrweights.attach(model,",
    ),
    "several schedulers": (
        "made = DDPMScheduler(), DDPMScheduler(beta_schedule='scaled_linear'), DDIMScheduler()\n"
        "small_unet()(torch.randn(4, 3, 8, 8), T).sample.sum().backward()\n",
        "the script made several noise schedulers: DDPMScheduler, DDPMScheduler, DDIMScheduler; "
        "put `snrweights.attach(model, scheduler, ...)` into it with the right one",
    ),
}


@pytest.mark.parametrize("why", NOTHING)
def test_nothing_weighted_is_exit_code_three_with_the_reason(why, here, capsys):
    text, reason = NOTHING[why]
    code, report = report_of(SMALL + text + "print('ends')\n")
    out, err = capsys.readouterr()
    assert (code, out) == (3, "ends\n")
    assert not any(attached["weighted"] for attached in report["attached"])
    assert err.splitlines()[-1].startswith("snrweights: nothing was weighted")
    assert reason in err.splitlines()[-1]


def test_a_script_that_exits_with_zero_is_judged_too(here, capsys):
    assert report_of("import sys\nsys.exit()\n")[0] == 3
    assert report_of("import sys\nsys.exit(0)\n", "--method", "none")[0] == 0
    assert report_of(TRAINING + "import sys\nsys.exit(0)\n")[0] == 0
    capsys.readouterr()


def test_a_script_that_attaches_itself_is_not_weighted_twice(here):
    script = SMALL + "import snrweights\nmodel, scheduler = small_unet(), DDPMScheduler()\n"
    attaching = script + "snrweights.attach(model, scheduler)\ntrain(model, scheduler)\n"
    with pytest.raises(ValueError, match="UNet2DModel is weighted by the script itself"):
        report_of(attaching)
    code, report = report_of(attaching, "--method", "none")
    assert (code, report["passed_over"]) == (0, {"UNet2DModel": "the script has attached a weight itself"})


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("train_lcm_distill_sd_wds.py", "consistency distillation compares two outputs"),
        ("train_lcm_distill_lora_sdxl.py", "consistency distillation"),
        ("train_cm_ct_unconditional.py", "consistency training has weights of its own"),
        ("train_sana_sprint_diffusers.py", "against a discriminator"),
        ("train_diffusion_dpo_sdxl.py", "differences between pairs"),
        ("train_diffusion_orpo_sdxl_lora.py", "differences between pairs"),
        ("train_amused.py", "a cross entropy over masked tokens"),
        ("train_vqgan.py", "an autoencoder has no noise level"),
        ("train_autoencoderkl.py", "an autoencoder has no noise level"),
        ("train_autoencoder_rae.py", "an autoencoder has no noise level"),
    ],
)
def test_a_script_in_which_a_weight_has_no_meaning_is_refused_by_name(name, reason, here, capsys):
    write(here / name, "print('runs')\n")
    assert main(["launch", name]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"snrweights launch: a weight has no meaning in {name}: ")
    assert reason in err
    assert err.endswith("`--force` runs it nevertheless.\n")
    assert main(["launch", "-m", "folder." + name.removesuffix(".py")]) == 2
    assert main(["launch", "--force", name]) == 3
    assert main(["launch", "--method", "none", name]) == 0
    assert capsys.readouterr().out == "runs\nruns\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "minsnr", "script.py"], "Unknown weighting 'minsnr'; choose one of ['ddpm', "),
        (["--set", "gama=5", "script.py"], "Weighting 'min_snr' has no hyperparameter 'gama'; it takes ['gamma']."),
        (["--set", "gamma=-1", "script.py"], "`MinSNR(gamma=...)` must be > 0, got -1.0."),
        (["--set", "gamma", "script.py"], "`--set` takes NAME=VALUE, got 'gamma'."),
        (["--method", "none", "--set", "gamma=5", "script.py"], "`--set` goes with a method"),
        (["--method", "none", "--normalize", "mean", "script.py"], "`--normalize` goes with a method"),
        (["--method", "none", "--density", "cosine", "script.py"], "`--density` goes with a method"),
        (["--clamp-max", "nan", "script.py"], "`--clamp-max` must be > 0, got nan"),
        (["--audit", "0", "script.py"], "`--audit` must be >= 1, got 0"),
        ([], "give a SCRIPT to run"),
        (["nowhere.py"], "there is no script 'nowhere.py'"),
        (["."], "there is no script '.'"),
        (["--track", "script.py/x", "script.py"], "script.py/x"),
        (["--report", "script.py/x", "script.py"], "script.py"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_two(arguments, message, here, capsys):
    write(here / "script.py", "print('runs')\n")
    assert main(["launch", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("snrweights launch: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_module_that_is_not_there_is_one_line_and_exit_code_two(here, capsys):
    assert main(["launch", "-m", "no_such_package.train"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prediction-type", "noise", "script.py"], "invalid choice: 'noise'"),
        (["--sample-mask", "second_half", "script.py"], "invalid choice: 'second_half'"),
        (["--clamp-max", "high", "script.py"], "invalid float value: 'high'"),
    ],
)
def test_a_wrong_command_line_shows_the_usage(arguments, message, here, capsys):
    with pytest.raises(SystemExit) as left:
        main(["launch", *arguments])
    assert left.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
