"""Examples in docstrings and README run; every public name has one; tables are those of the registry."""

import argparse
import ast
import doctest
import importlib
import inspect
import json
import pkgutil
import re
from pathlib import Path

import pytest
import snrweights.integrations
from snrweights.integrations import launch
from snrweights.integrations.timestep_adapters import ADAPTERS

import snrweights
from snrweights.densities import DENSITIES
from snrweights.importance import RULES
from snrweights.report import methods_table
from snrweights.weightings.parity import _PARITY

ROOT = Path(__file__).parents[1]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

MODULES = sorted(
    {"snrweights", "snrweights.integrations"}
    | {module.name for module in pkgutil.walk_packages(snrweights.__path__, "snrweights.")}
    | {module.name for module in pkgutil.walk_packages(snrweights.integrations.__path__, "snrweights.integrations.")}
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name):
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
    assert failed == 0


def test_the_examples_of_the_readme_run():
    failed, tried = doctest.testfile(
        str(ROOT / "README.md"), module_relative=False, optionflags=FLAGS, globs={"snrweights": snrweights}
    )
    assert failed == 0
    assert tried > 0


def test_the_code_of_the_guide_to_samplers_runs_from_top_to_bottom():
    guide = (ROOT / "examples" / "guides" / "samplers.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    namespace = {}
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    for block in blocks:
        if block.startswith(">>> "):
            test = doctest.DocTestParser().get_doctest(block, namespace, "samplers.md", None, None)
            assert runner.run(test, clear_globs=False).failed == 0
            namespace = test.globs  # the test works on a copy
        else:
            exec(block, namespace)
    assert runner.tries > 10
    assert len(blocks) == guide.count("```") / 2


def test_the_examples_of_the_guide_to_bounds_run():
    failed, tried = doctest.testfile(
        str(ROOT / "examples" / "guides" / "bounds.md"), module_relative=False, optionflags=FLAGS
    )
    assert failed == 0
    assert tried > 0


def test_the_guide_to_bounds_has_numbers_of_the_results():
    guide = (ROOT / "examples" / "guides" / "bounds.md").read_text()
    table = (ROOT / "examples" / "results" / "bounds-digits" / "table.md").read_text().splitlines()
    rows = guide.partition("### The digits")[2].partition("[All weightings]")[0].splitlines()
    shown = [row for row in rows if row.startswith("|")]
    assert len(shown) > 15
    assert [row for row in shown if row not in table] == []


def test_the_readme_has_numbers_of_the_results():
    found = json.loads((ROOT / "examples" / "results" / "weights-digits" / "results.json").read_text())

    def mean(claim):
        values = found["claims"][claim]["estimate"]["values"]
        return sum(lower for lower, _ in values) / len(values)

    text = " ".join((ROOT / "README.md").read_text().split())
    closer, pixels, linear, cosine = mean(0), mean(3), -mean(5), -mean(6)
    assert f"{closer:.1f}" == f"{mean(1):.1f}"
    assert f"they are {closer:.1f} times closer to each other" in text
    assert f"Smoothed-KL needs {100 * pixels:.0f} % fewer steps" in text
    assert f"ends {100 * linear:.0f} % higher on the linear and {100 * cosine:.0f} % on the cosine one" in text


def test_the_guide_to_experiments_counts_the_verdicts_of_every_study_that_is_done():
    guide = (ROOT / "examples" / "guides" / "experiments.md").read_text()
    verdicts = ["seen", "not seen", "not decidable at this size"]
    rows = []
    for name in sorted(path.stem for path in (ROOT / "examples" / "studies").glob("*.yaml")):
        results = ROOT / "examples" / "results" / name / "results.json"
        if results.exists():
            found = [claim["verdict"] for claim in json.loads(results.read_text())["claims"]]
            counts = [found.count(verdict) for verdict in verdicts]
            assert sum(counts) == len(found)
            rows.append(f"| [`{name}`](../results/{name}/README.md) | " + " | ".join(map(str, counts)) + " |")
    assert rows
    assert [row for row in rows if row not in guide] == []


def test_the_guide_to_samplers_has_every_density_and_every_rule():
    guide = (ROOT / "examples" / "guides" / "samplers.md").read_text()
    assert [name for name in (*DENSITIES, *RULES) if f"| `{name}` |" not in guide] == []


@pytest.mark.parametrize("name", [name for name in snrweights.__all__ if callable(getattr(snrweights, name))])
def test_a_public_callable_has_an_example(name):
    doc = inspect.getdoc(getattr(snrweights, name))
    assert "Example:\n" in doc
    assert ">>> " in doc


def test_every_public_name_exists_and_is_sorted():
    assert all(hasattr(snrweights, name) for name in snrweights.__all__)
    assert snrweights.__all__ == sorted(snrweights.__all__)


@pytest.mark.parametrize("cls", [*snrweights.weightings.base._REGISTRY.values(), *_PARITY.values()])
def test_a_weighting_states_its_formula_and_source(cls):
    assert cls.formula
    assert cls.source
    assert cls.__doc__
    assert not cls.__doc__.startswith(f"{cls.__name__}(")  # what a dataclass writes by itself


def test_the_readme_has_the_table_of_the_registry():
    table = re.search(r"<!-- methods -->\n(.*?)\n<!-- /methods -->", (ROOT / "README.md").read_text(), re.DOTALL)
    assert table.group(1) == methods_table(markdown=True)


def test_the_training_guide_has_every_flag():
    options = ast.parse((ROOT / "examples" / "options.py").read_text())
    names = {node.target.id for node in ast.walk(options) if isinstance(node, ast.AnnAssign)}
    sections = {"run", "data", "model", "weight", "sampler", "optimizer", "output"}  # "process" is also a flag
    guide = (ROOT / "examples" / "guides" / "training.md").read_text()
    missing = [name for name in names - sections if f"`--{name.replace('_', '-')}`" not in guide]
    assert missing == []


def test_the_guide_to_scripts_has_every_model_and_every_option():
    guide = (ROOT / "examples" / "guides" / "drop-in.md").read_text()
    assert [name for name in ADAPTERS if f"`{name}`" not in guide] == []
    parser = argparse.ArgumentParser()
    launch.add_arguments(parser)
    flags = {option for action in parser._actions for option in action.option_strings} - {"-h", "--help"}
    assert sorted(flag for flag in flags if f"`{flag}" not in guide) == []


@pytest.mark.parametrize("study", ["digits-ddpm", "digits-edm"])
def test_the_guide_to_samplers_has_the_tables_of_the_study(study):
    table = ROOT / "examples" / "results" / "gradient-variance" / study / "table.md"
    assert table.read_text() in (ROOT / "examples" / "guides" / "samplers.md").read_text()
