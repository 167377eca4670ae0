"""Presets and the command line."""

from dataclasses import dataclass, field
from typing import Literal

import pytest
import yaml
from snrweights.integrations.config import changed_options, parse_options, save_options


@dataclass
class Weight:
    method: str = "min_snr"
    set: tuple[str, ...] = ()


@dataclass
class Optimizer:
    max_steps: int = 1
    target: Literal["x", "y"] = "x"


@dataclass
class Options:
    preset: str = "a"
    weight: Weight = field(default_factory=Weight)
    optimizer: Optimizer = field(default_factory=Optimizer)


@pytest.fixture
def presets(tmp_path):
    (tmp_path / "a.yaml").write_text("weight: {method: smoothed_kl, set: [tau=0.2]}\noptimizer: {max_steps: 7}\n")
    (tmp_path / "b.yaml").write_text("optimizer: {max_step: 7}\n")
    return tmp_path


def parse(presets, *argv):
    return parse_options(Options, presets, "a", argv)


def test_the_command_line_wins_over_the_preset_in_both_spellings(presets):
    assert parse(presets).optimizer.max_steps == 7
    assert parse(presets, "--max-steps", "3").optimizer.max_steps == 3
    assert parse(presets, "--max_steps=3").optimizer.max_steps == 3


def test_another_method_drops_the_presets_hyperparameters(presets):
    assert parse(presets).weight.set == ("tau=0.2",)
    assert parse(presets, "--method", "min_snr").weight.set == ()
    assert parse(presets, "--method", "min_snr", "--set", "gamma=5").weight.set == ("gamma=5",)
    assert parse(presets, "--method", "smoothed_kl").weight.set == ("tau=0.2",)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--preset", "c"], r"Unknown preset 'c'; choose one of \['a', 'b'\]"),
        (["--preset=b"], r"Unknown field 'max_step' in preset 'b', section 'optimizer'; choose one of \['max_steps', "),
        (["--steps", "3"], r"Unknown option '--steps'; choose one of \['--preset', .*'--max-steps'"),
    ],
)
def test_unknown_presets_and_fields_list_the_choices(presets, argv, said):
    with pytest.raises(SystemExit, match=said):
        parse(presets, *argv)


def test_a_wrong_value_lists_the_choices(presets, capsys):
    with pytest.raises(SystemExit):
        parse(presets, "--target", "z")
    assert "Expected one of ('x', 'y')" in capsys.readouterr().err


def test_saved_options_have_every_field_and_the_versions(presets, tmp_path):
    save_options(parse(presets), tmp_path / "config.yaml")
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved["weight"] == {"method": "smoothed_kl", "set": ["tau=0.2"]}
    assert saved["optimizer"]["max_steps"] == 7
    assert {"snrweights", "torch", "diffusers", "python"} <= set(saved["versions"])


def test_changes_against_a_saved_file_are_named(presets, tmp_path):
    save_options(parse(presets), tmp_path / "config.yaml")
    same, other = parse(presets), parse(presets, "--max-steps", "3", "--method", "ddpm")
    assert changed_options(tmp_path / "config.yaml", same, free=[]) == []
    changes = changed_options(tmp_path / "config.yaml", other, free=["optimizer.max_steps"])
    assert changes == ["weight.method: smoothed_kl -> ddpm", "weight.set: ['tau=0.2'] -> []"]
    assert changed_options(tmp_path / "config.yaml", other, free=["weight", "optimizer.max_steps"]) == []
