"""The wheel: complete, importable from another folder, and without diffusers and its kin."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"snrweights": ROOT / "snrweights", "snrweights/integrations": ROOT / "integrations"}

pytestmark = pytest.mark.slow


def run(*command, cwd, **environment):
    """Run a command in an environment without this checkout on the path; return its stdout."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env={**clean, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build from a copy, so that the checkout stays clean; with the setuptools installed, so that no index is asked."""
    source, target = tmp_path_factory.mktemp("source") / "copy", tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "runs")
    shutil.copytree(ROOT, source, ignore=unwanted)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), cwd=source)
    (path,) = target.iterdir()
    return path


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """Install the wheel alone, into a folder of its own."""
    target = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", "--target", str(target)]
    run(sys.executable, "-m", "pip", "install", *options, str(wheel), cwd=target)
    return target


def test_it_holds_the_package_the_integrations_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*.py")
    }
    assert {"snrweights/py.typed", "snrweights/page.css", "snrweights/integrations/__init__.py"} <= names
    assert {name for name in names if name.endswith(".py")} == expected
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"snrweights"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_it_states_its_dependencies_and_its_command(wheel):
    archive = zipfile.ZipFile(wheel)
    read = {Path(name).name: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name}
    required = [line for line in read["METADATA"].splitlines() if line.startswith("Requires-Dist: ")]
    core = sorted(line.split()[1].partition(">")[0] for line in required if "extra ==" not in line)
    assert core == ["numpy", "safetensors", "torch"]
    assert "snrweights = snrweights.cli:main" in read["entry_points.txt"]


ELSEWHERE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("diffusers", "accelerate", "datasets", "evaluate", "matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())

import torch
import snrweights
import snrweights.cli
import snrweights.integrations

weight = snrweights.loss_weight(torch.tensor([10, 500]), "linear", "min_snr", prediction_type="epsilon")
print(snrweights.__file__, snrweights.integrations.__file__, *weight.tolist())
print(snrweights.cli.main(["plot", "--methods", "ddpm"]))
"""


def test_installed_without_diffusers_it_imports_from_another_folder_and_weighs(site, tmp_path):
    out = run(sys.executable, "-W", "error", "-c", ELSEWHERE, cwd=tmp_path, PYTHONPATH=str(site))
    core, integrations, *weights, code = out.split()
    assert Path(core) == site / "snrweights" / "__init__.py"
    assert Path(integrations) == site / "snrweights" / "integrations" / "__init__.py"
    assert [float(weight) for weight in weights] == pytest.approx([0.010992, 1.0], rel=1e-4)
    assert code == "2"  # the figure asks for matplotlib, and says so


def test_the_command_runs_as_installed(site, tmp_path):
    command = site / "bin" / "snrweights"
    out = run(sys.executable, str(command), "methods", cwd=tmp_path, PYTHONPATH=str(site))
    assert out.startswith("method ")
    assert "min_snr" in out
