"""`snrweights audit`, and what `launch` finds and refuses in scripts that weigh by themselves or are hard to read."""

import json
import re
import runpy
import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler
from safetensors.torch import load_file
from snrweights.integrations.audit import DoubleWeightingError
from test_launch import CUSTOM, MINIATURES, SMALL, SNRWEIGHTS, WHAT_A_SCRIPT_SEES, report_of, run, write

import snrweights
from snrweights.cli import main

BACKWARD = torch.autograd.backward


@pytest.fixture
def here(monkeypatch, tmp_path):
    """For runs in this process: what a script may change is put back; an empty folder to be in."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [str(MINIATURES), *sys.path])
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield tmp_path
    AcceleratorState._reset_state(reset_partial_state=True)


LOOP = """
weigh = {weigh}
model, scheduler = small_unet(), DDPMScheduler({options})
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
try:
    for i in range({steps}):
        images, noise = torch.randn(2, 8, 3, 8, 8)
        t = (125 * (torch.arange(8) + torch.rand(8))).long()  # on both sides of gamma
        snr = 1 / (1 / scheduler.alphas_cumprod[t] - 1)
        errors = (model(scheduler.add_noise(images, noise, t), t).sample - noise).square().mean((1, 2, 3))
        (weigh(snr) * errors).mean().backward()
        print("backward", i)
        if i % {accumulation} == {accumulation} - 1:
            optimizer.step()
            optimizer.zero_grad()
            print("step", i)
    print("ends")
finally:
    print("leaves")
    torch.save([[p.detach() for p in model.parameters()], torch.rand(1)], "left.pt")
"""
PLAIN, MIN_SNR = "lambda snr: 1", "lambda snr: snr.clamp(max=5) / snr"


def loop(weigh=PLAIN, steps=50, accumulation=1, options=""):
    """A script that says what it does, and saves its parameters and a random number when it is left."""
    return SMALL + LOOP.format(weigh=weigh, steps=steps, accumulation=accumulation, options=options)


def audit(text, *options):
    return main(["audit", *options, write(Path("script.py"), text)])


def strictly(text):
    """Read JSON as browsers do: without NaN and infinities."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def audited(text, *options):
    """Audit a script, given as text; return the numbers."""
    assert audit(text, "--json", "audit.json", *options) == 0
    return strictly(Path("audit.json").read_text())


# what is printed, and when the script ends ----------------------------------------------------------------------------


def test_the_report_is_printed_and_the_script_ends(here, capsys):
    assert audit(loop(), "--steps", "3") == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[:6] == ["backward 0", "step 0", "backward 1", "step 1", "backward 2", "leaves"]
    first, *lines = out.splitlines()[6:]
    assert re.fullmatch(r"audit of 3 steps, 24 samples, log-SNR -\d+\.\d\d to \d\.\d\d", first)
    assert lines == [
        "  loss       a weighted MSE",
        "  weight     the same at every noise level",
        "  target     as the prediction type says",
        "  timesteps  too few to tell their density, or none that is known",
    ]
    assert err == "snrweights: <attached UNet2DModel: no weight, on DDPMScheduler>\n"


def test_eight_steps_by_default(here, capsys):
    assert audit(loop(MIN_SNR)) == 0
    out = capsys.readouterr().out
    assert (out.count("backward"), out.count("step ")) == (8, 7)
    assert "audit of 8 steps, 64 samples" in out
    assert "weight     min_snr(gamma=5)" in out
    assert "timesteps  too few to tell their density" in out


@pytest.mark.parametrize("end", ["", "sys.exit()\n", "sys.exit(0)\n"])
def test_a_script_with_fewer_steps_ends_by_itself(end, here, capsys):
    found = audited(loop(MIN_SNR, steps=3) + "import sys\n" + end)
    assert (found["steps"], len(found["weight"])) == (3, 24)
    assert found["known_as"][0] == "min_snr(gamma=5)"
    out = capsys.readouterr().out
    assert "step 2\nends\nleaves\naudit of 3 steps, 24 samples" in out


def test_micro_batches_are_backward_passes(here, capsys):
    assert audit(loop(accumulation=4), "--steps", "6") == 0
    out = capsys.readouterr().out
    assert (out.count("backward"), out.count("step ")) == (8, 1)  # the second step would change more than it must
    assert "audit of 6 steps, 48 samples" in out


