"""Draw the variance of the loss by noise level of runs of train.py: unweighted, and beside it as each was weighted.

python examples/variance_by_noise.py runs/digits-edm-edm runs/digits-edm-alsr-alsr -o variance.png
"""

from __future__ import annotations

import argparse

from snrweights import plots
from snrweights.runs import read_runs


def main() -> None:
    """Read the runs and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of train.py")
    parser.add_argument("-o", "--output", default="variance.png", help="file to write (default: variance.png)")
    arguments = parser.parse_args()
    runs = {}
    for run in read_runs(arguments.runs):
        statistics = run.statistics()
        if statistics is None or run.curve is None:
            raise SystemExit(f"{run.name} has no tracker.safetensors or no weight. {run.no_curve}")
        runs[run.curve.weighting.name if run.curve.weighting.name not in runs else run.name] = (statistics, run.curve)
    plots.save(plots.plot_variance(runs), arguments.output)
    print(f"Wrote {arguments.output}")


if __name__ == "__main__":
    main()
