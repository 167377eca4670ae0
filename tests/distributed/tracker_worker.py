"""What test_tracker_two_processes.py tracks: trackers that an Accelerator saves, from the start or resumed."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from snrweights.integrations.accelerate import attach_to

from snrweights import LossVarianceTracker

OPTIONS = {
    "plain": {},
    "decay": {"decay": 0.9},
    "window": {"window": 4},
    "snapshots": {"snapshot_every": 3},
    "decay-snapshots": {"decay": 0.9, "snapshot_every": 2},
}
FEWER = "fewer-updates"  # a case in which the second process makes no update where it has no losses
UPDATES, SAVED_AT, SYNC_EVERY, WORLD = 12, 7, 4, 2
COLLECTIVES = ("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "gather", "barrier")


def share(update, rank):
    """Losses, log-SNR and squared norms of one process: fewer on the second, none of them in its last batches."""
    generator = torch.Generator().manual_seed(10 * update + rank)
    size = (33, 0 if update in (SAVED_AT - 1, UPDATES - 1) else 5 + update)[rank]
    loss, log_snr, square = torch.rand(3, size, generator=generator, dtype=torch.float64)
    loss[::7], square[1::5] = torch.inf, torch.nan
    return loss, 30 * log_snr - 15, square


def batch(update, rank, world):
    """What a process sees in an update: its share, or all of them."""
    shares = [share(update, rank)] if world == WORLD else [share(update, each) for each in range(WORLD)]
    return [torch.cat(parts) for parts in zip(*shares, strict=True)]


def run(accelerator, updates, state=None, save_to=None):
    """Track the updates of a range, after loading a state if there is one; return trackers by case, and a count."""
    rank, world = accelerator.process_index, accelerator.num_processes
    trackers = {case: LossVarianceTracker(**OPTIONS.get(case, {})) for case in (*OPTIONS, FEWER)}
    handles = [attach_to(tracker, accelerator, f"{case}.safetensors") for case, tracker in trackers.items()]
    if state:
        accelerator.load_state(str(state))
    calls = {"update": 0, "sync": 0}
    for update in updates:
        loss, log_snr, square = batch(update, rank, world)
        for case, tracker in trackers.items():
            if case != FEWER or loss.numel():
                with counted(calls, "update"):
                    tracker.update(loss, log_snr, gradient_square=square)
            if (update + 1) % SYNC_EVERY == 0:
                with counted(calls, "sync"):
                    tracker.sync()
        if save_to and update + 1 == SAVED_AT:
            accelerator.save_state(str(save_to))
    for handle in handles:
        handle.detach()
    return trackers, calls


class counted:
    """Counts the collectives of torch.distributed."""

    def __init__(self, calls, what):
        self.calls, self.what = calls, what

    def __enter__(self):
        self.before = {name: getattr(dist, name) for name in COLLECTIVES}
        for name, function in self.before.items():
            setattr(dist, name, self.counting(function))

    def counting(self, function):
        def call(*args, **kwargs):
            self.calls[self.what] += 1
            return function(*args, **kwargs)

        return call

    def __exit__(self, *error):
        for name, function in self.before.items():
            setattr(dist, name, function)


def main(output, states):
    """Run from the start, saving midway, or resumed from a state that was saved on as many processes or on one."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    output = Path(output)
    # every tracker's `reduce` is taken off again, so that each process writes what it has itself
    runs = {"whole": run(accelerator, range(UPDATES), save_to=output / "saved-on-2")}
    for state in states:
        runs[Path(state).name] = run(accelerator, range(SAVED_AT, UPDATES), state=state)
    for name, (trackers, calls) in runs.items():
        for case, tracker in trackers.items():
            tracker.save(output / f"{name}-{case}-{accelerator.process_index}.safetensors")
        (output / f"{name}-{accelerator.process_index}.txt").write_text(f"{calls['update']} {calls['sync']}")
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
