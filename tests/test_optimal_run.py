"""``snrweights optimal-loss``: its table and file, what it says when it cannot, and what Ctrl-C leaves."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from test_optimal_oracles import DIGITS

from snrweights.cli import main
from snrweights.optimal import OptimalLossCurve, optimal_loss
from snrweights.seeds import generator


def run(capsys, *arguments):
    try:
        code = main(["optimal-loss", *map(str, arguments)])
    except SystemExit as left:
        code = left.code
    return code, *capsys.readouterr()


def latents(folder):
    np.save(folder / "digits.npy", load_digits().data / 8 - 1)
    return folder / "digits.npy"


def test_digits_give_the_table_within_three_standard_errors(capsys, tmp_path):
    file = tmp_path / "new" / "curve.safetensors"
    levels = [f"{sigma}" for sigma in DIGITS]
    code, out, err = run(capsys, latents(tmp_path), "-o", file, "--draws", 1000, "--sigmas", *levels)
    assert (code, err) == (0, "")
    curve = OptimalLossCurve.load(file)
    expected, relative = torch.tensor(list(DIGITS.values()), dtype=torch.float64).T
    error = (curve.stderr**2 + (relative * expected) ** 2).sqrt()
    assert ((curve.value - expected) / error).abs().max() < 3
    head, *rows, last = out.splitlines()
    assert head.split("  ")[-1] == "how"
    assert last == f"Wrote {file}"
    for row, sigma, value, how in zip(rows, curve.sigmas, curve.value, curve.how, strict=True):
        fields = row.split()
        assert (float(fields[0]), fields[-1]) == (sigma, how)
        assert float(fields[1]) == pytest.approx(float(value) / 64, rel=1e-4)
    assert list(file.parent.iterdir()) == [file]  # no state is left


def test_the_pictures_of_digits_give_it_too(capsys, tmp_path):
    """Their 17 grey levels are rounded to bytes, which counts below sigma 0.5."""
    file = tmp_path / "curve.safetensors"
    levels = [sigma for sigma in DIGITS if sigma >= 0.5]
    assert run(capsys, "digits", "-o", file, "--device", "cpu", "--sigmas", *levels)[0] == 0
    curve = OptimalLossCurve.load(file)
    expected = torch.tensor([DIGITS[sigma][0] for sigma in levels], dtype=torch.float64)
    assert ((curve.value - expected).abs() < 3 * (curve.stderr + 1e-3 * expected)).all()
    assert curve.made["points"] == 1797


def test_options_reach_the_computation(capsys, tmp_path):
    file, state = tmp_path / "curve.safetensors", tmp_path / "state"
    options = ["--sigmas", 3, "--sigma-min", 0.5, "--sigma-max", 2, "--labels", "label", "--flips", "--seed", 5]
    options += ["--draws", 32, "--chunk", 100, "--small-noise", "bound", "--resolution", 4, "--channels", 3]
    assert run(capsys, "digits", "-o", file, *options, "--device", "cpu", "--state", state)[0] == 0
    curve = OptimalLossCurve.load(file)
    torch.testing.assert_close(curve.sigmas, torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64))
    made = curve.made
    assert (made["dim"], made["points"], made["groups"], made["flips"]) == (48, 2 * 1797, 10, True)
    assert (made["seed"], made["draws"]) == (5, 32)
    assert (state / "rows.bin").stat().st_size == 48 * 1797  # named, it is kept
    assert main(["optimal-loss", "digits", "-o", str(file), *map(str, options), "--state", str(state)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits", "--split", "trian"], r"`split` 'trian' is not in 'digits'; choose one of \['train'\]"),
        (["digits", "--column", "img"], r"`column` 'img' is not in 'digits'; choose one of \['image', 'label'\]"),
        (["digits", "--labels", "lable"], r"`labels` 'lable' is not in .*choose one of \['image', 'label'\]"),
        (["digits", "--sigmas", "many"], "`--sigmas` must be a whole number, or numbers, got many"),
        (["digits", "--sigmas", "1"], "at least 2 levels, got 1; one level is written 1.0"),
        (["digits", "--sigmas", "1.0", "-2"], "`sigmas` must be positive noise levels"),
        (["digits", "--sigma-min", "3", "--sigma-max", "2"], "below `--sigma-max`, got 3.0 and 2.0"),
        (["digits", "--draws", "3"], "`draws` must be at least 8, got 3"),
        (["digits", "--small-noise", "guess"], "invalid choice: 'guess'"),
        (["nothing.npy"], "No such file or directory: 'nothing.npy'"),
        (["digits", "-o", "curve.png"], "`--output` 'curve.png' must end in .safetensors"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert re.search(message, err.splitlines()[-1])
    assert "Traceback" not in err


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on_and_going_on_gives_the_same_bits(tmp_path):
    x = torch.randn(3000, 40, generator=generator(0), dtype=torch.float64).numpy()
    np.save(tmp_path / "x.npy", x)
    file = tmp_path / "curve.safetensors"
    command = "import snrweights.optimal.work as w; w.SAVE_EVERY = 0.0; from snrweights.cli import main; "
    command += "import sys; sys.exit(main(sys.argv[1:]))"
    arguments = ["optimal-loss", tmp_path / "x.npy", "-o", file, "--chunk", 8, "--device", "cpu"]
    arguments += ["--sigmas", 4.0, 8.0]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(stderr):
        given = [sys.executable, "-c", command, *map(str, arguments)]
        return subprocess.Popen(given, stderr=stderr, stdout=subprocess.PIPE, text=True, env=environment)

    ours, theirs = pty.openpty()  # a terminal, to see the progress
    process = start(theirs)
    os.close(theirs)
    state = Path(f"{file}.state") / "draws.0.safetensors"
    while not state.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = b""
    while select.select([ours], [], [], 20)[0]:
        try:
            said += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert process.wait(timeout=20) == 130
    process.stdout.close()
    assert f"Interrupted; the same command goes on from {file}.state" in said.decode()
    assert re.search(r"optimal loss, draws: +\d+%, 0:\d\d left", said.decode())
    assert "Traceback" not in said.decode()
    assert not file.exists()
    out, err = start(subprocess.PIPE).communicate(timeout=100)
    assert f"Wrote {file}" in out
    assert err == ""
    torch.set_num_threads(1)
    whole = optimal_loss(x, [4.0, 8.0], chunk=8)
    assert torch.equal(OptimalLossCurve.load(file).value, whole.value)
    assert not state.parent.exists()
