"""Files of tensors, written so that a reader, or a process that was killed, never finds half of one."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import save
from torch import Tensor


def save_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write safetensors aside, make sure that they are on disk, and rename them into place.

    Raises:
        OSError: no such folder, no room; what was at ``path`` is as before.

    Example:
        >>> import tempfile
        >>> import torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_tensors(Path(folder) / "a.safetensors", {"a": torch.zeros(1)}, {})
        ...     os.listdir(folder)
        ['a.safetensors']
    """
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "wb") as file:
            file.write(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
