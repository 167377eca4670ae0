"""What test_audit_two_processes.py trains: wrappings with an audit and without one, under torchrun."""

import json
import sys
import traceback
import warnings
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import attach_worker as worker
import torch
import torch.distributed as dist
from leaving import leave

CASES = (
    "ddp",
    "ddp-find-unused",
    "ddp-static-graph",
    "ddp-static-graph-checkpointing-reentrant",
    "accelerate",
    "fsdp1",
    "fsdp2",
)
AUDITED, STEPS = 1, 9  # one more step than those after which an audit that reads nothing gives up


def run(wrapping, rank, world, **options):
    """Train on this process's shares; return the parameters, and what the audit came to."""
    model = wrapping.make()
    handle = worker.attach(model, **options)
    model = wrapping.wrap(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        worker.train(model, worker.sgd(model), wrapping.kind, range(STEPS), rank=rank, world=world)
    facts = {
        "auditing": handle.auditing,
        "audit": handle.audit and asdict(handle.audit),
        "warnings": [str(one.message) for one in caught if issubclass(one.category, UserWarning)],
        "weighted": handle.weighted,
    }
    handle.detach()
    return worker.whole_parameters(model), facts


def main(output):
    """Run all cases, on each process of torchrun, and write what came out of them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, world = dist.get_rank(), dist.get_world_size()
    facts = {}
    for name in CASES:
        try:
            wrapping = worker.WRAPPINGS[name]
            without, _ = run(wrapping, rank, world, on_double_weighting="ignore")
            found, facts[name] = run(wrapping, rank, world, audit=AUDITED)
            facts[name]["equal"] = all(torch.equal(found[key], without[key]) for key in without)
            start = worker.make(wrapping.kind).state_dict()
            facts[name]["trained"] = max(float((found[key] - start[key]).abs().max()) for key in found)
        except Exception:
            facts[name] = {"error": traceback.format_exc()}
    (Path(output) / f"facts-{rank}.json").write_text(json.dumps(facts, indent=2))
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
