"""Figures of models beside the optimal loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from snrweights.diagnose import ModelGap
from snrweights.plots import _COLOURS, _STYLES, _figure, _finish

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DECADES = 1e-6  # of the largest loss: less is not drawn


def plot_gaps(models: Sequence[ModelGap], unit: str = "epsilon") -> Figure:
    """Draw the losses of models with the optimal loss, and their gaps, over log-SNR; bars are 2 standard errors.

    Args:
        models: at least one, of the same data.
        unit: the target whose error is shown, mean over dimensions.

    Raises:
        ValueError: no models.

    Example:
        >>> import torch
        >>> from snrweights.diagnose import diagnose
        >>> from snrweights.optimal import optimal_loss
        >>> points, levels = torch.tensor([[-0.5], [0.5]]), torch.tensor([-1.0, 1.0])
        >>> curve = optimal_loss(points, (-levels / 2).exp(), draws=512)
        >>> len(plot_gaps([diagnose(lambda x, log_snr, index: 0 * x, points, levels, curve)]).axes)
        2
    """
    if not models:
        raise ValueError("`models` is empty; give at least one.")
    figure = _figure(2)
    left, right = figure.subplots(1, 2)
    first = models[0]
    left.plot(
        first.log_snr, first.optimum * first.ratio(unit), color="0.4", lw=2.5, alpha=0.6, label="optimum", zorder=1
    )
    for i, model in enumerate(models):
        style: dict[str, Any] = {"color": _COLOURS[i % len(_COLOURS)], "ls": _STYLES[i % len(_STYLES)], "lw": 1.5}
        ratio, at = model.ratio(unit), model.log_snr
        left.errorbar(at, model.loss * ratio, 2 * model.loss_stderr * ratio, label=model.name, **style)
        right.errorbar(at, model.gap * ratio, 2 * model.gap_stderr * ratio, label=_label(model), **style)
        below = model.below
        if bool(below.any()):
            marks = {"s": 40, "color": style["color"], "marker": "x", "zorder": 3}
            left.scatter(at[below], (model.loss * ratio)[below], label=f"{model.name}: below the optimum", **marks)
    _finish(left, f"loss, as an error of {unit}", "mean squared error")
    _finish(right, "gap to the optimum", "")
    largest = max(float((model.loss * model.ratio(unit)).max()) for model in models)
    for ax in (left, right):
        ax.set_yscale("log")
        ax.set_ylim(_DECADES * largest, 2 * largest)
        ax.legend(frameon=False, fontsize=8)
    return figure


def _label(model: ModelGap) -> str:
    nats, stderr = model.nats()
    return f"{model.name}: {nats:.3g} ± {stderr:.1g} nats"
