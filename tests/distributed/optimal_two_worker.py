"""What test_optimal_two_processes.py runs: the optimal loss shared between processes, interrupted once."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from snrweights.integrations.accelerate import SumOverProcesses

from snrweights.optimal import optimal_loss
from snrweights.optimal.work import Work
from snrweights.seeds import generator

SIGMAS = torch.logspace(-2, 0.5, 6, dtype=torch.float64)


def floats():
    x = torch.randn(200, 5, generator=generator(0), dtype=torch.float64)
    return torch.cat([x, 1.02 * x])


CASES = {
    "floats": lambda: {"data": floats()},
    "labels": lambda: {"data": floats(), "labels": torch.arange(400) % 3},
    "bytes": lambda: {"data": torch.randint(256, (90, 3, 4, 4), generator=generator(1), dtype=torch.uint8)},
    "flips": lambda: {**CASES["bytes"](), "flips": True},
}
OPTIONS = {"draws": 64, "chunk": 32}


def main(output):
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    shared = {
        "rank": accelerator.process_index,
        "world": accelerator.num_processes,
        "reduce": SumOverProcesses(accelerator),
    }
    calls, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: calls.append(1) or all_reduce(*args, **kwargs)
    for case, arguments in CASES.items():
        given = arguments()
        curve = optimal_loss(given.pop("data"), SIGMAS, **given, **OPTIONS, **shared)
        curve.save(output / f"{case}-{accelerator.process_index}.safetensors")
    (output / f"calls-{accelerator.process_index}").write_text(str(len(calls)))

    # both stop in the second stage; then they go on
    sums = Work.sums

    def stopping(self, stage, *rest):
        if stage == "pairs":
            raise InterruptedError
        return sums(self, stage, *rest)

    Work.sums = stopping
    try:
        optimal_loss(floats(), SIGMAS, **OPTIONS, **shared, state=output / "state")
    except InterruptedError:
        Work.sums = sums
    curve = optimal_loss(floats(), SIGMAS, **OPTIONS, **shared, state=output / "state")
    curve.save(output / f"resumed-{accelerator.process_index}.safetensors")
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
