"""How far a trained model is from the optimal loss of its data, at every noise level, and where capacity is missing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from snrweights.optimal.controls import controls, regressed
from snrweights.optimal.curve import OptimalLossCurve
from snrweights.optimal.draws import pair_sums
from snrweights.optimal.exact import GRID, on_grid
from snrweights.optimal.ideal import ideal_offsets
from snrweights.optimal.reference import ReferenceSet
from snrweights.optimal.work import Work
from snrweights.predictions import check_prediction_type, log_error_ratio
from snrweights.seeds import generator

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]

_RANK = 64
_ENOUGH = 30  # draws
_SLACK = 1e-6  # of float32
_SAME = ("data", "points", "groups", "flips")
_FALSE_ALARMS = 1e-3  # over all levels of a model
_CHECKS = (
    "the data: the set and the split that the model was trained on",
    "their scale: [-1, 1] here, unless they are floating point",
    "augmentation: mirror images need flips, in the curve too",
    "labels: a model that is told the class needs the conditional optimum",
    "the curve: enough levels between which to interpolate",
    "the model's prediction type, schedule and sigma_data",
)


@dataclass(frozen=True)
class ModelGap:
    """Loss of a model and the optimal loss, by noise level: errors of x0, means over dimensions, (L,) each, float64.

    ``loss - optimum`` and ``gap`` have one expectation where model, data and curve belong together: the first is
    measured against the curve, the second, never negative, against the ideal denoiser of the data on the same draws.

    Attributes:
        name: of the model.
        log_snr: the levels, rising.
        loss: of the model.
        loss_stderr: its standard error.
        optimum: the curve there.
        optimum_stderr: its standard error, with what interpolation between its levels may be off.
        distances: (L, M) squared distance of the model from the ideal denoiser, by draw, the same draws at all levels.
        unexplained: loss - gap - optimum: 0 but for its error where all belong together.
        unexplained_stderr: its standard error.
        dim: numbers of a point.
        sigma_data: for ``edm``, or None.
        same_data: whether the curve is of these data, by their fingerprint, labels and flips.
    """

    name: str
    log_snr: Tensor
    loss: Tensor
    loss_stderr: Tensor
    optimum: Tensor
    optimum_stderr: Tensor
    distances: Tensor
    unexplained: Tensor
    unexplained_stderr: Tensor
    dim: int
    sigma_data: float | None
    same_data: bool

    @property
    def gap(self) -> Tensor:
        """(L,) mean squared distance of the model from the ideal denoiser."""
        return self.distances.mean(1)

    @property
    def gap_stderr(self) -> Tensor:
        """(L,) its standard error."""
        return stderr_of_mean(self.distances)

    def ratio(self, unit: str) -> Tensor:
        """Return R_y (L,), by which errors of x0 become those of another target."""
        return log_error_ratio(check_prediction_type(unit), self.log_snr, self.sigma_data).exp()

    @property
    def below(self) -> Tensor:
        """(L,) bool: the loss is below the optimum by more than its error; over all levels one false alarm in 1000."""
        return self.optimum - self.loss > self._tolerance(self.loss_stderr)

    @property
    def mismatched(self) -> Tensor:
        """(L,) bool: loss less gap is not the optimum, likewise."""
        return self.unexplained.abs() > self._tolerance(self.unexplained_stderr)

    def _tolerance(self, stderr: Tensor) -> Tensor:
        rounding = 1e-5 * self.optimum  # of a model in single precision
        z = NormalDist().inv_cdf(1 - _FALSE_ALARMS / (2 * len(self.log_snr)))
        return z * torch.hypot(stderr, self.optimum_stderr) + rounding  # squares would vanish where J nearly does

    def nats(self) -> tuple[float, float]:
        """Return ½ ∫ gap_eps d log_snr, summed over dimensions, and its standard error: what the whole gap costs.

        The integral is by trapezoids over the levels, of every draw: they are the same at all levels.
        """
        by_draw = (self._steps() * self.ratio("epsilon") * self.dim / 2) @ self.distances
        return float(by_draw.mean()), float(stderr_of_mean(by_draw))

    def share(self) -> Tensor:
        """Return the share of each level (L,) in that integral."""
        part = self._steps() * self.ratio("epsilon") * self.gap
        return part / part.sum().clamp_min(torch.finfo(part.dtype).tiny)

    def middle(self, part: float = 0.8) -> tuple[float, float]:
        """Return the log-SNRs between which the middle ``part`` of the gap lies."""
        up_to = self.share().cumsum(0)
        low, high = ((up_to < end).sum().clamp_max(len(up_to) - 1) for end in ((1 - part) / 2, (1 + part) / 2))
        return float(self.log_snr[low]), float(self.log_snr[high])

    def _steps(self) -> Tensor:
        half = self.log_snr.diff() / 2
        return torch.cat([half, half[:1] * 0]) + torch.cat([half[:1] * 0, half])

    def warnings(self) -> list[str]:
        """Return what is wrong, in sentences; empty if nothing is."""
        found = []
        for what, flags in (
            ("below the optimum: no denoiser of these data can be", self.below),
            ("not the optimum and the distance from the ideal denoiser together", self.mismatched),
        ):
            if bool(flags.any()):
                low, high = self.log_snr[flags][[0, -1]].tolist()
                where = f"{int(flags.sum())} of {len(flags)} levels, log-SNR {low:.1f} to {high:.1f}"
                found.append(f"The loss of {self.name} is {what}, at {where}.")
        if found:
            known = "" if self.same_data else " The curve is of other data than these, as its file says."
            found.append(f"Something does not match.{known} Check " + "; ".join(_CHECKS) + ".")
        return found

    def rows(self, unit: str = "epsilon") -> list[dict[str, Any]]:
        """Return one dictionary a level, errors in a unit."""
        ratio = self.ratio(unit)
        columns = {
            name: (getattr(self, name) * ratio).tolist()
            for name in ("loss", "loss_stderr", "optimum", "optimum_stderr", "gap", "gap_stderr")
        }
        columns |= {"log_snr": self.log_snr.tolist(), "share": self.share().tolist()}
        columns |= {"below": self.below.tolist(), "mismatched": self.mismatched.tolist()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def as_dict(self, unit: str = "epsilon") -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        nats, stderr = self.nats()
        facts = {"model": self.name, "unit": unit, "gap_nats": nats, "gap_nats_stderr": stderr}
        return {**facts, "middle": self.middle(), "warnings": self.warnings(), "levels": self.rows(unit)}

    def to_json(self, unit: str = "epsilon") -> str:
        """Return ``as_dict`` as JSON."""
        return json.dumps(self.as_dict(unit), indent=2, allow_nan=False) + "\n"

    def table(self, unit: str = "epsilon") -> str:
        """Return the levels as a Markdown table, and what they come to."""
        head = f"| log-SNR | sigma | loss ({unit}) | optimum | gap | share of the gap |"
        lines = [head, "|---:" * 6 + "|"]
        for row in self.rows(unit):
            mark = " (below)" if row["below"] else ""
            lines.append(
                f"| {row['log_snr']:.2f} | {math.exp(-row['log_snr'] / 2):.4g} "
                f"| {row['loss']:.4g} ± {row['loss_stderr']:.1g}{mark} "
                f"| {row['optimum']:.4g} ± {row['optimum_stderr']:.1g} "
                f"| {row['gap']:.3g} ± {row['gap_stderr']:.1g} | {100 * row['share']:.1f} % |"
            )
        (low, high), (nats, stderr) = self.middle(), self.nats()
        lines += ["", f"In all {nats:.3g} ± {stderr:.1g} nats, 80 % of it at log-SNR {low:.1f} to {high:.1f}."]
        return "\n".join(lines)


def diagnose(
    denoise: Denoise,
    data: Tensor,
    log_snr: Tensor,
    curve: OptimalLossCurve,
    *,
    name: str = "the model",
    labels: Tensor | None = None,
    flips: bool = False,
    sigma_data: float | None = None,
    draws: int = 256,
    batch_size: int = 256,
    chunk: int = 1024,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> ModelGap:
    """Measure a model's loss at noise levels, on draws that the ideal denoiser of the data sees too.

    The draws are a function of the seed: models that are diagnosed with the same one are compared on the same points
    and noise. Losses are averaged over ±eps and regressed on control variates of known mean.

    Args:
        denoise: ``denoise(x, log_snr, index)`` returns the estimate of x0, (B, ...), of x = x0 + sigma eps, with the
            log-SNR (B,) and which of the data (B,) it was made from, for its label.
        data: (N, ...) what the model was trained on: floating, as it sees them, or uint8, read as u / 127.5 - 1.
        log_snr: (L,) levels, within those of the curve.
        curve: the optimal loss of the data.
        name: of the model.
        labels: (N,) integers, if the model is told them.
        flips: the data are augmented by mirror images.
        sigma_data: of the model, for losses in the unit ``edm``.
        draws: antithetic pairs, at least 32.
        batch_size: points at once through the model.
        chunk: points of the reference set at once.
        seed: of the draws.
        device: where to compute.

    Raises:
        ValueError: levels outside the curve, too few draws, estimates of another shape, or not finite.

    Source: Xu et al. 2025, arXiv 2506.13763, for the diagnosis; the estimator is this project's.

    Example:
        >>> from snrweights.optimal import optimal_loss
        >>> points = torch.tensor([[-0.5], [0.5]], dtype=torch.float64)
        >>> levels = torch.tensor([-1.0, 1.0])
        >>> curve = optimal_loss(points, (-levels / 2).exp(), draws=4096)
        >>> def ideal(x, log_snr, index):
        ...     return 0.5 * torch.tanh(0.5 * x * log_snr.exp()[:, None])
        >>> found = diagnose(ideal, points, levels, curve)
        >>> bool((found.gap < 1e-20).all()), found.warnings()
        (True, [])
    """
    if draws < 32:
        raise ValueError(f"`draws` must be at least 32, got {draws}.")
    levels = torch.as_tensor(log_snr, dtype=torch.float64).unique()
    if levels.ndim != 1 or len(levels) < 2 or not bool(levels.isfinite().all()):
        raise ValueError(f"`log_snr` must be at least two different, finite noise levels, got {log_snr}.")
    low, high = (-2 * curve.sigmas[[-1, 0]].log()).tolist()
    if not low - _SLACK <= float(levels[0]) < float(levels[-1]) <= high + _SLACK:
        raise ValueError(f"`log_snr` must lie within {low:.2f} to {high:.2f}, where the curve is, got {log_snr}.")
    sigmas = (-levels / 2).exp()
    optimum = curve.at(sigmas, reduction="mean")
    reference = ReferenceSet(data, labels, flips, device, chunk)
    stream = generator(seed, 0)
    positions = torch.randint(reference.size, (draws,), generator=stream).sort().values
    noise = on_grid(torch.randn(draws, reference.dim, dtype=torch.float64, generator=stream)).double() * GRID
    noise = noise.to(reference.device, reference.dtype)
    inv = sigmas.reciprocal().to(reference.device)
    axes = reference.near_principal_axes(_RANK, seed)
    sums, within = pair_sums(reference, positions, noise, inv, axes, Work(None, {}))
    offsets = ideal_offsets(reference, positions, noise, inv, sums.kernels)

    images, index = reference.images(positions), reference.numbers(positions)
    errors, distances = torch.zeros(2, 2, len(levels), draws, dtype=torch.float64, device=reference.device)
    for level, (here, sigma) in enumerate(zip(levels, sigmas, strict=True)):
        for sign in (0, 1):
            x = images + (1 - 2 * sign) * float(sigma) * noise.view_as(images)
            estimate = _denoised(denoise, x, here, index.to(reference.device), batch_size)
            off = (estimate - images).flatten(1)
            errors[sign, level] = off.double().square().mean(1)
            distances[sign, level] = (off - offsets[sign, level]).double().square().mean(1)
    ideal = offsets.double().square().mean(-1).mean(0)
    loss, distance = errors.mean(0), distances.mean(0)
    variances, turn = torch.linalg.eigh(within)
    known = controls(reference.rows(positions), noise, 1 / inv, reference.variance, axes @ turn, variances)
    seen = sums.confused() >= _ENOUGH  # levels at which enough draws are confused between points
    other = torch.where(seen[:, None], ideal * reference.dim - sums.values(), 0.0)  # both have the mean J
    known = torch.cat([known, other[..., None]], -1)

    def mean(values: Tensor) -> tuple[Tensor, Tensor]:
        return values.mean(1).cpu(), stderr_of_mean(values).cpu()

    losses, loss_stderr = mean(regressed(loss, known))
    rest, rest_stderr = mean(regressed(loss - distance, known))
    unseen = torch.where(seen.cpu(), 0.0, optimum)  # draws that are not confused do not show what they miss of J
    return ModelGap(
        name=name,
        log_snr=levels,
        loss=losses,
        loss_stderr=loss_stderr.maximum(unseen),
        optimum=optimum,
        optimum_stderr=torch.hypot(curve.stderr_at(sigmas), curve.interpolation_error_at(sigmas)) / reference.dim,
        distances=distance.cpu(),
        unexplained=rest - optimum,
        unexplained_stderr=rest_stderr.maximum(unseen),
        dim=reference.dim,
        sigma_data=sigma_data,
        same_data=all(curve.made.get(key) == value for key, value in reference.provenance().items() if key in _SAME),
    )


def stderr_of_mean(by_draw: Tensor) -> Tensor:
    """Return the standard error of the mean over the last dimension, the draws.

    Example:
        >>> stderr_of_mean(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        tensor(0.6455)
    """
    return by_draw.std(-1) / by_draw.shape[-1] ** 0.5


@torch.no_grad()
def _denoised(denoise: Denoise, x: Tensor, log_snr: Tensor, index: Tensor, batch_size: int) -> Tensor:
    parts = [
        denoise(part, log_snr.to(part.device).expand(len(part)), numbers)
        for part, numbers in zip(x.split(batch_size), index.split(batch_size), strict=True)
    ]
    estimate = torch.cat(parts)
    if estimate.shape != x.shape:
        raise ValueError(f"`denoise` must return the shape of x, {tuple(x.shape)}, got {tuple(estimate.shape)}.")
    if not bool(estimate.isfinite().all()):
        raise ValueError(f"`denoise` returned values that are not finite at log-SNR {float(log_snr):.2f}.")
    return estimate
