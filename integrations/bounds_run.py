"""``snrweights bounds MODEL``: the bounds that a trained model's losses are, as they are and reweighted."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from snrweights.integrations.diagnose_run import add_data_and_levels, check_and_device, folder_for
from snrweights.integrations.files import write_text

from snrweights import bounds_plots, bounds_report, plots
from snrweights.bounds import Cascade, ImprovedBound, cascade
from snrweights.densities import DENSITIES
from snrweights.runs import names
from snrweights.settings import parse_method
from snrweights.weightings.base import get_weighting, list_weightings, needed_by


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``bounds``."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="folder of examples/train.py, which says what it was trained on; or a pipeline or model of diffusers",
    )
    parser.add_argument("-o", "--output", default="bounds", metavar="DIR", help="folder to write (default: bounds)")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list_weightings(),
        metavar="METHOD",
        help="weightings: names, or with values: sigmoid:bias=2 (default: all)",
    )
    parser.add_argument(
        "--density", choices=list(DENSITIES), help="of the timesteps drawn (default: the schedule's own)"
    )
    add_data_and_levels(parser, levels=33, log_snr=None)


def prepare(arguments: argparse.Namespace) -> Callable[[], int]:
    """Read and measure the model and its bounds; return what writes them and gives the exit code, 1 with a warning."""
    from snrweights.integrations.diagnosed import diagnosed

    device, folder = check_and_device(arguments), folder_for(arguments.output, "bounds.png")
    methods = {text: parse_method(text) for text in arguments.methods}
    for name, hp in methods.values():
        if not needed_by(name):  # a wrong name is said before anything is measured
            get_weighting(name, **hp)
    path = Path(arguments.model).expanduser().resolve()
    found = diagnosed(path, names([path])[0], arguments, device)
    model = found.model
    whole = cascade(found.gap, found.curve, model.schedule, data=found.images, prediction_type=model.prediction_type)
    bounds = {text: whole.improved_bound(name, density=arguments.density, **hp) for text, (name, hp) in methods.items()}
    return lambda: _write(whole, bounds, found.gap.warnings(), folder)


def _write(whole: Cascade, bounds: dict[str, ImprovedBound], warnings: list[str], folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    table = bounds_report.table(whole, bounds)
    write_text(folder / "table.md", table)
    write_text(folder / "bounds.json", bounds_report.to_json(whole, bounds))
    plots.save(bounds_plots.plot_bounds(whole, bounds), folder / "bounds.png")
    print("\n".join([table, *warnings, f"Wrote {folder}/"]))
    return 1 if warnings else 0
