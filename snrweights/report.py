"""Tables from the registry and from results."""

from __future__ import annotations

from collections.abc import Iterable

from snrweights.masked.weights import _REGISTRY as _MASKED
from snrweights.weightings.base import _REGISTRY, Formula

_HEAD = ("method", "formula", "hyperparameters", "source")


def _row(cls: type[Formula]) -> tuple[str, str, str, str]:
    defaults = cls.hyperparameters().items()
    hyperparameters = ", ".join(name if name in cls.needs else f"{name}={default}" for name, default in defaults)
    return cls.name, cls.formula, hyperparameters, cls.source


def methods_table(*, markdown: bool = False, masked: bool = False) -> str:
    """Return the table of registered weightings, or of those of masked diffusion, as aligned text or as Markdown.

    Example:
        >>> "min_snr" in methods_table(), "simple" in methods_table(masked=True)
        (True, True)
    """
    classes: Iterable[type[Formula]] = _MASKED.values() if masked else _REGISTRY.values()
    rows = [_row(cls) for cls in classes]
    if markdown:
        cells = [(f"`{name}`", *(cell.replace("|", r"\|") for cell in rest)) for name, *rest in rows]
        head = ["| " + " | ".join(_HEAD) + " |", "|---" * len(_HEAD) + "|"]
        return "\n".join(head + ["| " + " | ".join(row) + " |" for row in cells])
    widths = [max(len(row[i]) for row in [_HEAD, *rows]) for i in range(len(_HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [_HEAD, *rows]
    )
