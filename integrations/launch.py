"""Run an unmodified training script with a weighting: ``snrweights launch --method min_snr SCRIPT [ARGS...]``.

The script runs in this process, as ``python SCRIPT ARGS...`` would run it, so that signals, output and exit code are
its own. A denoiser of diffusers that it calls with gradients for the first time is given ``attach``, with the scheduler
that the script noises with.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from snrweights.integrations.diffusers import SAMPLE_MASKS, Attachment, attach, attachments
from snrweights.integrations.files import write_text
from snrweights.integrations.noticing import Noticing
from snrweights.integrations.timestep_adapters import adapter_of, position_of, refusal_of
from torch import Tensor, nn

from snrweights.cli import parse_settings
from snrweights.densities import DENSITIES
from snrweights.predictions import PREDICTION_TYPES
from snrweights.version import __version__
from snrweights.weightings.base import get_weighting

NOT_WEIGHTED = 3  # exit code of a run in which nothing was weighted

_TOKENS = "a cross entropy over masked tokens has no noise level"
_AUTOENCODER = "an autoencoder has no noise level"
_PAIRS = "its loss is of differences between pairs of errors, not a sum over samples"
MEANINGLESS: dict[str, str] = {
    "*lcm*distill*": "consistency distillation compares two outputs, not an output and a target",
    "*train_cm_*": "consistency training has weights of its own on noise levels of its own",
    "*sana_sprint*": "it is trained as a consistency model and against a discriminator",
    "*_dpo*": _PAIRS,
    "*_orpo*": _PAIRS,
    "*amused*": _TOKENS,
    "*llada*": _TOKENS,
    "*vqgan*": _AUTOENCODER,
    "*autoencoder*": _AUTOENCODER,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``launch``."""
    parser.add_argument("--method", default="min_snr", help="a weighting's name, or none to run the script as it is")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="hyperparameter, repeatable: --set gamma=5"
    )
    parser.add_argument(
        "--prediction-type", choices=PREDICTION_TYPES, help="target of the loss (default: what the scheduler states)"
    )
    parser.add_argument("--density", choices=list(DENSITIES), help="of the timesteps drawn (default: uniform)")
    parser.add_argument("--normalize", choices=["mean"], help="scale the weight to average 1")
    parser.add_argument("--clamp-max", type=float, metavar="W", help="upper bound on the weight")
    parser.add_argument(
        "--sample-mask", choices=list(SAMPLE_MASKS), help="weigh these samples only (prior preservation)"
    )
    parser.add_argument("--track", metavar="DIR", help="write the loss over log-SNR to DIR/tracker.safetensors")
    parser.add_argument("--report", metavar="FILE", help="write what was weighted as JSON")
    parser.add_argument("--force", action="store_true", help="run scripts in which a weight has no meaning, too")
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is a module's name, as for python -m")
    parser.add_argument("script", metavar="SCRIPT", help="the training script")
    parser.add_argument("args", nargs=argparse.REMAINDER, metavar="ARGS", help="its arguments")


def prepare(arguments: argparse.Namespace) -> Callable[[], int]:
    """Check the options; return what runs the script and returns an exit code.

    Raises:
        ValueError: a bad option, or a script in which a weight has no meaning.
        FileNotFoundError: there is no such script.
    """
    settings = parse_settings(arguments.set)
    if arguments.method != "none":
        get_weighting(arguments.method, **settings)
        _refuse_meaningless(arguments)
    elif settings:
        raise ValueError(f"`--set {arguments.set[0]}` goes with a method, and `--method` is none.")
    if not arguments.module and not Path(arguments.script).is_file():
        raise FileNotFoundError(f"there is no script {arguments.script!r}.")
    if arguments.track:
        Path(arguments.track).mkdir(parents=True, exist_ok=True)
    if arguments.report:
        Path(arguments.report).parent.mkdir(parents=True, exist_ok=True)
    if arguments.method == "none" and not arguments.track and not arguments.report:
        return lambda: _run_script(arguments)
    return WeightedRun(arguments, settings)


def _refuse_meaningless(arguments: argparse.Namespace) -> None:
    name = arguments.script.rpartition(".")[2] if arguments.module else Path(arguments.script).name
    for pattern, reason in MEANINGLESS.items():
        if fnmatch.fnmatch(name.lower(), pattern) and not arguments.force:
            raise ValueError(f"a weight has no meaning in {name}: {reason}. `--force` runs it nevertheless.")


