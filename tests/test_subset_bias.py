"""examples/subset_bias.py: the estimators from subsets beside the full pass."""

import json
import runpy
from pathlib import Path

import pytest
import torch

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "subset_bias.py"))


def test_it_finds_no_bias_where_there_is_none_and_the_known_ones(tmp_path, capsys):
    SCRIPT["main"](["--draws", "300", "--subset", "100", "-o", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["levels"] == [0.3, 0.5, 0.7, 1.0, 2.0, 4.0]
    bias = results["relative_bias"]
    at_one = {name: row[3] for name, row in bias.items()}
    for name in ("this package, full set", "AB, full set"):
        assert abs(at_one[name][0]) < 4 * at_one[name][1] < 1
    assert at_one["DOL"][0] < -4 * at_one["DOL"][1]
    assert bias["SNIS"][1][0] > 4 * bias["SNIS"][1][1]
    own, ab = (bias[name][3][1] for name in ("this package, full set", "AB, full set"))
    assert own < ab / 2
    assert (tmp_path / "figure.png").stat().st_size > 5000
    shown = (tmp_path / "table.md").read_text()
    assert shown in capsys.readouterr().out
    assert f"| DOL | {100 * bias['DOL'][0][0]:+.1f} ± {100 * bias['DOL'][0][1]:.1f} |" in shown


def test_with_the_whole_set_for_a_subset_there_is_no_bias_and_no_correction():
    data = torch.randint(0, 256, (40, 1, 2, 2), generator=torch.Generator().manual_seed(0)).byte()
    results = SCRIPT["study"](data, 40, 50, 0)
    ab, dol = results["AB, full set"], results["DOL"]
    assert [value for value, _ in dol] == pytest.approx([value for value, _ in ab], rel=1e-9)
    assert "cDOL, C = (N-1)/(L-1) = 1" in results
