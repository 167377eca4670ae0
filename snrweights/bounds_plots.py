"""Figure of the bounds that a model's losses are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from snrweights.bounds import Cascade, ImprovedBound
from snrweights.plots import _COLOURS, _STYLES, _figure, _finish

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SMALLEST = 1e-4  # of the largest weight: less is not drawn


def plot_bounds(cascade: Cascade, bounds: Mapping[str, ImprovedBound]) -> Figure:
    """Draw K over log-SNR with 2 standard errors, and the monotone objectives that mix it, by name.

    Example:
        >>> import torch
        >>> from snrweights.bounds import cascade
        >>> from snrweights.optimal import optimal_loss
        >>> curve = optimal_loss(torch.tensor([[-0.5], [0.5]]), torch.logspace(-2, 2, 41), draws=512)
        >>> found = cascade(torch.ones(2), curve, "flow", log_snr=[-2.0, 2.0])
        >>> len(plot_bounds(found, {"sigmoid": found.improved_bound("sigmoid")}).axes)
        2
    """
    figure = _figure(2)
    left, right = figure.subplots(1, 2)
    nats, stderr = cascade.nats()
    at = cascade.log_snr
    left.fill_between(
        at, (nats - 2 * stderr).clamp_min(nats.min() / 2), nats + 2 * stderr, color=_COLOURS[0], alpha=0.25, lw=0
    )
    left.plot(at, nats, color=_COLOURS[0], lw=1.5, label="K: the model up to here, then an optimal decoder")
    left.axhline(float(nats[0]), color="0.5", lw=1, ls=":", label=f"KL of the prior: {cascade.prior:.3g} nats")
    left.set_yscale("log")
    gap, error = cascade.gap()
    _finish(left, f"{cascade.name}: gap of the ELBO {gap:.4g} ± {error:.1g} nats", "bound on the KL of the data, nats")
    left.set_ylim(top=30 * left.get_ylim()[1])  # room for the legend
    left.legend(frameon=False, fontsize=8, loc="upper left")
    drawn = [label for label in sorted(bounds) if bounds[label].monotone]
    for i, label in enumerate(drawn):
        bound = bounds[label]
        style: dict[str, Any] = {"color": _COLOURS[i % len(_COLOURS)], "ls": _STYLES[i % len(_STYLES)], "lw": 1.5}
        right.plot(bound.log_snr, bound.weight, label=label, **style)
    right.set_yscale("log")
    right.set_ylim(_SMALLEST, 2)
    _finish(right, "objectives that never rise, and so mix the bounds", "w, 1 at the noisy end")
    if drawn:
        right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