def _run_script(arguments: argparse.Namespace) -> int:
    sys.argv = [arguments.script, *arguments.args]
    if arguments.module:
        sys.path[0] = os.getcwd()
        runpy.run_module(arguments.script, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(arguments.script).resolve().parent)
        runpy.run_path(arguments.script, run_name="__main__")
    return 0


class WeightedRun:
    """A script's run during which its denoisers get ``attach``."""

    def __init__(self, arguments: argparse.Namespace, settings: dict[str, Any]) -> None:
        self.arguments = arguments
        self.method = None if arguments.method == "none" else arguments.method
        self.settings = settings
        self.attached: list[Attachment] = []
        self.passed_over: dict[str, str] = {}
        self._loss_scale: float | Tensor = 1.0
        self._rank = int(os.environ.get("RANK", "0"))
        self._world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._noticing = Noticing(self._on_model, self._on_backward if arguments.track else None)

    def __call__(self) -> int:
        """Run the script; return 0, or NOT_WEIGHTED if it ended well and nothing was weighted."""
        try:
            with self._noticing:
                _run_script(self.arguments)
        except SystemExit as stop:
            if stop.code not in (None, 0):
                raise
        finally:
            self._write()
        return self._verdict()

    def _on_model(self, model: nn.Module) -> None:
        name = type(model).__name__
        if attachments(model):
            self._pass_over(name, "the script has attached a weight itself")
            if self.method is not None:
                raise ValueError(
                    f"{name} is weighted by the script itself, by {attachments(model)[0]!r}: run it without launch."
                )
            return
        reason = refusal_of(model)
        if adapter_of(model) is None:
            takes_time = position_of(model, "timestep") is not None
            reason = reason or (
                "how it takes its timestep is not known: put `snrweights.attach(..., timestep=...)` into the script"
                if takes_time
                else "it takes no timestep"
            )
        if reason is not None:
            self._pass_over(name, reason)
            return
        try:
            scheduler = self._noticing.schedulers.of_the_loop()
        except LookupError as error:
            self._pass_over(name, str(error))
            return
        attachment = attach(
            model,
            scheduler,
            self.method,
            prediction_type=self.arguments.prediction_type,
            density=self.arguments.density,
            normalize=self.arguments.normalize,
            clamp_max=self.arguments.clamp_max,
            sample_mask=self.arguments.sample_mask,
            track=bool(self.arguments.track),
            loss_scale=lambda: self._loss_scale,
            **self.settings,
        )
        self.attached.append(attachment)
        self._say(repr(attachment))

    def _pass_over(self, name: str, reason: str) -> None:
        self.passed_over[name] = reason

    def _on_backward(self, accelerator: Any) -> None:
        """Note what multiplies the loss, for the tracker; without waiting for the device."""
        scale = torch.ones((), device=accelerator.device)
        if accelerator.scaler is not None:
            scale = accelerator.scaler.scale(scale)
        self._loss_scale = scale / accelerator.gradient_accumulation_steps

    def _say(self, text: str) -> None:
        if self._rank == 0:
            print(f"snrweights: {text}", file=sys.stderr, flush=True)

    def _write(self) -> None:
        if self.arguments.track:
            for i, attachment in enumerate(self.attached):
                which = "".join(f"-{n}" for n in (i, self._rank) if n or self._world_size > 1)
                attachment.tracker.save(Path(self.arguments.track) / f"tracker{which}.safetensors")  # type: ignore[union-attr]
        if self.arguments.report and self._rank == 0:
            report = {
                "snrweights": __version__,
                "script": [self.arguments.script, *self.arguments.args],
                "attached": [attachment.report().as_dict() for attachment in self.attached],
                "passed_over": self.passed_over,
            }
            write_text(self.arguments.report, json.dumps(report, indent=2) + "\n")

    def _verdict(self) -> int:
        if self.method is None or any(attachment.weighted for attachment in self.attached):
            return 0
        reasons = [attachment.report().reason for attachment in self.attached]
        reasons += [f"{name}: {reason}" for name, reason in self.passed_over.items()]
        self._say(
            f"nothing was weighted. {'; '.join(map(str, reasons))}."
            if reasons
            else "nothing was weighted: no diffusers model was called with gradients. A model of another library is "
            "weighted by `snrweights.attach(model, scheduler, ..., timestep=...)` in the script."
        )
        return NOT_WEIGHTED


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``snrweights launch`` with these arguments; return the exit code."""
    from snrweights.cli import main as command

    return command(["launch", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