def test_a_script_without_an_optimizer_is_run_to_its_end(here, capsys):
    text = loop(steps=5).replace("optimizer.step()", "[p.data.add_(p.grad, alpha=-0.01) for p in model.parameters()]")
    assert audit(text, "--steps", "2") == 0
    out = capsys.readouterr().out
    assert "step 4\nends\nleaves\naudit of 2 steps" in out


@pytest.mark.parametrize("steps", ["2", "8"])
def test_up_to_its_end_an_audited_script_trains_as_ever(steps, here, capsys):
    write(here / "plain.py", loop(MIN_SNR, steps=int(steps) - 1))
    runpy.run_path("plain.py", run_name="__main__")
    plain, _ = torch.load("left.pt")
    assert audit(loop(MIN_SNR), "--steps", steps) == 0
    left, _ = torch.load("left.pt")
    assert all(torch.equal(a, b) for a, b in zip(left, plain, strict=True))


@pytest.mark.parametrize("steps", ["1", "3", "50"])
@pytest.mark.parametrize("script", ["unconditional", "textual_inversion"])
def test_an_audit_within_launch_changes_no_bit(script, steps, here, capsys):
    script = str(MINIATURES / f"{script}.py")
    sys.argv = [script, "plain"]
    runpy.run_path(script, run_name="__main__")
    plain = capsys.readouterr().out
    assert main(["launch", "--method", "none", "--audit", steps, script, "audited"]) == 0
    out, err = capsys.readouterr()
    assert out == plain
    assert f"snrweights: audit of {min(int(steps), 4)} steps" in err
    assert Path("audited").read_bytes() == Path("plain").read_bytes()


@pytest.mark.parametrize("method", ["none", "min_snr"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_random_numbers_of_dropout_and_checkpoints_stay_the_scripts_own(checkpointing, method, here, capsys):
    checkpoints = f"model.train().enable_gradient_checkpointing({CHECKPOINT})" if checkpointing else ""
    text = loop(steps=4).replace("try:", f"{checkpoints}\ntry:")
    text = text.replace("norm_num_groups=4,", "norm_num_groups=4, dropout=0.5,")
    found = []
    for options in (["--on-double-weighting", "ignore"], ["--on-double-weighting", "ignore", "--audit", "4"]):
        assert report_of(text, "--method", method, *options)[0] == 0
        found.append(torch.load("left.pt"))
    (parameters, drawn), (others, also_drawn) = found
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))
    assert torch.equal(drawn, also_drawn)


CHECKPOINT = "lambda *args: torch.utils.checkpoint.checkpoint(*args, use_reentrant=False)"


@pytest.mark.slow
def test_in_processes_of_their_own(tmp_path):
    script = write(tmp_path / "script.py", loop(MIN_SNR))
    code, out, err = run(SNRWEIGHTS, "audit", "--steps", 2, "--json", "audit.json", "-o", "w.png", script, cwd=tmp_path)
    assert code == 0, err
    assert out.startswith("backward 0\nstep 0\nbackward 1\nleaves\naudit of 2 steps, 16 samples")
    assert strictly((tmp_path / "audit.json").read_text())["known_as"][0] == "min_snr(gamma=5)"
    assert (tmp_path / "w.png").read_bytes().startswith(b"\x89PNG")
    other = write(tmp_path / "other.py", "print('ends')\n")
    code, out, err = run(SNRWEIGHTS, "audit", other)
    assert (code, out) == (3, "ends\n")
    assert err.startswith("snrweights: no loss was read: no diffusers model was called with gradients")
    plain = run(sys.executable, MINIATURES / "unconditional.py", tmp_path / "plain")
    options = ["launch", "--method", "none", "--audit", 3]
    with_audit = run(SNRWEIGHTS, *options, MINIATURES / "unconditional.py", tmp_path / "audited")
    assert with_audit[:2] == plain[:2]
    assert (tmp_path / "audited").read_bytes() == (tmp_path / "plain").read_bytes()


