"""Running the training scripts in tests: as a child process that can be killed, and what must be equal between runs."""

import importlib
import multiprocessing
import os
import socket
import sys
from functools import partial
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = [
    *("--block-out-channels", "32", "--attention", "False", "--train-batch-size", "4", "--dropout", "0.1"),
    *("--validation-images", "4", "--num-samples", "4", "--num-inference-steps", "2", "--lr-warmup-steps", "3"),
]


def main(argv, threads=1, script="train"):
    """Run a script's main in this process, as it does when launched."""
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)  # of a run before in the same process
    sys.path.insert(0, str(EXAMPLES))
    importlib.import_module(script).main(argv)


def start(argv, before=None, output=os.devnull, script="train"):
    """Start main in a child of a server that has everything imported already; what it says goes to a file."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training", "diffusers", "accelerate", "datasets", "snrweights.plots"])
    process = context.Process(target=_child, args=(argv, before, str(output), script))
    process.start()
    return process


def _child(argv, before, output, script):
    os.setsid()  # a group of its own, so that a signal can be sent to it
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if before is not None:
        before()
    main(argv, script=script)


def run_two(argv, folder, script="train", before=None):
    """Run main on two gloo processes, with what torchrun tells them; imports would be most of what torchrun takes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    said = [folder / f"said-{rank}.txt" for rank in (0, 1)]
    children = [start(argv, partial(_as_rank, rank, port, before), said[rank], script) for rank in (0, 1)]
    for child in children:
        child.join(300)
    assert [child.exitcode for child in children] == [0, 0], "".join(path.read_text()[-3000:] for path in said)


def _as_rank(rank, port, before):
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    told = where | {"RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "true"}
    os.environ.update({name: str(value) for name, value in told.items()})
    if before is not None:
        before()


def final_state(run, step):
    """Return every tensor of the checkpoint of a step, and of the model saved at the end."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    tensors = load_file(folder / "state.safetensors")
    del tensors["seconds"]  # since the start: no two runs take the same
    assert {name.split(".")[0] for name in tensors} >= {"model", "optimizer", "ema", "tracker"}
    saved = run / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    return tensors | {f"saved.{k}": v for k, v in load_file(saved).items()}


def assert_bit_equal(one, two):
    assert one.keys() == two.keys()
    different = [name for name in one if not torch.equal(one[name], two[name])]
    assert different == []
