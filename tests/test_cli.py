"""The `snrweights` command."""

import re
import struct
import sys

import pytest

from snrweights import __version__, list_weightings
from snrweights.cli import main
from snrweights.masked import list_masked_weightings
from snrweights.report import methods_table
from snrweights.settings import parse_settings


def run(capsys, *arguments):
    """Run the command; return its exit code, stdout and stderr."""
    try:
        code = main(arguments)
    except SystemExit as left:  # argparse leaves by itself
        code = left.code
    return code, *capsys.readouterr()


def size_of_png(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_methods_prints_one_line_per_weighting_with_its_formula(capsys):
    code, out, err = run(capsys, "methods")
    assert (code, err) == (0, "")
    head, *rows = out.splitlines()
    assert head.split() == ["method", "formula", "hyperparameters", "source"]
    assert [row.split()[0] for row in rows] == list_weightings()
    assert "min_snr         w_x0 = min(SNR, gamma)" in out
    assert out == methods_table() + "\n"


def test_methods_of_masked_diffusion_are_a_table_of_their_own(capsys):
    code, out, err = run(capsys, "methods", "--masked")
    assert (code, err) == (0, "")
    assert [row.split()[0] for row in out.splitlines()[1:]] == list_masked_weightings()
    assert "w = (1 - alpha) / -alpha'" in out
    _, markdown, _ = run(capsys, "methods", "--masked", "--markdown")
    assert "| `sigmoid` |" in markdown
    assert "min_snr" not in out + markdown


def test_methods_as_markdown_is_a_table_of_four_columns(capsys):
    code, out, _ = run(capsys, "methods", "--markdown")
    assert code == 0
    assert out == methods_table(markdown=True) + "\n"
    lines = out.splitlines()
    assert len(lines) == 2 + len(list_weightings())
    for line in lines:
        cells = re.split(r"(?<!\\)\|", line)  # a bar inside a formula must be escaped
        assert len(cells) == 6, line
        assert cells[0] == cells[-1] == ""


def test_version(capsys):
    code, out, _ = run(capsys, "--version")
    assert (code, out) == (0, f"snrweights {__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--methods", "min_snr", "smoothed_kl"],
        ["--schedule", "cosine", "--methods", "min_snr:gamma=3", "smoothed_kl:tau=0.1,coords=ve", "elbo"],
        ["--schedule", "edm", "--methods", "edm", "--prediction-type", "edm", "--density", "laplace"],
    ],
)
def test_plot_writes_a_picture(arguments, capsys, tmp_path):
    path = tmp_path / "new" / "weights.png"
    code, out, err = run(capsys, "plot", *arguments, "-o", str(path))
    assert (code, out, err) == (0, f"Wrote {path}\n", "")
    width, height = size_of_png(path)
    assert width > height > 300


def test_plot_writes_weights_png_by_default(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "plot", "--methods", "ddpm")[0] == 0
    assert size_of_png(tmp_path / "weights.png")[0] > 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "minsnr"], "Unknown weighting 'minsnr'; choose one of ['ddpm', "),
        (["--methods", "min_snr:gama=5"], "Weighting 'min_snr' has no hyperparameter 'gama'; it takes ['gamma']."),
        (["--methods", "min_snr:gamma=0"], "`MinSNR(gamma=...)` must be > 0, got 0.0."),
        (["--methods", "min_snr:gamma=x"], "`MinSNR(gamma=...)` must be a finite number, got 'x'."),
        (["--methods", "min_snr:gamma"], "takes NAME=VALUE, got 'gamma'."),
        (
            ["--methods", "ddpm", "--prediction-type", "edm"],
            "`prediction_type='edm'` needs the schedule's `sigma_data`",
        ),
        (["--methods", "ddpm", "-o", "weights.xyz"], "`path` 'weights.xyz' must end in one of ["),
        (["--methods", "ddpm", "-o", "file/weights.png"], "file"),
    ],
)
def test_an_error_is_one_line_on_stderr_and_exit_code_two(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    code, out, err = run(capsys, "plot", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("snrweights plot: ")
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_without_matplotlib_plot_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = run(capsys, "plot", "--methods", "ddpm")
    assert (code, err) == (2, "snrweights plot: Figures need matplotlib: pip install 'snrweights[plots]'.\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["draw"], "invalid choice: 'draw' (choose from"),
        (["plot"], "required: --methods"),
        (["plot", "--methods", "ddpm", "--schedule", "quadratic"], "invalid choice: 'quadratic' (choose from"),
        (["plot", "--methods", "ddpm", "--density", "gauss"], "invalid choice: 'gauss' (choose from"),
    ],
)
def test_a_wrong_command_line_shows_the_usage_and_the_choices(arguments, message, capsys):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("usage: snrweights")
    assert message in err.splitlines()[-1]


def test_settings_are_numbers_where_they_can_be():
    assert parse_settings(["gamma=5", "coords=ve", "tau=1e-3"]) == {"gamma": 5.0, "coords": "ve", "tau": 1e-3}
    with pytest.raises(ValueError, match="takes NAME=VALUE, got '=5'"):
        parse_settings(["=5"])
