"""examples/train_masked.py on two gloo processes by torchrun against one process with the same global batch."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from training import EXAMPLES, main

pytestmark = pytest.mark.slow
COMMON = [
    *("--hidden-size", "16", "--num-layers", "1", "--num-heads", "2", "--elbo-draws", "2", "--validation-images", "4"),
    *("--num-samples", "4", "--num-inference-steps", "2", "--lr-warmup-steps", "3", "--eval-batch-size", "2"),
    *("--max-steps", "4", "--checkpointing-steps", "4", "--gradient-accumulation-steps", "2", "--random-flip"),
    *("--num-classes", "10", "--guidance-scale", "2", "--counts", "exact"),
]


def left(output):
    state = load_file(output / "checkpoints" / "step-00000004" / "state.safetensors")
    del state["seconds"]
    return state, json.loads((output / "results.json").read_text())


def test_two_processes_train_the_model_of_one_and_sample_its_images(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    main([*COMMON, "--train-batch-size", "8", "--output-dir", str(one)], script="train_masked")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(EXAMPLES / "train_masked.py"), *COMMON, "--train-batch-size", "4", "--output-dir", str(two)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (first, results), (second, others) = left(one), left(two)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5)
    assert others["negative_elbo"] == pytest.approx(results["negative_elbo"], rel=1e-5)
    assert others["fd_pixels_4"] == pytest.approx(results["fd_pixels_4"], rel=1e-3)
