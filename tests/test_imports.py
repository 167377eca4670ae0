"""The floors of the package: who may import whom, and that the core needs torch alone."""

import ast
import sys
from pathlib import Path

import pytest

import snrweights

PACKAGE = Path(snrweights.__file__).parent

# a module imports from lower floors only; a new module must be given one
FLOORS = [
    {"files", "measure", "schedules", "predictions", "seeds", "settings", "version", "optimal.exact"},
    {"elbo_terms", "schedulers", "densities", "process", "statistics", "tracker_state", "uncertainty"}
    | {"optimal.controls", "optimal.curve", "optimal.pairs", "optimal.reference"}
    | {"optimal.sources", "optimal.work"},
    {"drawn", "tracking", "uniforms", "optimal.draws", "optimal.ideal", "optimal.small_noise"},
    {"quantiles", "history", "weightings.bound", "optimal.estimator", "optimal.gap", "diagnose"}
    | {"optimal.information"},
    {"weightings.base", "optimal.scaling", "optimal.subsets", "masked.schedules"},
    {"optimal", "masked.weights"},
    {
        *("weightings.adaptive", "weightings.classic", "weightings.clipped", "weightings.objectives"),
        "weightings.optimal",
        "weightings.parity",
    },
    {"weightings", "masked.counts", "masked.draws"},
    {"losses", "samplers", "masked.losses"},
    {"importance", "objective", "recognition", "masked.evaluation"},
    {"findings", "bounds", "masked"},
    {"doctor"},
    {"report", "plots", "runs", "charts", "bounds_report"},
    {"run_charts", "gap_plots", "optimal_plots", "bounds_plots"},
    {"page"},
    {"cli"},
    {""},  # the package's own __init__
]
FLOOR = {module: i for i, floor in enumerate(FLOORS) for module in floor}
ALLOWED = {"torch", "numpy", "safetensors", "snrweights", *sys.stdlib_module_names}


def modules():
    """Names inside the package, "" for its __init__, with their files."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = dict(modules())


def imports(nodes):
    """Dotted names that a list of statements imports, outside functions and `if TYPE_CHECKING`."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = [child for child in ast.iter_child_nodes(node) if isinstance(child, (ast.stmt, ast.excepthandler))]
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                body = node.orelse
            yield from imports(body)


def imported(module):
    return list(imports(ast.parse(MODULES[module].read_text()).body))


def own(name):
    """The module of the package behind an imported name, or None."""
    inside = name.removeprefix("snrweights.")
    if inside == name:
        return None
    while inside not in MODULES:
        inside = inside.rpartition(".")[0]
    return inside


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_lower_floors_only(module):
    assert module in FLOOR, "give the new module a floor"
    for name in imported(module):
        below = own(name)
        if below is not None:
            assert FLOOR[below] < FLOOR[module], f"{module or 'snrweights'} imports {name}"


@pytest.mark.parametrize("module", MODULES)
def test_at_module_level_only_the_core_dependencies_are_imported(module):
    needed = {name.partition(".")[0] for name in imported(module)}
    assert needed <= ALLOWED
    assert not needed & {"diffusers", "accelerate", "datasets", "evaluate", "matplotlib"}


def test_the_reader_of_imports_reads():
    source = """
import os.path
from snrweights.plots import save
try:
    import diffusers
except ImportError:
    from datasets import load
class A:
    import evaluate
if TYPE_CHECKING:
    import matplotlib
def f():
    import accelerate
"""
    names = list(imports(ast.parse(source).body))
    assert names == ["os.path", "snrweights.plots.save", "diffusers", "datasets.load", "evaluate"]
    assert own("snrweights.plots.save") == "plots"
    assert own("snrweights.weightings.base.Weighting") == "weightings.base"
    assert own("snrweights.weightings") == "weightings"
    assert own("torch.Tensor") is None


def test_the_folder_of_the_integrations_is_no_package_of_its_own(monkeypatch):
    monkeypatch.syspath_prepend(PACKAGE.parent)
    monkeypatch.delitem(sys.modules, "integrations", raising=False)
    with pytest.raises(ImportError, match=r"import this folder as snrweights\.integrations, not as 'integrations'"):
        __import__("integrations")
