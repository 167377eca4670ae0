"""Train a masked diffusion model on pixels as tokens, with a chosen loss weighting.

accelerate launch examples/train_masked.py
accelerate launch examples/train_masked.py --method sigmoid --set bias=1 --sampler confidence --output-dir runs/x
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from evaluation import Evaluator
from loop import run_or_try
from masked_options import Options, check_options
from masked_trainer import MaskedTrainer, TokenEvaluator
from snrweights.integrations.config import parse_options
from snrweights.integrations.results import MetricsLog
from torch.utils.data import Subset

PRESETS = Path(__file__).parent / "configs" / "masked"


def main(argv: list[str] | None = None) -> None:
    """Train, then write down everything that was learnt."""
    options = parse_options(Options, PRESETS, "digits", argv)
    options.run.output_dir = options.run.output_dir or f"runs/masked-{options.preset}-{options.weight.method}"
    check_options(options)
    run_or_try(options, begin, finish)


def begin(options: Options, accelerator: Accelerator, data: Subset) -> tuple[MaskedTrainer, Evaluator[MaskedTrainer]]:
    """Return what trains and what evaluates."""
    trainer = MaskedTrainer(options, accelerator)
    return trainer, TokenEvaluator(options, trainer, data)


def finish(trainer: MaskedTrainer, log: MetricsLog) -> dict[str, Any]:
    """Return the last negative ELBO on held-out images, if it was measured."""
    if not trainer.accelerator.is_main_process:
        return {}
    measured = log.lines_with("negative_elbo")
    return measured[max(measured)] if measured else {}


if __name__ == "__main__":
    main()
