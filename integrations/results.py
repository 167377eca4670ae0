"""What a run leaves behind besides the model: results as JSON, samples as one picture."""

from __future__ import annotations

import json
import math
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import evaluate
from PIL import Image
from snrweights.integrations.files import write_text
from torch import Tensor

from snrweights.statistics import LossStatistics


def save_results(path: str | os.PathLike[str], *, commit: str | None, **results: Any) -> None:
    """Write results with ``evaluate.save`` (time, versions), without the interpreter's path, whole or not.

    Args:
        path: of the file.
        commit: of the code, in place of that of the current directory, which ``evaluate`` takes.
        results: what is written beside.
    """
    with tempfile.TemporaryDirectory() as folder:
        saved = json.loads(evaluate.save(Path(folder) / "results.json", **results).read_text())
    del saved["_interpreter_path"]
    saved["_git_commit_hash"] = commit
    write_text(path, json.dumps(saved, indent=2) + "\n")


def commit_of(folder: Path) -> str | None:
    """Return the commit of the code in whose repository a folder lies, None where there is none (or no git).

    It is the last one that changed a Python or YAML file: what else a run or a study writes and commits is no code.
    Where such files differ from it, ``+changes`` follows.
    """

    def git(*words: str) -> str:
        asked = ["git", "-C", os.fspath(folder), *words]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()

    try:
        code = ("--", ":(top)*.py", ":(top)*.yaml")
        commit = git("log", "-1", "--format=%H", *code)
        changed = git("status", "--porcelain", *code)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changed else "") if commit else None


class MetricsLog:
    """The lines of metrics.jsonl, and the same numbers to accelerate's trackers.

    Args:
        path: of the file; lines of later steps than ``keep_until`` are dropped, for a run that goes on from there.
        accelerator: of the run; its main process writes.
        keep_until: step that the run goes on from, 0 for a new one.
    """

    def __init__(self, path: Path, accelerator: Any, keep_until: int) -> None:
        self._path, self._accelerator = path, accelerator
        if accelerator.is_main_process:
            old = path.read_text().splitlines(keepends=True) if path.exists() and keep_until else []
            whole = (line for line in old if line.endswith("\n"))  # a killed process may have left half a line
            write_text(path, "".join(line for line in whole if json.loads(line)["step"] <= keep_until))
        accelerator.init_trackers("tensorboard")

    def write(self, step: int, **values: float) -> None:
        """Log scalars."""
        self._accelerator.log(values, step=step)
        self._append({"step": step, **values})

    def write_validation(self, step: int, statistics: LossStatistics) -> None:
        """Log the held-out loss: its mean, and by log-SNR bin."""
        seen = statistics.count > 0
        centres = ((statistics.edges[1:] + statistics.edges[:-1]) / 2)[seen].tolist()
        losses = statistics.mean[seen].tolist()
        mean = float((statistics.mean * statistics.count)[seen].sum() / statistics.count.sum())
        scalars = {
            f"validation_loss_at_log_snr/{centre:+.1f}": loss for centre, loss in zip(centres, losses, strict=True)
        }
        self._accelerator.log({"validation_loss": mean, **scalars}, step=step)
        self._append({"step": step, "validation_loss": mean, "log_snr": centres, "validation_loss_by_log_snr": losses})

    def evaluations(self) -> dict[int, dict[str, float]]:
        """Return step -> the line of every evaluation so far, without the step."""
        return self.lines_with("evaluation_seconds")

    def validations(self) -> dict[int, tuple[list[float], list[float]]]:
        """Return step -> (log-SNR, loss) of every validation so far."""
        found = self.lines_with("validation_loss")
        return {step: (line["log_snr"], line["validation_loss_by_log_snr"]) for step, line in found.items()}

    def lines_with(self, name: str) -> dict[int, dict[str, Any]]:
        """Return step -> the last line so far that has this value, without the step."""
        lines = [json.loads(line) for line in self._path.read_text().splitlines()]
        return {line.pop("step"): line for line in lines if name in line}

    def _append(self, line: dict[str, Any]) -> None:
        if self._accelerator.is_main_process:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG file aside and rename it into place."""
    aside = path.with_name(path.name + ".tmp")
    image.save(aside, format="PNG")
    os.replace(aside, path)


def to_bytes(images: Tensor) -> Tensor:
    """Turn images in [-1, 1] into uint8, as image files hold them."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte()


def to_floats(pixels: Tensor) -> Tensor:
    """Turn uint8 into images in [-1, 1]."""
    return pixels / 127.5 - 1


def image_grid(images: Tensor, columns: int = 10, scale_to: int = 64) -> Image.Image:
    """Lay out (N, C, H, W) uint8 images as one picture, small ones enlarged by a whole factor.

    Example:
        >>> import torch
        >>> image_grid(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), columns=2).size
        (132, 132)
    """
    count, _, height, width = images.shape
    factor, gap = max(1, scale_to // height), 2
    rows = math.ceil(count / columns)
    cell_w, cell_h = width * factor + gap, height * factor + gap
    grid = Image.new("RGB", (columns * cell_w, rows * cell_h), "white")
    pixels = images.permute(0, 2, 3, 1).numpy()
    for i, array in enumerate(pixels):
        image = Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array).convert("RGB")
        image = image.resize((width * factor, height * factor), Image.Resampling.NEAREST)
        grid.paste(image, ((i % columns) * cell_w + gap // 2, (i // columns) * cell_h + gap // 2))
    return grid
