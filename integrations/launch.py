"""Run an unmodified training script with a weighting: ``snrweights launch --method min_snr SCRIPT [ARGS...]``.

The script runs in this process, as ``python SCRIPT ARGS...`` would run it, so that signals, output and exit code are
its own. A denoiser of diffusers that it calls with gradients for the first time is given ``attach``, with the scheduler
that the script noises with.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from snrweights.integrations.attachment import ON_DOUBLE_WEIGHTING, SAMPLE_MASKS, Attachment, attachments
from snrweights.integrations.diffusers import attach
from snrweights.integrations.files import write_text
from snrweights.integrations.noticing import Noticing
from snrweights.integrations.script import add_script, run_script, split_command_line, without_secrets
from snrweights.integrations.shares import discard_shares, save_together
from snrweights.integrations.timestep_adapters import adapter_of, position_of, refusal_of
from torch import Tensor, nn

from snrweights.densities import DENSITIES
from snrweights.importance import BY_LOSS
from snrweights.losses import check_depends_on_t_alone
from snrweights.predictions import PREDICTION_TYPES
from snrweights.settings import parse_settings
from snrweights.version import __version__
from snrweights.weightings.base import get_weighting

NOT_WEIGHTED = 3  # exit code of a run in which nothing was weighted
_PATIENCE = 10  # optimizer steps after which a run in which nothing is weighted is ended

_TOKENS = "a cross entropy over masked tokens has no noise level"
_AUTOENCODER = "an autoencoder has no noise level"
_PAIRS = "its loss is of differences between pairs of errors, not a sum over samples"
MEANINGLESS: dict[str, str] = {
    "*lcm*distill*": "consistency distillation compares two outputs, not an output and a target",
    "*train_cm_*": "consistency training has weights of its own on noise levels of its own",
    "*sana_sprint*": "it is trained as a consistency model and against a discriminator",
    "*_lpl*": "its second loss, on decoded features, would be weighted too",
    "*_dpo*": _PAIRS,
    "*_orpo*": _PAIRS,
    "*amused*": _TOKENS,
    "*llada*": _TOKENS,
    "*vqgan*": _AUTOENCODER,
    "*autoencoder*": _AUTOENCODER,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``launch``."""
    weight = parser.add_argument_group("the weight")
    weight.add_argument("--method", default="min_snr", help="a weighting's name, or none (default: min_snr)")
    weight.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="hyperparameter, repeatable: --set gamma=5"
    )
    weight.add_argument(
        "--prediction-type",
        choices=PREDICTION_TYPES,
        metavar="T",
        help=f"target of the loss, one of {', '.join(PREDICTION_TYPES)} (default: what the scheduler states)",
    )
    weight.add_argument(
        "--density",
        choices=list(DENSITIES),
        metavar="D",
        help=f"of the timesteps drawn, one of {', '.join(DENSITIES)} (default: uniform)",
    )
    weight.add_argument("--normalize", choices=["mean"], help="scale the weight to average 1")
    weight.add_argument("--clamp-max", type=float, metavar="W", help="upper bound on the weight")
    weight.add_argument(
        "--sample-mask", choices=list(SAMPLE_MASKS), help="weigh these samples only (prior preservation)"
    )
    weight.add_argument(
        "--sampler",
        choices=BY_LOSS,
        metavar="RULE",
        help=f"redraw the timesteps by importance, by one of {', '.join(BY_LOSS)} (default: as the script draws)",
    )
    weight.add_argument(
        "--on-double-weighting",
        choices=ON_DOUBLE_WEIGHTING,
        default="error",
        help="when the script's own loss is weighted already (default: error)",
    )
    watch = parser.add_argument_group("what is written")
    watch.add_argument("--track", metavar="DIR", help="the loss over log-SNR, to DIR/tracker.safetensors")
    watch.add_argument("--report", metavar="FILE", help="what was weighted, as JSON")
    watch.add_argument("--audit", type=int, metavar="N", help="backward passes in which the loss is audited")
    parser.add_argument("--force", action="store_true", help="run scripts in which a weight has no meaning, too")
    add_script(parser)


