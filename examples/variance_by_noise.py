"""Draw the variance of the loss by noise level of runs of train.py: unweighted, and beside it as each was weighted.

python examples/variance_by_noise.py runs/digits-edm-edm runs/digits-edm-alsr-alsr -o variance.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace

import yaml
from snrweights.integrations.processes import PROCESSES

import snrweights
from snrweights import plots
from snrweights.settings import parse_settings
from snrweights.statistics import LossStatistics
from snrweights.weightings.bound import WeightCurve


def read(run: Path) -> tuple[LossStatistics, WeightCurve]:
    """Return what the run's tracker saw, and the run's weight."""
    options = yaml.safe_load((run / "config.yaml").read_text())
    process = PROCESSES[options["process"]["process"]](SimpleNamespace(**options["process"]))
    weighting = snrweights.get_weighting(options["weight"]["method"], **parse_settings(options["weight"]["set"]))
    curve = weighting.over_log_snr(
        process.schedule,
        prediction_type=process.prediction_type,
        density=process.density_for(weighting),
        normalize="mean" if options["weight"]["normalize"] == "mean" else None,
        clamp_max=options["weight"]["clamp_max"],
    )
    tracker = snrweights.LossVarianceTracker.load(run / "tracker.safetensors")
    return tracker.since(tracker.updates // 2), curve  # the second half of training


def main() -> None:
    """Read the runs and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of train.py")
    parser.add_argument("-o", "--output", default="variance.png", help="file to write (default: variance.png)")
    arguments = parser.parse_args()
    runs = {}
    for run in arguments.runs:
        statistics, curve = read(run)
        runs[curve.weighting.name if curve.weighting.name not in runs else run.name] = (statistics, curve)
    plots.save(plots.plot_variance(runs), arguments.output)
    print(f"Wrote {arguments.output}")


if __name__ == "__main__":
    main()
