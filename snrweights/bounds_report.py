"""The bounds of a model as a table and as JSON, with the words that go with them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from snrweights.bounds import NO_RANKING, Cascade, ImprovedBound

_DECODER = "discretised Gaussian on the 256 values"
_GROWS = 1.01  # from where on an objective is said to grow towards the noise


def table(cascade: Cascade, bounds: Mapping[str, ImprovedBound]) -> str:
    """Return the terms of the ELBO and the improved bounds as Markdown, the weightings by name, not by number.

    Args:
        cascade: of a model.
        bounds: label -> bound, of its ``improved_bound``.

    Example:
        >>> import torch
        >>> from snrweights.bounds import cascade
        >>> from snrweights.optimal import optimal_loss
        >>> curve = optimal_loss(torch.tensor([[-0.5], [0.5]]), torch.logspace(-2, 2, 41), draws=512)
        >>> found = cascade(torch.ones(2), curve, "flow", log_snr=[-2.0, 2.0])
        >>> NO_RANKING in table(found, {"sigmoid": found.improved_bound("sigmoid")})
        True
    """
    low, high = cascade.range
    gap, stderr = cascade.gap()
    lines = [
        f"# {cascade.name}",
        "",
        f"All on log-SNR {low:.2f} to {high:.2f}, in nats of a point of {cascade.dim} dimensions.",
        "",
        "| term | nats | bits per dimension |",
        "|---|---:|---:|",
        _term(cascade, "KL of the prior, of the marginals", cascade.prior, cascade.prior_stderr),
        _term(cascade, "gap of the ELBO, K at the clean end", gap, stderr),
        _term(cascade, "what the clean end tells of a point", cascade.information, cascade.information_stderr),
    ]
    elbo = cascade.elbo()
    if elbo is not None and cascade.decoder is not None:
        lines.append(_term(cascade, f"decoder, a {_DECODER}", cascade.decoder, 0.0))
        lines.append(_term(cascade, "negative ELBO: the last three", -elbo[0], elbo[1]))
    else:
        lines += ["", "No ELBO: a decoder is stated for 8-bit data alone."]
    lines += ["", "| weighting | improved bound, nats | negative mass |", "|---|---:|---:|"]
    lines += [_row(label, bounds[label]) for label in sorted(bounds)]
    lines += ["", "± is one standard error and the levels' spacing.", "", NO_RANKING]
    if grown := [label for label in sorted(bounds) if _grows(bounds[label])]:
        said = ", ".join(f"{label} {_times(bounds[label].growth)}" for label in grown)
        lines += ["", f"* w grows on towards the schedule's noisy end: {said}. On a longer range it is another bound."]
    return "\n".join(lines) + "\n"


def _grows(bound: ImprovedBound) -> bool:
    return bound.growth is not None and bound.growth > _GROWS


def _times(growth: float | None) -> str:
    return "without bound" if growth == math.inf else f"{growth:.3g} times"


def _term(cascade: Cascade, name: str, nats: float, stderr: float) -> str:
    error = f" ± {stderr:.1g}" if stderr else ""
    return f"| {name} | {nats:.5g}{error} | {cascade.in_bits(nats):.4g} |"


def _row(label: str, bound: ImprovedBound) -> str:
    if bound.nats is None:
        return f"| {label} | none: w rises | {bound.negative_mass:.3g} |"
    mark = " *" if _grows(bound) else ""
    error = math.hypot(bound.stderr or 0, bound.spacing_error or 0)
    return f"| {label}{mark} | {bound.nats:.5g} ± {error:.1g} | 0 |"


def as_dict(cascade: Cascade, bounds: Mapping[str, ImprovedBound]) -> dict[str, Any]:
    """Return everything as plain values, for JSON; an infinite growth is the word ``infinite``.

    Example:
        >>> from snrweights.bounds import cascade
        >>> import torch
        >>> from snrweights.optimal import optimal_loss
        >>> curve = optimal_loss(torch.tensor([[-0.5], [0.5]]), torch.logspace(-2, 2, 41), draws=512)
        >>> found = cascade(torch.ones(2), curve, "flow", log_snr=[-2.0, 2.0])
        >>> as_dict(found, {"flow": found.improved_bound("flow")})["weightings"]["flow"]["growth"]
        'infinite'
    """
    nats, stderr = cascade.nats()
    levels = zip(cascade.log_snr.tolist(), nats.tolist(), stderr.tolist(), strict=True)
    names = ("prior", "prior_stderr", "information", "information_stderr", "decoder", "dim", "prediction_type")
    return {
        "model": cascade.name,
        "range": list(cascade.range),
        **{name: getattr(cascade, name) for name in names},
        "elbo": cascade.elbo(),
        "bits_per_dim": cascade.bits_per_dim(),
        "bounds": [{"log_snr": at, "nats": value, "stderr": error} for at, value, error in levels],
        "weightings": {label: _plain(bounds[label]) for label in sorted(bounds)},
        "what_it_bounds": NO_RANKING,
    }


def _plain(bound: ImprovedBound) -> dict[str, Any]:
    names = ("nats", "stderr", "spacing_error", "negative_mass", "growth")
    values = {name: getattr(bound, name) for name in names}
    return {"monotone": bound.monotone, **{k: "infinite" if v == math.inf else v for k, v in values.items()}}


def to_json(cascade: Cascade, bounds: Mapping[str, ImprovedBound]) -> str:
    """Return ``as_dict`` as JSON.

    Example:
        >>> import torch
        >>> from snrweights.bounds import cascade
        >>> from snrweights.optimal import optimal_loss
        >>> curve = optimal_loss(torch.tensor([[-0.5], [0.5]]), torch.logspace(-2, 2, 41), draws=512)
        >>> json.loads(to_json(cascade(torch.ones(2), curve, "flow", log_snr=[-2.0, 2.0]), {}))["range"]
        [-2.0, 2.0]
    """
    return json.dumps(as_dict(cascade, bounds), indent=2, allow_nan=False) + "\n"
