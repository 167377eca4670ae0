"""``snrweights optimal-loss DATASET``: the optimal loss of a data set as a file, a table and a figure."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from snrweights import optimal_plots, plots
from snrweights.optimal import OptimalLossCurve, optimal_loss
from snrweights.optimal.small_noise import SMALL_NOISE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``optimal-loss``."""
    parser.add_argument(
        "dataset",
        metavar="DATASET",
        help="digits, a folder of images, a folder of save_to_disk, a name on the hub, or latents: .npy, .safetensors",
    )
    parser.add_argument(
        "-o", "--output", default="optimal-loss.safetensors", help="file to write (default: optimal-loss.safetensors)"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the curve, too")

    data = parser.add_argument_group("the data, as the model sees them")
    data.add_argument("--split", default="train", help="which split (default: train)")
    data.add_argument("--column", help="of the images (default: image), or a tensor's name")
    data.add_argument("--name", help="configuration of a hub data set")
    data.add_argument("--resolution", type=int, metavar="N", help="pixels of a side (default: of the first image)")
    data.add_argument("--channels", type=int, choices=[1, 3], help="grey or RGB (default: of the first image)")
    data.add_argument("--labels", metavar="COLUMN", help="what the model is told (default: nothing)")
    data.add_argument("--flips", action="store_true", help="trained with random mirror images")

    levels = parser.add_argument_group("noise levels, sigma / alpha")
    levels.add_argument(
        "--sigmas", nargs="+", default=["40"], metavar="S", help="how many, evenly in ln sigma, or a list (default: 40)"
    )
    levels.add_argument("--sigma-min", type=float, metavar="S", default=0.002, help="the smallest (default: 0.002)")
    levels.add_argument("--sigma-max", type=float, metavar="S", default=80.0, help="the largest (default: 80)")

    how = parser.add_argument_group("how")
    how.add_argument("--draws", type=int, default=512, metavar="N", help="of a point and noise (default: 512)")
    how.add_argument("--chunk", type=int, default=1024, metavar="N", help="points at a time (default: 1024)")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)")
    how.add_argument(
        "--small-noise",
        default="importance",
        choices=SMALL_NOISE,
        help="where few draws are confused: sample there, or only bound, which is faster (default: importance)",
    )
    how.add_argument("--device", help="where to compute (default: cuda if there is one)")
    how.add_argument("--workers", type=int, default=0, metavar="N", help="processes that decode images (default: 0)")
    how.add_argument("--compile", action="store_true", help="with torch.compile: for large sets")
    how.add_argument("--state", metavar="DIR", help="keep what is done, to go on from (default: until it is finished)")


def run(arguments: argparse.Namespace) -> Callable[[], int]:
    """Compute the curve and write it; return what gives the exit code: 130 if it was interrupted."""
    from snrweights.integrations.reference_data import load_reference

    output = Path(arguments.output)
    if output.suffix != ".safetensors":
        raise ValueError(f"`--output` {arguments.output!r} must end in .safetensors.")
    if arguments.plot:
        plots.check_format(arguments.plot)
    sigmas = _levels(arguments)
    data, labels = load_reference(
        arguments.dataset,
        name=arguments.name,
        split=arguments.split,
        column=arguments.column,
        resolution=arguments.resolution,
        channels=arguments.channels,
        labels=arguments.labels,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    state = Path(arguments.state or f"{output}.state")
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    processes = _processes(device)
    try:
        curve = optimal_loss(
            data,
            sigmas,
            draws=arguments.draws,
            chunk=arguments.chunk,
            seed=arguments.seed,
            labels=labels,
            flips=arguments.flips,
            device=processes.pop("device", device),
            small_noise=arguments.small_noise,
            compile=arguments.compile,
            workers=arguments.workers,
            state=state,
            **processes,
        )
    except KeyboardInterrupt:
        print(f"\nInterrupted; the same command goes on from {state}", file=sys.stderr)
        return lambda: 130
    if processes.get("rank", 0) == 0:
        curve.save(output)
        if arguments.plot:
            plots.save(optimal_plots.plot_optimal_loss({Path(arguments.dataset).stem: curve}), arguments.plot)
        print(_table(curve))
        print(f"Wrote {' and '.join(filter(None, (str(output), arguments.plot)))}")
        if arguments.state is None:
            shutil.rmtree(state)
    return lambda: 0


def _processes(device: str) -> dict[str, Any]:
    """Return what tells ``optimal_loss`` of the processes that torchrun or accelerate started, if there are several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return {}
    from accelerate import Accelerator
    from snrweights.integrations.accelerate import SumOverProcesses

    accelerator = Accelerator(cpu=device == "cpu")
    return {
        "rank": accelerator.process_index,
        "world": accelerator.num_processes,
        "reduce": SumOverProcesses(accelerator),
        "progress": accelerator.is_main_process,
        "device": accelerator.device,
    }


def _levels(arguments: argparse.Namespace) -> torch.Tensor:
    """Return the noise levels: a single whole number is how many, anything else a list."""
    given: list[str] = arguments.sigmas
    if len(given) == 1 and given[0].isdecimal():
        low, high = arguments.sigma_min, arguments.sigma_max
        if not 0 < low < high:
            raise ValueError(f"`--sigma-min` must be positive and below `--sigma-max`, got {low} and {high}.")
        if int(given[0]) < 2:
            raise ValueError(f"`--sigmas` must be at least 2 levels, got {given[0]}; one level is written 1.0.")
        return torch.logspace(math.log(low), math.log(high), int(given[0]), base=math.e, dtype=torch.float64)
    try:
        return torch.tensor([float(text) for text in given], dtype=torch.float64)
    except ValueError:
        raise ValueError(f"`--sigmas` must be a whole number, or numbers, got {' '.join(given)}.") from None


def _table(curve: OptimalLossCurve) -> str:
    dim = curve.made["dim"]
    rows = ["    sigma  J per dimension     stderr  how"]
    for sigma, value, stderr, how in zip(
        curve.sigmas.tolist(), (curve.value / dim).tolist(), (curve.stderr / dim).tolist(), curve.how, strict=True
    ):
        rows.append(f"{sigma:9.4g}  {value:15.5g}  {stderr:9.1e}  {how}")
    return "\n".join(rows)