def prepare(arguments: argparse.Namespace) -> Callable[[], int]:
    """Check the options; return what runs the script and returns an exit code.

    Raises:
        ValueError: a bad option, or a script in which a weight has no meaning.
        FileNotFoundError: there is no such script.
    """
    script, rest = split_command_line(arguments)
    settings = parse_settings(arguments.set)
    if arguments.method == "none":
        refused = ["set", "normalize", "clamp_max", "sample_mask"] + ([] if arguments.sampler else ["density"])
        for name in refused:
            if getattr(arguments, name):
                raise ValueError(f"`--{name.replace('_', '-')}` goes with a method, and `--method` is none.")
    else:
        check_depends_on_t_alone(get_weighting(arguments.method, **settings))
        if arguments.clamp_max is not None and not 0 < arguments.clamp_max < math.inf:
            raise ValueError(f"`--clamp-max` must be > 0, got {arguments.clamp_max}.")
    if arguments.method != "none" or arguments.sampler:
        _refuse_meaningless(script, arguments)
    if arguments.audit is not None and arguments.audit < 1:
        raise ValueError(f"`--audit` must be >= 1, got {arguments.audit}.")
    if arguments.track:
        arguments.track = Path(arguments.track).resolve()  # the script may change the directory
        arguments.track.mkdir(parents=True, exist_ok=True)
    if arguments.report:
        arguments.report = Path(arguments.report).resolve()
        arguments.report.parent.mkdir(parents=True, exist_ok=True)
    if arguments.method == "none" and not any((arguments.track, arguments.report, arguments.audit, arguments.sampler)):
        return lambda: run_script(script, rest, arguments.module)
    return WeightedRun(script, rest, arguments, settings)


def _refuse_meaningless(script: str, arguments: argparse.Namespace) -> None:
    name = script.rpartition(".")[2] if arguments.module else Path(script).name
    for pattern, reason in MEANINGLESS.items():
        if fnmatch.fnmatch(name.lower(), pattern) and not arguments.force:
            raise ValueError(f"a weight has no meaning in {name}: {reason}. `--force` runs it nevertheless.")


class NothingWeighted(SystemExit):
    """Ends a run in which nothing is weighted."""


class _LossScale:
    """What multiplies the loss before ``backward``, as the Accelerator has it."""

    def __init__(self) -> None:
        self.value: float | Tensor = 1.0

    def __call__(self) -> float | Tensor:
        return self.value

    def note(self, accelerator: Any) -> None:
        """Read it off, without waiting for the device."""
        scale = torch.ones((), device=accelerator.device)
        if accelerator.scaler is not None:
            scale = accelerator.scaler.scale(scale)
        self.value = scale / accelerator.gradient_accumulation_steps


