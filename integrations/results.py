"""What a run leaves behind besides the model: results as JSON, samples as one picture."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import evaluate
from PIL import Image
from torch import Tensor


def save_results(path: str | os.PathLike[str], **results: Any) -> None:
    """Write results with ``evaluate.save`` (time, commit, versions), without the interpreter's path."""
    path = Path(path)
    evaluate.save(path, **results)
    saved = json.loads(path.read_text())
    del saved["_interpreter_path"]
    path.write_text(json.dumps(saved, indent=2) + "\n")


def image_grid(images: Tensor, columns: int = 10, scale_to: int = 64) -> Image.Image:
    """Lay out (N, C, H, W) images in [-1, 1] as one picture, small ones enlarged by a whole factor.

    Example:
        >>> import torch
        >>> image_grid(torch.zeros(4, 1, 8, 8), columns=2).size
        (132, 132)
    """
    count, _, height, width = images.shape
    factor, gap = max(1, scale_to // height), 2
    rows = math.ceil(count / columns)
    cell_w, cell_h = width * factor + gap, height * factor + gap
    grid = Image.new("RGB", (columns * cell_w, rows * cell_h), "white")
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for i, array in enumerate(pixels):
        image = Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array).convert("RGB")
        image = image.resize((width * factor, height * factor), Image.Resampling.NEAREST)
        grid.paste(image, ((i % columns) * cell_w + gap // 2, (i // columns) * cell_h + gap // 2))
    return grid