@pytest.mark.parametrize("script", ["there/script.py", "absolute"])
def test_a_script_sees_what_it_sees_under_python(script, tmp_path):
    path = write(tmp_path / "there" / "script.py", WHAT_A_SCRIPT_SEES)
    arguments = [path if script == "absolute" else script, "--steps", "its own", "-m", "--json", "--", "-o", "x"]
    code, out, _ = run(sys.executable, *arguments, cwd=tmp_path)
    assert code == 0
    assert run(SNRWEIGHTS, "audit", "--steps", 2, *arguments, cwd=tmp_path)[:2] == (3, out)
    assert run(SNRWEIGHTS, "audit", "--", *arguments, cwd=tmp_path)[:2] == (3, out)
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["script.py"]


def test_a_module(here, capsys):
    write(here / "package_of_loops" / "__init__.py", "")
    write(here / "package_of_loops" / "training.py", "import sys\nprint(sys.argv[1:])\n" + loop(MIN_SNR))
    assert main(["audit", "--steps", "2", "-m", "package_of_loops.training", "--steps", "7"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("['--steps', '7']\nbackward 0\n")
    assert "audit of 2 steps" in out


@pytest.mark.parametrize(
    ("end", "raised", "match"),
    [
        ("import sys; sys.exit(7)", SystemExit, "7"),
        ("import sys; sys.exit('enough')", SystemExit, "enough"),
        ("raise RuntimeError('boom')", RuntimeError, "boom"),
        ("raise KeyboardInterrupt", KeyboardInterrupt, None),
    ],
)
def test_a_scripts_own_end_is_its_own(end, raised, match, here, capsys):
    for text in (end, loop(steps=2) + end):
        with pytest.raises(raised, match=match):
            audit(text)


# nothing read ---------------------------------------------------------------------------------------------------------

NOT_READ = {
    "no model": ("", "no diffusers model was called with gradients in this process"),
    "unknown": (CUSTOM.format(and_time=", timestep", and_t=", T"), "Custom: how it takes its timestep is not known"),
    "frozen": (
        "scheduler = DDPMScheduler()\nsmall_unet().requires_grad_(False)(torch.randn(4, 3, 8, 8), T)\n",
        "no output of UNet2DModel depended on anything that is trained",
    ),
    "no scheduler": (
        "small_unet()(torch.randn(4, 3, 8, 8), T).sample.sum().backward()\n",
        "UNet2DModel: the script made no noise scheduler that can be read",
    ),
}


@pytest.mark.parametrize("why", NOT_READ)
def test_nothing_read_is_exit_code_three_with_the_reason(why, here, capsys):
    text, reason = NOT_READ[why]
    assert audit(SMALL + text + "print('ends')\n", "--json", "audit.json", "-o", "figure.png") == 3
    out, err = capsys.readouterr()
    assert out == "ends\n"
    assert err.splitlines()[-1].startswith("snrweights: no loss was read: ")
    assert reason in err.splitlines()[-1]
    assert not Path("audit.json").exists()
    assert not Path("figure.png").exists()


OBSTACLES = {
    "hook": (
        "prediction.register_hook(lambda gradient: gradient)\nloss = prediction.square().mean()",
        "has a hook of its own on the output",
    ),
    "once": (
        """
        class Once(torch.autograd.Function):
            forward = staticmethod(lambda ctx, x: x.clone())
            backward = staticmethod(torch.autograd.function.once_differentiable(lambda ctx, gradient: gradient))
        loss = Once.apply(prediction).square().mean()
        """,
        "differentiate",
    ),
    "another backward": ("loss = sum(p.square().sum() for p in model.parameters())", "was seen in a backward pass"),
}


@pytest.mark.parametrize("why", OBSTACLES)
def test_a_loss_that_cannot_be_read_is_exit_code_three_with_the_reason(why, here, capsys):
    step, reason = OBSTACLES[why]
    step = textwrap.indent(textwrap.dedent(step), "    ")
    text = f"""
model, scheduler = small_unet(), DDPMScheduler()
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for i in range(100):
    prediction = model(scheduler.add_noise(torch.ones(4, 3, 8, 8), torch.ones(4, 3, 8, 8), T), T).sample
    {step.strip()}
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print("step")
"""
    assert audit(SMALL + text, "--steps", "2") == 3
    out, err = capsys.readouterr()
    assert out.count("step") < 20  # it gives up
    assert "snrweights: no loss was read: " in err
    assert err.splitlines()[-1] != "snrweights: no loss was read: None."  # BUG
    assert reason in err.splitlines()[-1]


# files ----------------------------------------------------------------------------------------------------------------


def test_files_are_where_they_were_asked_for_if_the_script_goes_elsewhere(here):
    elsewhere = "import os\nos.makedirs('elsewhere')\nos.chdir('elsewhere')\n"
    assert audit(elsewhere + loop(), "--json", "audit.json", "-o", "figure.png", "--steps", "2") == 0
    assert (here / "audit.json").is_file()
    assert (here / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in here.iterdir()) == ["audit.json", "elsewhere", "figure.png", "script.py"]


@pytest.mark.parametrize("option", ["--json", "-o"])
def test_a_folder_that_is_not_there_is_made(option, here, capsys):
    file = "audit.json" if option == "--json" else "figure.png"
    assert audit(loop(), option, f"new/{file}", "--steps", "1") == 0
    assert Path("new", file).is_file()


FLOW = """
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

torch.manual_seed(0)
transformer = SD3Transformer2DModel(
    sample_size=8, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2,
    joint_attention_dim=8, caption_projection_dim=8, pooled_projection_dim=8,
)
scheduler = FlowMatchEulerDiscreteScheduler()
for _ in range(3):
    timesteps = scheduler.timesteps[torch.tensor([0, 300, 600, 900])]
    latents, noise, sigma = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), (timesteps / 1000)[:, None, None, None]
    noisy = (1 - sigma) * latents + sigma * noise
    out = transformer(noisy, torch.randn(4, 3, 8), torch.randn(4, 8), timesteps).sample
    {loss}.square().mean().backward()
"""


@pytest.mark.parametrize(
    ("loss", "known_as"),
    [("(out - noise + latents)", "native"), ("(noisy - sigma * out - latents)", "the plain MSE of sample")],
)
def test_numbers_at_pure_noise_are_json_and_can_be_drawn(loss, known_as, here, capsys):
    found = audited(FLOW.format(loss=loss), "-o", "figure.png")
    assert found["log_snr"][:3] == [None] * 3  # -inf
    assert None not in found["log_snr"][3:] + found["weight"]
    assert found["known_as"][0] == known_as
    assert Path("figure.png").is_file()


def test_the_prediction_type_can_be_told(here, capsys):
    """A script may train on another target than its scheduler states."""
    text = (
        loop()
        .replace("        t = ", "        images *= 0.5\n        t = ")
        .replace(".sample - noise)", ".sample - images)")
    )
    assert audited(text)["target_as_expected"] is False
    assert audited(text, "--prediction-type", "sample")["target_as_expected"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0", "script.py"], "`--steps` must be >= 1, got 0"),
        (["--steps", "-1", "script.py"], "`--steps` must be >= 1, got -1"),
        ([], "give a SCRIPT to run"),
        (["nowhere.py"], "there is no script 'nowhere.py'"),
        (["-m", "no_such_package.train"], "there is no module 'no_such_package.train'"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_two(arguments, message, here, capsys):
    write(here / "script.py", "print('runs')\n")
    assert main(["audit", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("snrweights audit: ")
    assert message in err
    assert err.count("\n") == 1


# the miniatures -------------------------------------------------------------------------------------------------------

CONSTANT = [
    "unconditional",
    "flow",
    "flux",
    "prior_preservation",
    "textual_inversion",
    "controlnet",
    "ip_adapter",
    "sdxl",
]


def audited_miniature(script, *arguments):
    assert main(["audit", "--json", "audit.json", str(MINIATURES / f"{script}.py"), "trained", *arguments]) == 0
    found = strictly(Path("audit.json").read_text())
    assert (found["steps"], found["is_mse"], found["not_read"]) == (4, True, [])
    return found


@pytest.mark.parametrize("script", CONSTANT)
def test_a_plain_miniature_is_constant(script, here, capsys):
    found = audited_miniature(script)
    assert found["constant"]
    assert found["target_as_expected"] is True
    if script == "prior_preservation":
        assert {round(weight, 3) for weight in found["weight"]} == {2.0, 1.0}
    else:
        assert found["known_as"] == ["native"]
        assert found["weight"] == pytest.approx([1.0] * 32, rel=1e-3)


def test_a_preconditioned_miniature_is_the_plain_mse_of_the_sample(here, capsys):
    found = audited_miniature("flow", "--precondition_outputs")
    assert not found["constant"]
    assert found["known_as"][0] == "the plain MSE of sample"
    assert found["target_as_expected"] is True


@pytest.mark.parametrize("script", [*(name for name in CONSTANT if name != "prior_preservation"), "flow, x0 loss"])
def test_a_miniature_weighted_by_hand_is_min_snr(script, here, capsys):
    script, _, option = script.partition(", ")
    found = audited_miniature(script, "--weigh", "formula", *["--precondition_outputs"] * bool(option))
    assert not found["constant"]
    assert found["known_as"][0] == "min_snr(gamma=5)"
    assert found["target_as_expected"] is True


def test_a_weight_on_half_of_the_batch_is_of_its_own_kind(here, capsys):
    found = audited_miniature("prior_preservation", "--weigh", "formula")
    assert found["constant"] is False
    assert "the same at every noise level" not in capsys.readouterr().out


@pytest.mark.parametrize("script", ["kohya", "k_diffusion"])
def test_a_miniature_of_another_library_is_not_read(script, here, capsys):
    assert main(["audit", str(MINIATURES / f"{script}.py"), "trained"]) == 3
    assert "no loss was read: no diffusers model was called with gradients" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["unconditional", "flow", "sdxl", "controlnet", "prior_preservation"])
def test_launch_of_a_miniature_weighted_by_hand_fails(script, here, capsys):
    options = ["--sample-mask", "first_half"] if script == "prior_preservation" else []
    with pytest.raises(DoubleWeightingError):
        main(["launch", *options, str(MINIATURES / f"{script}.py"), "trained", "--weigh", "formula"])
    assert not Path("trained").exists()


# two weights ----------------------------------------------------------------------------------------------------------


def test_a_script_with_a_weight_of_its_own_fails_in_the_first_backward_pass(here, capsys):
    with pytest.raises(DoubleWeightingError, match=r"weighted already: .*min_snr\(gamma=5\)"):
        report_of(loop(MIN_SNR))
    assert capsys.readouterr().out == "leaves\n"
    report = strictly(Path("report.json").read_text())  # it is written all the same
    assert report["attached"][0]["audit"]["constant"] is False


@pytest.mark.slow
def test_two_weights_are_a_traceback_and_exit_code_one(tmp_path):
    script = write(tmp_path / "script.py", loop(MIN_SNR))
    code, out, err = run(SNRWEIGHTS, "launch", script, cwd=tmp_path)
    assert (code, out) == (1, "leaves\n")
    assert "Traceback (most recent call last)" in err
    assert f'File "{script}", line' in err
    assert "DoubleWeightingError: The script's loss is weighted already: min_snr(gamma=5)" in err
    code, out, err = run(
        SNRWEIGHTS, "launch", "--on-double-weighting", "warn", script, cwd=tmp_path, env={"PYTHONWARNINGS": "default"}
    )
    assert code == 0
    assert out.endswith("step 49\nends\nleaves\n")
    assert err.count("UserWarning: The script's loss is weighted already") == 1


@pytest.mark.parametrize("how", ["warn", "ignore"])
def test_two_weights_pass_where_that_is_asked_for(how, here, capsys):
    warns = pytest.warns(UserWarning, match="weighted already") if how == "warn" else nullcontext()
    with warns:
        code, report = report_of(loop(MIN_SNR, steps=12), "--on-double-weighting", how)
    assert code == 0
    assert capsys.readouterr().out.endswith("step 11\nends\nleaves\n")
    assert report["attached"][0]["weighted"]
    found = report["attached"][0]["audit"]
    assert found is None if how == "ignore" else found["known_as"][0] == "min_snr(gamma=5)"


def test_ignored_weights_are_multiplied(here, capsys):
    own = "lambda snr: (snr.clamp(max=5) / snr).square()"
    assert report_of(loop(own, steps=3), "--method", "none")[0] == 0
    twice, _ = torch.load("left.pt")
    assert report_of(loop(MIN_SNR, steps=3), "--on-double-weighting", "ignore")[0] == 0
    launched, _ = torch.load("left.pt")
    for a, b in zip(launched, twice, strict=True):
        torch.testing.assert_close(a, b)


def test_a_method_that_changes_nothing_may_go_with_a_weight_of_the_scripts_own(here, capsys):
    code, report = report_of(loop(MIN_SNR, steps=12), "--method", "none", "--audit", "4")
    assert code == 0
    assert report["attached"][0]["audit"]["known_as"][0] == "min_snr(gamma=5)"


@pytest.mark.parametrize("weigh", ["lambda snr: 3", "lambda snr: torch.full((8,), 0.5)"])
def test_what_is_no_weight_over_the_noise_level_is_no_second_weight(weigh, here, capsys):
    code, report = report_of(loop(weigh, steps=12))
    assert code == 0
    assert report["attached"][0]["audit"]["constant"]


@pytest.mark.parametrize("change", ["grows", "overflows"])
def test_the_scale_of_mixed_precision_is_no_second_weight(change, here, capsys):
    """GradScaler halves its scale when gradients overflow, in the first steps of fp16 training above all."""
    scaler = f"scaler = torch.amp.GradScaler('cpu', growth_interval={2 if change == 'grows' else 2000})\n"
    if change == "overflows":
        scaler += "model.conv_out.weight.register_hook(lambda gradient: gradient * (torch.inf if i < 2 else 1))\n"
    text = loop(steps=12).replace("try:", f"{scaler}\ntry:", 1)
    text = text.replace("(weigh(snr) * errors).mean().backward()", "scaler.scale(errors.mean()).backward()")
    text = text.replace("optimizer.step()", "scaler.step(optimizer); scaler.update()")
    code, report = report_of(text)
    assert code == 0
    assert report["attached"][0]["weighted"]
    assert report["attached"][0]["audit"]["constant"]


# patience -------------------------------------------------------------------------------------------------------------

UNKNOWN = (
    CUSTOM.format(and_time=", timestep", and_t=", T")
    + """
model = Custom()
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for i in range(50):
    model(torch.randn(4, 3, 8, 8), T).square().mean().backward()
    optimizer.step()
    print("step", i)
print("ends")
"""
)


def test_a_run_that_trains_unweighted_is_ended_at_the_tenth_step(here, capsys):
    code, report = report_of(SMALL + UNKNOWN)
    assert code == 3
    out, err = capsys.readouterr()
    assert out == "".join(f"step {i}\n" for i in range(9))
    assert err.startswith("snrweights: nothing was weighted: Custom: how it takes its timestep is not known")
    assert report["attached"] == []


@pytest.mark.parametrize(("options", "code"), [(["--force"], 3), (["--method", "none"], 0)])
def test_patience_without_end(options, code, here, capsys):
    assert report_of(SMALL + UNKNOWN, *options)[0] == code
    out, err = capsys.readouterr()
    assert out.endswith("step 49\nends\n")
    assert ("nothing was weighted" in err) == (code == 3)


def test_nine_unweighted_steps_are_borne(here, capsys):
    """Of another model, before the denoiser is trained."""
    first = SMALL + UNKNOWN.replace("range(50)", "range(9)")
    assert report_of(first + "train(small_unet(), DDPMScheduler(), steps=20)\n")[0] == 0
    assert capsys.readouterr().out.endswith("step 8\nends\n")


@pytest.mark.slow
def test_patience_in_a_process_of_its_own(tmp_path):
    script = write(tmp_path / "script.py", SMALL + UNKNOWN)
    code, out, err = run(SNRWEIGHTS, "launch", script)
    assert (code, out.count("step")) == (3, 9)
    assert "nothing was weighted" in err


# models and schedulers of every kind ----------------------------------------------------------------------------------

IDEOGRAM = """
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config


class Ideogram4Transformer2DModel(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 3, 1)

    def forward(self, hidden_states, timestep):
        return self.layer(hidden_states)


torch.manual_seed(0)
model, t = Ideogram4Transformer2DModel(), torch.tensor([0.02, 0.4, 0.75, 0.98])  # 1 is clean
for _ in range(3):
    x0, noise = torch.randn(2, 4, 3, 8, 8)
    share = t[:, None, None, None]
    prediction = model(share * x0 + (1 - share) * noise, t)
    prediction.register_hook(lambda gradient: torch.save(gradient, "gradient.pt"))  # comes after the weight
    (prediction - {target}).square().mean().backward()
    error = (prediction - {target}).detach()
torch.save(2 * error / error.numel(), "plain.pt")
"""


def test_a_model_of_a_flows_own_time_needs_no_scheduler(here, capsys):
    code, report = report_of(IDEOGRAM.format(target="(x0 - noise)"))
    assert code == 0
    [attached] = report["attached"]
    assert (attached["scheduler"], attached["prediction_type"]) == ("flow", "flow_prediction")
    ratio = torch.load("gradient.pt") / torch.load("plain.pt")
    t = torch.tensor([0.98, 0.6, 0.25, 0.02])
    weights = snrweights.loss_weight(t, "flow", "min_snr")
    torch.testing.assert_close(ratio.flatten(1).median(1).values, weights, rtol=1e-4, atol=0)


def audited_ideogram(target):
    text = IDEOGRAM.format(target=target).replace("    prediction.register_hook", "    # prediction.register_hook")
    found = audited(text)
    assert (found["is_mse"], found["constant"]) == (True, True)
    expected = snrweights.as_schedule("flow").log_snr(1 - torch.tensor([0.02, 0.4, 0.75, 0.98])).tolist()
    assert found["log_snr"] == pytest.approx(sorted(expected * 3), rel=1e-4)
    return found


def test_the_flow_of_such_a_model_is_audited(here, capsys):
    assert audited_ideogram("(noise - x0)")["target_as_expected"] is True
    assert audited_ideogram("x0")["target_as_expected"] is False


def test_the_velocity_of_ideogram_and_lumina_points_at_the_data(here, capsys):
    """diffusers' scripts of both train on `model_input - noise`, from noise to data as their time runs."""
    assert audited_ideogram("(x0 - noise)")["target_as_expected"] is True


def test_the_values_of_secrets_are_left_out_of_the_report(here, capsys):
    script = write(Path("script.py"), loop(steps=1))
    secrets = ["--hub_token", "hf_a", "--api-key=hf_b", "--wandb_key", "hf_c", "--PASSWORD", "hf_d", "--my-secret=hf_e"]
    assert main(["launch", "--report", "report.json", script, "--lr", "1", *secrets, "--seed=3", "data"]) == 0
    text = Path("report.json").read_text()
    assert "hf_" not in text
    names = ["--hub_token", "...", "--api-key=...", "--wandb_key", "...", "--PASSWORD", "...", "--my-secret=..."]
    assert json.loads(text)["script"] == ["script.py", "--lr", "1", *names, "--seed=3", "data"]


COPY = """
import copy

model, scheduler = small_unet(), DDPMScheduler()
{before}
train(model, scheduler)
{after}
train(average, scheduler)
images, noise = torch.randn(2, 4, 3, 8, 8)
for each in (model, average):
    prediction = each(scheduler.add_noise(images, noise, T), T).sample
    gradients = []
    prediction.register_hook(gradients.append)
    prediction.sum().backward()
    torch.save(gradients[-1], f"gradient-{{each is model}}.pt")
"""


@pytest.mark.filterwarnings("ignore:Could not look whether")
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_copy_that_is_trained_is_weighted_once(when, here, capsys):
    lines = {"before": "", "after": "", when: "average = copy.deepcopy(model)"}
    code, report = report_of(SMALL + COPY.format(**lines))
    assert code == 0
    assert [attached["weighted"] for attached in report["attached"]] == [True] * (2 if when == "before" else 1)
    expected = snrweights.loss_weight(torch.tensor([10, 100, 500, 900]), DDPMScheduler())
    for which in (True, False):
        torch.testing.assert_close(torch.load(f"gradient-{which}.pt")[:, 0, 0, 0], expected)


COPY_FIRST = """
import copy

model(torch.randn(4, 3, 8, 8), T)  # is attached to here
model = copy.deepcopy(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
"""


def test_a_second_weight_is_found_on_a_copy_too(here, capsys):
    text = loop(MIN_SNR, steps=12)
    text = text.replace("optimizer = torch.optim.SGD(model.parameters(), lr=0.01)\n", COPY_FIRST)
    with pytest.raises(DoubleWeightingError):
        report_of(text)


WRAPPER = """
from diffusers import ConfigMixin, ModelMixin


class Wrapper(ModelMixin, ConfigMixin):
    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, sample, {argument}):
        return self.unet(sample, {argument})


train(Wrapper(small_unet()), DDPMScheduler(), steps=12)
"""


@pytest.mark.parametrize(
    ("argument", "reason"), [("timestep", "how it takes its timestep is not known"), ("levels", "it takes no timestep")]
)
def test_the_denoiser_in_an_unknown_wrapper_is_weighted(argument, reason, here, capsys):
    text = SMALL + WRAPPER.format(argument=argument)
    code, report = report_of(text)
    assert code == 0
    assert [attached["model"] for attached in report["attached"]] == ["UNet2DModel"]
    assert report["attached"][0]["weighted"]
    assert report["passed_over"]["Wrapper"].startswith(reason)
    found = audited(text)
    assert (found["steps"], found["constant"]) == (8, True)


TWO_SCHEDULERS = """
DDPMScheduler(beta_schedule="scaled_linear").save_pretrained("one")
DDPMScheduler({other}).save_pretrained("other")
one, other = DDPMScheduler.from_pretrained("one"), DDPMScheduler.from_pretrained("other")
other.add_noise(torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), T)
train(small_unet(), one, steps=12)
"""


def test_a_scheduler_may_be_loaded_twice(here, capsys):
    text = SMALL + TWO_SCHEDULERS.format(other="beta_schedule='scaled_linear'")
    code, report = report_of(text)
    assert code == 0
    assert report["attached"][0]["scheduler"] == "DDPMScheduler"
    expected = snrweights.as_schedule(DDPMScheduler(beta_schedule="scaled_linear")).log_snr(torch.tensor([10, 900]))
    assert audited(text)["log_snr"][::31] == pytest.approx(sorted(expected.tolist()), rel=1e-6)


def test_two_schedulers_that_differ_are_not_chosen_between(here, capsys):
    code, report = report_of(SMALL + TWO_SCHEDULERS.format(other="beta_schedule='linear'"))
    assert code == 3
    assert "several noise schedulers: DDPMScheduler, DDPMScheduler" in report["passed_over"]["UNet2DModel"]


@pytest.mark.parametrize("command", [["audit"], ["launch", "--method", "none", "--audit", "8"], ["launch"]])
def test_nobody_listens_to_backward_passes_after_a_short_script(command, here, capsys):
    assert main([*command, write(Path("script.py"), loop(steps=3))]) == 0
    assert torch.autograd.backward is BACKWARD


def test_two_denoisers_are_both_reported(here, capsys):
    text = SMALL + textwrap.dedent(
        """
        one, other, scheduler = small_unet(), small_unet(), DDPMScheduler()
        for _ in range(3):
            train(one, scheduler, steps=1)
            train(other, scheduler, steps=1)
        """
    )
    assert audit(text, "--json", "audit.json") == 0
    assert capsys.readouterr().out.count("audit of 3 steps, 12 samples") == 2


def test_the_numbers_of_two_denoisers_are_both_written(here, capsys):
    text = SMALL + "models = small_unet(), small_unet()\nfor model in models:\n    train(model, DDPMScheduler())\n"
    assert audit(text, "--json", "audit.json") == 0
    assert capsys.readouterr().out.count("audit of 2 steps") == 2
    written = "".join(file.read_text() for file in Path().glob("audit*.json"))
    assert written.count('"steps": 2') == 2


def test_what_an_attached_script_weighs_is_audited_too(here, capsys):
    """By the script's own attachment, which launch leaves alone."""
    own = SMALL + "import snrweights\nmodel, scheduler = small_unet(), DDPMScheduler()\n"
    own += "handle = snrweights.attach(model, scheduler)\ntrain(model, scheduler, 3)\nprint(handle.audit.constant)\n"
    assert audit(own) == 3
    out, err = capsys.readouterr()
    assert out == "True\n"
    assert "no loss was read: UNet2DModel: the script has attached a weight itself" in err


def test_gradients_of_a_miniature_are_those_of_the_plain_script(here, capsys):
    script = str(MINIATURES / "prior_preservation.py")
    sys.argv = [script, "plain"]
    runpy.run_path(script, run_name="__main__")
    assert main(["audit", script, "audited"]) == 0
    plain, found = load_file("plain"), load_file("audited")
    assert all(torch.equal(plain[name], found[name]) for name in plain)
