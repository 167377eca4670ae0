"""What tests of the optimal loss run in processes of their own: arguments are the state's folder and the output."""

import sys
import time

import torch

from snrweights.optimal import optimal_loss, work
from snrweights.seeds import generator


def data():
    """Points with a few near each other, so that all stages are needed."""
    x = torch.randn(300, 6, generator=generator(0), dtype=torch.float64)
    x[150:] = x[:150] + 0.05 * x[150:]
    return x


SIGMAS = torch.logspace(-2.5, 0.5, 8, dtype=torch.float64)
OPTIONS = {"draws": 64, "chunk": 8, "labels": torch.arange(300) // 150 + torch.arange(300) % 2}


def main(state, output, pause):
    """Save after every step, and take ``pause`` seconds for each."""
    torch.set_num_threads(1)
    work.SAVE_EVERY = 0.0
    save = work.Work._save

    def slowly(*arguments):
        save(*arguments)
        print("saved", flush=True)
        time.sleep(pause)

    work.Work._save = slowly
    optimal_loss(data(), SIGMAS, state=state, **OPTIONS).save(output)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
