"""A noise schedule from its name, a folder or the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from snrweights.schedulers import as_schedule, schedule_names

_FILE = "scheduler_config.json"


def load_scheduler(name: str) -> Any:
    """Return a schedule by its name, or the diffusers scheduler of a folder or of a pipeline on the hub.

    Args:
        name: one of ``schedule_names()``; a folder that holds a scheduler, or a pipeline with one in ``scheduler/``;
            or the name of a pipeline on the hub.

    Raises:
        ValueError: a config that names no scheduler of diffusers.
        OSError: neither of these.

    Example:
        >>> load_scheduler("flow")
        FlowSchedule(shift=1.0, num_train_timesteps=1, reversed=False, ...)
    """
    if name in schedule_names():
        return as_schedule(name)
    import diffusers

    folders = [Path(name), Path(name) / "scheduler"]
    found = next((folder / _FILE for folder in folders if (folder / _FILE).is_file()), None)
    if found is not None:
        config = json.loads(found.read_text())
    elif Path(name).exists() or name.count("/") != 1:
        raise FileNotFoundError(
            f"`scheduler` {name!r} is neither a folder with {_FILE}, nor a name on the hub, nor one of "
            f"{schedule_names()}."
        )
    else:
        config = diffusers.DDPMScheduler.load_config(name, subfolder="scheduler")
    cls = getattr(diffusers, str(config.get("_class_name")), None)
    if cls is None:
        raise ValueError(f"`scheduler` {name!r}: diffusers has no {config.get('_class_name')!r}.")
    return cls.from_config(config)
