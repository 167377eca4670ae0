"""``snrweights audit SCRIPT [ARGS...]``: run a script for a few steps, and say what its loss weighs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from snrweights.integrations.diffusers import AUDIT_STEPS
from snrweights.integrations.files import write_text
from snrweights.integrations.launch import WeightedRun
from snrweights.integrations.script import add_script, split_command_line

from snrweights import plots
from snrweights.predictions import PREDICTION_TYPES


class _Audited(SystemExit):
    """Ends a script when enough of it was seen."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``audit``."""
    parser.add_argument(
        "--steps", type=int, default=AUDIT_STEPS, metavar="N", help=f"backward passes (default: {AUDIT_STEPS})"
    )
    parser.add_argument(
        "--prediction-type",
        choices=PREDICTION_TYPES,
        metavar="T",
        help=f"of the model's output, one of {', '.join(PREDICTION_TYPES)} (default: what the scheduler states)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the numbers")
    parser.add_argument("-o", "--output", metavar="FILE", help="draw the weight over log-SNR")
    add_script(parser)


def prepare(arguments: argparse.Namespace) -> Callable[[], int]:
    """Check the options; return what runs the script, prints the audit and returns an exit code."""
    if arguments.steps < 1:
        raise ValueError(f"`--steps` must be >= 1, got {arguments.steps}.")
    script, rest = split_command_line(arguments)
    for name in ("json", "output"):
        if getattr(arguments, name):
            path = Path(getattr(arguments, name)).resolve()
            path.parent.mkdir(parents=True, exist_ok=True)
            setattr(arguments, name, path)
    names = ("density", "normalize", "clamp_max", "sample_mask", "sampler", "track", "report")
    unused: dict[str, Any] = dict.fromkeys(names)
    arguments = argparse.Namespace(
        **(unused | vars(arguments)), method="none", audit=arguments.steps, on_double_weighting="ignore", force=True
    )
    return AuditRun(script, rest, arguments, {})


def _numbered(path: Path, i: int) -> Path:
    """The file for denoiser i: the first has the name that was given."""
    return path.with_stem(f"{path.stem}-{i + 1}") if i else path


class AuditRun(WeightedRun):
    """A script's run that changes nothing, and ends when the audits of its denoisers have seen enough."""

    def __call__(self) -> int:
        """Run the script; return 0, or 3 if no loss could be read."""
        super().__call__()
        reports = [attachment.audit for attachment in self.attached]
        read = [report for report in reports if report is not None and report.steps]
        for i, report in enumerate(read if self._rank == 0 else []):
            print(report)
            if self.arguments.json:
                numbers = json.dumps(report.as_dict(), indent=2, allow_nan=False)
                write_text(_numbered(self.arguments.json, i), numbers + "\n")
            if self.arguments.output:
                figure = plots.plot_measured_weight(report.log_snr, report.weight, report.description)
                plots.save(figure, _numbered(self.arguments.output, i))
        if not read:
            self.explain("no loss was read")
        return 0 if read else 3

    def _on_optimizer_step(self, *of: Any) -> None:
        if self.attached and not any(attachment.auditing for attachment in self.attached):
            raise _Audited(0)

    def _write(self) -> bool:
        """Nothing but the audit is written, at the end."""
        return True
