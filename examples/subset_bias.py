"""What estimating the optimal loss from random subsets costs: the estimators of arXiv 2506.13763 beside the full pass.

python examples/subset_bias.py
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from snrweights.integrations.reference_data import load_reference
from torch import Tensor

from snrweights import plots
from snrweights.optimal import optimal_loss
from snrweights.optimal.subsets import subset_optimal_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVELS = (0.3, 0.5, 0.7, 1.0, 2.0, 4.0)
TRUTH = 64  # times the draws


def estimators(size: int, subset: int) -> dict[str, tuple[str, dict[str, float]]]:
    """Return name in the table -> estimator and options."""
    full, part = {}, {"subset": subset}
    return {
        "AB, full set": ("AB", full),
        "SNIS": ("SNIS", part),
        "DOL": ("DOL", part),
        f"cDOL, C = 4N/L = {4 * size / subset:.3g}": ("cDOL", part),
        f"cDOL, C = (N-1)/(L-1) = {(size - 1) / (subset - 1):.3g}": (
            "cDOL",
            {**part, "correction": (size - 1) / (subset - 1)},
        ),
    }


def study(data: Tensor, subset: int, draws: int, seed: int) -> dict[str, list[tuple[float, float]]]:
    """Return, for every estimator and level, relative bias and its standard error."""
    points = data.double().flatten(1) / 127.5 - 1
    truth = optimal_loss(points, LEVELS, draws=TRUTH * draws, seed=seed + 1)
    own = optimal_loss(points, LEVELS, draws=draws, seed=seed)
    found = {"this package, full set": (own.value, own.stderr)}
    for name, (estimator, options) in estimators(len(points), subset).items():
        found[name] = subset_optimal_loss(points, LEVELS, estimator, draws=draws, seed=seed, **options)
    return {
        name: list(
            zip(
                (value / truth.value - 1).tolist(),
                ((stderr**2 + truth.stderr**2).sqrt() / truth.value).tolist(),
                strict=True,
            )
        )
        for name, (value, stderr) in found.items()
    }


def table(results: dict[str, list[tuple[float, float]]]) -> str:
    """Return a Markdown table: percent, with standard errors."""
    head = [
        "| estimator | " + " | ".join(f"sigma {level:g}" for level in LEVELS) + " |",
        "|---" * (len(LEVELS) + 1) + "|",
    ]
    rows = (
        f"| {name} | " + " | ".join(f"{100 * bias:+.1f} ± {100 * stderr:.1f}" for bias, stderr in row) + " |"
        for name, row in results.items()
    )
    return "\n".join([*head, *rows]) + "\n"


def figure(results: dict[str, list[tuple[float, float]]]) -> Figure:
    """Draw the relative bias of every estimator over the noise level."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(7, 4), layout="constrained")
    ax = drawn.subplots()
    for (name, row), marker in zip(results.items(), "osv^Dx", strict=True):
        bias, stderr = (100 * torch.tensor(row).T).tolist()
        ax.errorbar(LEVELS, bias, stderr, marker=marker, ms=4, lw=1.2, capsize=2, label=name)
    ax.axhline(0, color="0.6", lw=0.8, zorder=0)
    ax.set_xscale("log")
    ax.set_yscale("symlog", linthresh=10)
    ax.set_xticks(LEVELS, [f"{level:g}" for level in LEVELS])
    ax.minorticks_off()
    ticks = (-100, -10, 0, 10, 100, 1000, 10000)
    ax.set_yticks(ticks, [f"{tick:+d} %" if tick else "0" for tick in ticks])
    ax.set_xlabel("sigma")
    ax.set_ylabel("bias of the optimal loss")
    ax.legend(frameon=False, fontsize=8)
    return drawn


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write table, figure and numbers."""
    parser = argparse.ArgumentParser(description="The bias of estimating the optimal loss from subsets, on the digits.")
    parser.add_argument("--subset", type=int, default=200, help="points of a subset (default: 200)")
    parser.add_argument("--draws", type=int, default=2000, help="of every estimator (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("-o", "--output", type=Path, default=Path("subset-bias"), help="folder (default: subset-bias)")
    arguments = parser.parse_args(argv)
    began = time.perf_counter()
    images, _ = load_reference("digits")
    results = study(torch.stack([*images]), arguments.subset, arguments.draws, arguments.seed)
    seconds = time.perf_counter() - began
    arguments.output.mkdir(parents=True, exist_ok=True)
    text = table(results)
    (arguments.output / "table.md").write_text(text)
    facts = {name: getattr(arguments, name) for name in ("subset", "draws", "seed")}
    facts |= {"levels": LEVELS, "seconds": round(seconds, 1), "relative_bias": results}
    (arguments.output / "results.json").write_text(json.dumps(facts, indent=2) + "\n")
    plots.save(figure(results), arguments.output / "figure.png")
    print(text + f"In {seconds:.0f} seconds. Wrote {arguments.output}/")


if __name__ == "__main__":
    main()
