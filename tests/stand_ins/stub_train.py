"""Stands in for examples/train.py in tests of studies: takes its flags, leaves what it leaves, and trains nothing.

Numbers are functions of method, seed and step. It goes on from a file, as training does from a checkpoint.
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
for flag, kind in (("method", str), ("seed", int), ("output-dir", Path), ("max-steps", int), ("learning-rate", float)):
    parser.add_argument(f"--{flag}", type=kind)
known, _ = parser.parse_known_args()
output, checkpoint, metrics = known.output_dir, known.output_dir / "checkpoint", known.output_dir / "metrics.jsonl"
stopped = []
signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))


def lives(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


alone = output / "alone"
holder = alone.read_text() if alone.exists() else ""
assert not (holder and lives(holder)), f"{holder} trains in {output} too"
alone.write_text(str(os.getpid()))

if known.learning_rate == 0.5:
    sys.exit("the loss is not finite")
start = int(checkpoint.read_text()) if checkpoint.exists() else 0
lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() and start else []
metrics.write_text("".join(x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= start))
(output / "config.yaml").write_text("versions: {torch: '2.13.0'}\n")


def distance(step):
    rate = {"ddpm": 1.0, "min_snr": 1.3, "smoothed_kl": 1.32}[known.method] * (1 + 0.01 * (known.seed % 5))
    return 20 * math.exp(-rate * step / 8) + 0.5


for step in range(start + 1, known.max_steps + 1):
    time.sleep(float(os.environ.get("STUB_PAUSE", "0.03")))
    if step % 2 == 0:
        with metrics.open("a") as file:
            file.write(json.dumps({"step": step, "fd_pixels": distance(step)}) + "\n")
    aside = checkpoint.with_suffix(".tmp")
    aside.write_text(str(step))
    aside.replace(checkpoint)
    if stopped:
        sys.exit(128 + stopped[0])
results = {"steps": known.max_steps, "fd_pixels": distance(known.max_steps), "fd_pixels_real_vs_real": 0.4}
results |= {"training_seconds": 1.5, "_git_commit_hash": "c0ffee", "_timestamp": "2026-01-01T00:00:00"}
aside = output / "results.tmp"
aside.write_text(json.dumps(results))
aside.replace(output / "results.json")