class WeightedRun:
    """A script's run during which its denoisers get ``attach``."""

    def __init__(
        self, script: str, rest: Sequence[str], arguments: argparse.Namespace, settings: dict[str, Any]
    ) -> None:
        self.script, self.rest = script, rest
        self.arguments = arguments
        self.method = None if arguments.method == "none" else arguments.method
        self.settings = settings
        self.attached: list[Attachment] = []
        self.passed_over: dict[str, str] = {}
        self._steps = 0
        self._loss_scale = _LossScale()
        self._rank = int(os.environ.get("RANK", "0"))
        self._world_size = int(os.environ.get("WORLD_SIZE", "1"))
        reads_losses = arguments.track or arguments.sampler
        self._noticing = Noticing(self._on_model, self._loss_scale.note if reads_losses else None)

    def __call__(self) -> int:
        """Run the script; return 0, or NOT_WEIGHTED if it ended well and nothing was weighted."""
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        if self.arguments.track:
            discard_shares(self.arguments.track, self._rank, self._world_size)
        patience = register_optimizer_step_pre_hook(self._on_optimizer_step)
        try:
            with self._noticing:
                run_script(self.script, self.rest, self.arguments.module)
        except NothingWeighted:
            pass
        except SystemExit as stop:
            if stop.code not in (None, 0):
                raise
        finally:
            patience.remove()
            written = self._write()
            for attachment in self.attached:
                attachment.detach()
        return self._verdict() if written else 1

    def _on_model(self, model: nn.Module) -> None:
        name = type(model).__name__
        present = attachments(model)
        if present:
            if any(attachment.shares_with(own) for attachment in present for own in self.attached):
                return  # a copy of a model that is weighted
            self.passed_over[name] = "the script has attached a weight itself"
            if self.method is None:
                return
            raise ValueError(f"{name} is weighted by the script itself, by {present[0]!r}: run it without launch.")
        adapter = adapter_of(model)
        reason = refusal_of(model)
        if adapter is None and reason is None:
            reason = (
                "it takes no timestep"
                if position_of(model, "timestep") is None
                else "how it takes its timestep is not known: put `snrweights.attach(..., timestep=...)` into it"
            )
        if reason is not None:
            self.passed_over[name] = reason
            return
        try:
            scheduler = self._noticing.schedulers.of_the_loop()
        except LookupError as error:
            if adapter is None or not adapter.is_flow:
                self.passed_over[name] = str(error)
                return
            scheduler = "flow"  # such a model takes the flow's own time, with or without a scheduler
        attachment = attach(
            model,
            scheduler,
            self.method,
            prediction_type=self.arguments.prediction_type,
            density=self.arguments.density,
            normalize=self.arguments.normalize,
            clamp_max=self.arguments.clamp_max,
            sample_mask=self.arguments.sample_mask,
            sampler=self.arguments.sampler,
            track=bool(self.arguments.track),
            loss_scale=self._loss_scale,
            audit=self.arguments.audit,
            on_double_weighting=self.arguments.on_double_weighting,
            **self.settings,
        )
        attachment.drawn_before(self._noticing.schedulers.timesteps)
        self.attached.append(attachment)
        self._say(repr(attachment))

    def _on_optimizer_step(self, *of: Any) -> None:
        """End a run that trains unweighted before it has cost much."""
        self._steps += 1
        if self._steps == _PATIENCE and not self.arguments.force and self._unweighted:
            raise NothingWeighted(NOT_WEIGHTED)

    @property
    def _unweighted(self) -> bool:
        return bool(self.method or self.arguments.sampler) and not any(
            attachment.weighted for attachment in self.attached
        )

    def _say(self, text: str) -> None:
        if self._rank == 0:
            print(f"snrweights: {text}", file=sys.stderr, flush=True)

    def _write(self) -> bool:
        """Write what was asked for; return whether that went well, and leave a script's own error to be seen."""
        try:
            self._write_files()
        except (OSError, SafetensorError, ValueError) as error:
            self._say(f"could not write: {error}")
            return False
        return True

    def _write_files(self) -> None:
        if self.arguments.track:
            trackers = [attachment.tracker for attachment in self.attached]
            save_together(trackers, self.arguments.track, self._rank, self._world_size)  # type: ignore[arg-type]
        if self.arguments.report and self._rank == 0:
            report = {
                "snrweights": __version__,
                "script": [self.script, *without_secrets(self.rest)],
                "attached": [attachment.report().as_dict() for attachment in self.attached],
                "passed_over": self.passed_over,
            }
            write_text(self.arguments.report, json.dumps(report, indent=2, allow_nan=False) + "\n")
        if self.arguments.audit:
            for attachment in self.attached:
                self._say(str(attachment.audit))

    def _verdict(self) -> int:
        if not self._unweighted:
            return 0
        self.explain("nothing was weighted")
        return NOT_WEIGHTED

    def explain(self, what: str) -> None:
        """Say why no model got a weight."""
        reasons = [attachment.why_not() for attachment in self.attached]
        reasons += [f"{name}: {reason}" for name, reason in self.passed_over.items()]
        if not reasons:
            reasons = [
                "no diffusers model was called with gradients in this process. A model of another library takes "
                "`snrweights.attach(model, scheduler, ..., timestep=...)` in the script; processes that the script "
                "itself starts are not looked into, those of accelerate launch and torchrun are"
            ]
        self._say(f"{what}: {'; '.join(reasons)}.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``snrweights launch`` with these arguments; return the exit code."""
    from snrweights.cli import main as command

    return command(["launch", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
