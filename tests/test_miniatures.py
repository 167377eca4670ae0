"""Small scripts that train as diffusers' examples, kohya's trainers and k-diffusion do, weighted in every way."""

import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from snrweights.cli import main

FOLDER = Path(__file__).parent / "miniatures"
GAMMA = 5.0

# name -> script, its arguments, options of launch beside the method
LAUNCHED = {
    "unconditional": ("unconditional", [], []),
    "flow": ("flow", [], []),
    "flow, x0 loss": ("flow", ["--precondition_outputs"], ["--prediction-type", "sample"]),
    "flux": ("flux", [], []),
    "prior preservation": ("prior_preservation", [], ["--sample-mask", "first_half"]),
    "textual inversion": ("textual_inversion", [], []),
    "controlnet": ("controlnet", [], []),
    "ip-adapter": ("ip_adapter", [], []),
    "sdxl": ("sdxl", [], []),
}
ATTACHED_ONLY = {"kohya": ("kohya", [], []), "k-diffusion": ("k_diffusion", [], [])}
IN_A_PROCESS_OF_ITS_OWN = ["flow, x0 loss", "textual inversion"]


@pytest.fixture(autouse=True)
def as_in_a_new_process(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def run(script, out, *arguments):
    """Run a script as it is; return what it saved."""
    sys.argv = [str(FOLDER / f"{script}.py"), str(out), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")
    return load_file(out)


def command(script, out, arguments, options):
    weighting = ["--method", "min_snr", "--set", f"gamma={GAMMA}", *options]
    return ["launch", *weighting, str(FOLDER / f"{script}.py"), str(out), *arguments]


def launch(*args):
    assert main(command(*args)) == 0
    return load_file(args[1])


def launch_alone(*args):
    subprocess.run(
        [Path(sys.executable).with_name("snrweights"), *command(*args)],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return load_file(args[1])


def update(tensors):
    names = [name.removeprefix("after.") for name in tensors if name.startswith("after.")]
    assert names
    return torch.cat([(tensors[f"after.{name}"].double() - tensors[f"before.{name}"]).flatten() for name in names])


def distance(one, other):
    """How far two updates of the same start are apart, relative to the second."""
    assert all(torch.equal(one[name], other[name]) for name in one if name.startswith("before."))
    return ((update(one) - update(other)).norm() / update(other).norm()).item()


@pytest.mark.parametrize("name", [*LAUNCHED, *ATTACHED_ONLY])
def test_a_script_trains_as_with_the_weights_written_into_it(name, tmp_path):
    script, arguments, options = (LAUNCHED | ATTACHED_ONLY)[name]
    plain = run(script, tmp_path / "plain", *arguments)
    formula = run(script, tmp_path / "formula", *arguments, "--weigh", "formula")
    log_snr = formula.pop("log_snr")
    assert log_snr.min() < math.log(GAMMA) - 1
    assert log_snr.max() > math.log(GAMMA) + 1

    assert distance(run(script, tmp_path / "attach", *arguments, "--weigh", "attach"), formula) < 1e-5
    assert distance(plain, formula) > 1e-2
    if name in LAUNCHED:
        launcher = launch_alone if name in IN_A_PROCESS_OF_ITS_OWN else launch
        assert distance(launcher(script, tmp_path / "launch", arguments, options), formula) < 1e-5


@pytest.mark.parametrize("name", ATTACHED_ONLY)
def test_launch_says_that_it_does_not_know_a_model_of_another_library(name, tmp_path, capsys):
    assert main(command(name.replace("-", "_"), tmp_path / "out", [], [])) == 3
    assert "takes `snrweights.attach(model, scheduler, ..., timestep=...)`" in capsys.readouterr().err
