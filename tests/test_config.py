"""Presets and the command line."""

from dataclasses import dataclass
from typing import Literal

import pytest
import yaml
from snrweights.integrations.config import parse_config, save_config


@dataclass
class Config:
    preset: str = "a"
    method: str = "min_snr"
    set: tuple[str, ...] = ()
    max_steps: int = 1
    target: Literal["x", "y"] = "x"


@pytest.fixture
def presets(tmp_path):
    (tmp_path / "a.yaml").write_text("method: smoothed_kl\nset: [tau=0.2]\nmax_steps: 7\n")
    (tmp_path / "b.yaml").write_text("max_step: 7\n")
    return tmp_path


def parse(presets, *argv):
    return parse_config(Config, presets, "a", argv)


def test_the_command_line_wins_over_the_preset_in_both_spellings(presets):
    assert parse(presets).max_steps == 7
    assert parse(presets, "--max-steps", "3").max_steps == parse(presets, "--max_steps=3").max_steps == 3


def test_another_method_drops_the_presets_hyperparameters(presets):
    assert parse(presets).set == ("tau=0.2",)
    assert parse(presets, "--method", "min_snr").set == ()
    assert parse(presets, "--method", "min_snr", "--set", "gamma=5").set == ("gamma=5",)
    assert parse(presets, "--method", "smoothed_kl").set == ("tau=0.2",)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--preset", "c"], r"Unknown preset 'c'; choose one of \['a', 'b'\]"),
        (["--preset=b"], r"unknown field 'max_step'; choose one of \['preset', 'method', 'set', 'max_steps', 'target'\]"),
        (["--steps", "3"], r"Unknown field '--steps'; choose one of \['--preset', .*'--max-steps'"),
    ],
)
def test_unknown_presets_and_fields_list_the_choices(presets, argv, said):
    with pytest.raises(SystemExit, match=said):
        parse(presets, *argv)


def test_a_wrong_value_lists_the_choices(presets, capsys):
    with pytest.raises(SystemExit):
        parse(presets, "--target", "z")
    assert "Expected one of ('x', 'y')" in capsys.readouterr().err


def test_saved_configuration_has_every_field_and_the_versions(presets, tmp_path):
    save_config(parse(presets), tmp_path / "config.yaml")
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved["set"] == ["tau=0.2"]
    assert saved["max_steps"] == 7
    assert {"snrweights", "torch", "diffusers", "python"} <= set(saved["versions"])
