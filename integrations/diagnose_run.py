"""``snrweights diagnose MODEL_OR_RUN``: how far trained models are from the optimal loss of their data."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from snrweights.integrations.files import write_text

from snrweights import gap_plots, plots
from snrweights.diagnose import ModelGap
from snrweights.predictions import PREDICTION_TYPES
from snrweights.runs import names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``diagnose``."""
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL_OR_RUN",
        help="folder of examples/train.py, which says what it was trained on; or a pipeline or model of diffusers",
    )
    parser.add_argument(
        "-o", "--output", default="diagnosis", metavar="DIR", help="folder to write (default: diagnosis)"
    )
    parser.add_argument(
        "--unit", default="epsilon", choices=PREDICTION_TYPES, help="whose error is shown (default: epsilon)"
    )

    add_data_and_levels(parser, levels=25, log_snr=(-8.0, 8.0))


def add_data_and_levels(parser: argparse.ArgumentParser, *, levels: int, log_snr: tuple[float, float] | None) -> None:
    """Declare how a model is measured: the options that ``diagnosed`` looks at."""
    parser.add_argument("--curve", metavar="FILE", help="of snrweights optimal-loss (default: the run's, or measured)")

    data = parser.add_argument_group("the training data; for a run it is known")
    data.add_argument("--data", metavar="DATASET", help="as for snrweights optimal-loss")
    data.add_argument("--split", default="train", help="which split (default: train)")
    data.add_argument("--column", help="of the images (default: image)")
    data.add_argument("--labels", metavar="COLUMN", help="what the model is told (default: nothing)")
    data.add_argument("--flips", action="store_true", help="trained with random mirror images")

    how = parser.add_argument_group("how")
    how.add_argument("--scheduler", metavar="DIR_OR_NAME", help="where a model has none beside it")
    how.add_argument("--prediction-type", choices=PREDICTION_TYPES, help="(default: what the scheduler states)")
    how.add_argument("--levels", type=int, default=levels, metavar="N", help=f"noise levels (default: {levels})")
    shown = "what schedule and curve reach" if log_snr is None else f"{log_snr[0]:g} {log_snr[1]:g}"
    how.add_argument(
        "--log-snr", type=float, nargs=2, default=log_snr, metavar=("LOW", "HIGH"), help=f"(default: {shown})"
    )
    how.add_argument("--draws", type=int, default=256, metavar="N", help="of a point and noise (default: 256)")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws, the same for all (default: 0)")
    how.add_argument("--device", help="where to compute (default: cuda if there is one)")


def check_and_device(arguments: argparse.Namespace) -> str:
    """Check what ``add_data_and_levels`` declared; return the device.

    Raises:
        ValueError: fewer than two levels.
    """
    if arguments.levels < 2:
        raise ValueError(f"`--levels` must be at least 2, got {arguments.levels}.")
    return arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")


def folder_for(output: str, figure: str) -> Path:
    """Return the folder of the results; what stands in the way of them is said before all is measured, not after."""
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`--output` {output!r} is not a folder.")
    plots.check_format(folder / figure)
    return folder


def prepare(arguments: argparse.Namespace) -> Callable[[], int]:
    """Read and measure all models; return what writes the results and gives the exit code, 1 with a warning."""
    from snrweights.integrations.diagnosed import diagnosed

    device, folder = check_and_device(arguments), folder_for(arguments.output, "gap.png")
    paths = [Path(model).expanduser().resolve() for model in arguments.models]
    found = [
        diagnosed(path, name, arguments, device, arguments.unit).gap
        for path, name in zip(paths, names(paths), strict=True)
    ]
    return lambda: _write(found, folder, arguments.unit)


def _write(found: list[ModelGap], folder: Path, unit: str) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    tables = [f"# {gap.name}\n\n{gap.table(unit)}\n" for gap in found]
    write_text(folder / "table.md", "\n".join(tables))
    for gap in found:
        write_text(folder / f"{gap.name.replace('/', '-')}.json", gap.to_json(unit))
    plots.save(gap_plots.plot_gaps(found, unit), folder / "gap.png")
    print("\n".join(tables))
    warnings = [warning for gap in found for warning in gap.warnings()]
    print("\n".join([*warnings, f"Wrote {folder}/"]))
    return 1 if warnings else 0
