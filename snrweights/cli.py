"""The ``snrweights`` command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from snrweights import page, plots, report, runs
from snrweights.densities import DENSITIES
from snrweights.doctor import doctor
from snrweights.predictions import PREDICTION_TYPES
from snrweights.schedulers import schedule_names
from snrweights.settings import parse_method, parse_settings
from snrweights.version import __version__
from snrweights.weightings.base import Weighting, get_weighting


def _labelled(specification: str) -> tuple[str, Weighting]:
    """Read ``min_snr`` or ``min_snr:gamma=5,other=1``."""
    name, hp = parse_method(specification)
    return specification, get_weighting(name, **hp)


def _methods(arguments: argparse.Namespace) -> None:
    print(report.methods_table(markdown=arguments.markdown, masked=arguments.masked))


def _plot(arguments: argparse.Namespace) -> None:
    figure = plots.plot_weights(
        arguments.schedule,
        dict(_labelled(text) for text in arguments.methods),
        prediction_type=arguments.prediction_type,
        density=arguments.density,
    )
    plots.save(figure, arguments.output)
    print(f"Wrote {arguments.output}")


def _doctor(arguments: argparse.Namespace) -> Callable[[], int]:
    from snrweights.integrations.scheduler_files import load_scheduler

    diagnosis = doctor(
        load_scheduler(arguments.scheduler),
        arguments.method,
        prediction_type=arguments.prediction_type,
        density=arguments.density,
        normalize=arguments.normalize,
        clamp_max=arguments.clamp_max,
        batch_size=arguments.batch_size,
        accumulation=arguments.accumulation,
        prior_preservation=arguments.prior_preservation,
        sample_mask=arguments.sample_mask,
        script_args=arguments.script_args.split(),
        **parse_settings(arguments.set),
    )
    print(json.dumps(diagnosis.as_dict(), indent=2) if arguments.json else diagnosis)
    if arguments.output:
        plots.save(plots.plot_diagnosis(diagnosis), arguments.output)
    return lambda: 0 if diagnosis.healthy else 1


def _report(arguments: argparse.Namespace) -> None:
    from snrweights.integrations.files import write_text

    html = page.page(runs.read_runs(arguments.runs))
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, html)
    print(f"Wrote {arguments.output}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="snrweights", description="Loss weights over the noise level for diffusion training."
    )
    parser.add_argument("--version", action="version", version=f"snrweights {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    methods = commands.add_parser("methods", help="print the table of weightings")
    methods.add_argument("--markdown", action="store_true", help="as a Markdown table")
    methods.add_argument("--masked", action="store_true", help="those of masked diffusion")
    methods.set_defaults(run=_methods)

    plot = commands.add_parser("plot", help="draw weights and objectives over log-SNR")
    plot.add_argument("--schedule", default="linear", choices=schedule_names(), help="noise schedule (default: linear)")
    plot.add_argument(
        "--methods", nargs="+", required=True, metavar="METHOD", help="names, or with values: min_snr:gamma=5"
    )
    plot.add_argument(
        "--prediction-type", default="epsilon", choices=PREDICTION_TYPES, help="of the model (default: epsilon)"
    )
    plot.add_argument("--density", choices=list(DENSITIES), help="of the timesteps drawn (default: the schedule's own)")
    plot.add_argument("-o", "--output", default="weights.png", help="file to write (default: weights.png)")
    plot.set_defaults(run=_plot)

    together = commands.add_parser("report", help="write one HTML page of one run or several side by side")
    together.add_argument("runs", nargs="+", metavar="RUN_DIR", help="folder of examples/train.py or of launch --track")
    together.add_argument("-o", "--output", default="report.html", help="file to write (default: report.html)")
    together.set_defaults(run=_report)

    check = commands.add_parser("doctor", help="say what will go wrong in a configuration, and what mends it")
    check.add_argument(
        "--scheduler", required=True, metavar="DIR_OR_NAME", help="a scheduler's or pipeline's folder, or its name"
    )
    check.add_argument("--method", help="the weighting to be used (default: none)")
    check.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="hyperparameter, repeatable")
    check.add_argument("--prediction-type", choices=PREDICTION_TYPES, help="(default: what the scheduler states)")
    check.add_argument("--density", choices=list(DENSITIES), help="of the timesteps drawn (default: uniform)")
    check.add_argument("--normalize", choices=["mean"], help="scale the weight to average 1")
    check.add_argument("--clamp-max", type=float, metavar="W", help="upper bound on the weight")
    check.add_argument("--batch-size", type=int, metavar="N", help="samples in a micro-batch")
    check.add_argument("--accumulation", type=int, default=1, metavar="K", help="micro-batches in a step (default: 1)")
    check.add_argument("--prior-preservation", action="store_true", help="the second half of a batch are class images")
    check.add_argument("--sample-mask", action="store_true", help="attach is given one")
    check.add_argument("--script-args", default="", metavar="ARGS", help='of the script: --script-args="--snr_gamma 5"')
    check.add_argument("--json", action="store_true", help="print JSON")
    check.add_argument("-o", "--output", metavar="FILE", help="draw what the configuration optimises")
    check.set_defaults(run=_doctor)

    from snrweights.integrations import audit_run, bounds_run, diagnose_run, launch, optimal_run

    optimum = commands.add_parser(
        "optimal-loss",
        help="compute what no denoiser can beat on a data set, at every noise level",
        description="Compute what no denoiser can beat on a data set, at every noise level, and write it to a file.",
    )
    optimal_run.add_arguments(optimum)
    optimum.set_defaults(run=optimal_run.run)

    for name, module, summary in (
        ("diagnose", diagnose_run, "say how far trained models are from the optimal loss of their data, and where"),
        ("bounds", bounds_run, "say what the loss of a trained model bounds, as it is and reweighted"),
        ("audit", audit_run, "run a training script for a few steps and say what its loss weighs"),
        ("launch", launch, "run an unmodified training script with a weighting"),
    ):
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        module.add_arguments(command)
        command.set_defaults(run=module.prepare)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code.

    A command does its work, or checks its arguments and returns the rest of its work: the errors of a script that it
    runs are the script's own.
    """
    arguments = _parser().parse_args(argv)
    try:
        rest = arguments.run(arguments)
    except KeyboardInterrupt:
        print(f"\nsnrweights {arguments.command}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        print(f"snrweights {arguments.command}: {error}", file=sys.stderr)
        return 2
    return rest() if rest is not None else 0
