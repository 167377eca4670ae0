"""A weighting centred on the batch: ALSR, and what it is bound to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from snrweights.densities import Density
from snrweights.drawn import log_snr_moments
from snrweights.predictions import LIMIT, log_error_ratio
from snrweights.schedules import Schedule, exact_dtype
from snrweights.weightings.base import Weighting, hyper, register_weighting
from snrweights.weightings.bound import BoundWeighting, WeightCurve

# form -> ln of the factor on EDM's weight, from alpha (z - mu)², and its limit at infinite z; no power of SNR has the
# Cauchy form's, so that at LIMIT, which stands for infinity, it is a small one
_FORMS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "cauchy": (lambda x: -torch.log1p(x), -3 / 16 * LIMIT),
    "gaussian": (torch.neg, -math.inf),
    "loss_zscore": (torch.zeros_like, 0.0),
}
_DECAY: dict[str, Callable[[ALSR], float]] = {"batch": lambda alsr: 0.0, "ema": lambda alsr: alsr.ema_decay}


@register_weighting(
    "alsr",
    target="sample",
    formula="w_x0 = (SNR + 1 / sigma_data²) / (1 + alpha (z - mu)²), z = ln(sigma_data² SNR)",
    source="Sun & Shi 2026, arXiv 2603.10391",
)
class ALSR(Weighting):
    """Variance-aware adaptive weighting: EDM's ``w_x0`` times a bump over ``z = ln(sigma_data² / sigma_hat²)``.

    The bump is ``1 / (1 + alpha (z - mu)²)`` (``"cauchy"``, the paper's Algorithm 1), ``exp(-alpha (z - mu)²)``
    (``"gaussian"``, its Eq. 13), or ``1 + alpha (loss - mean) / std``, not below 0, of the EDM-weighted losses
    (``"loss_zscore"``, in which nothing depends on z). Only the last one looks at a loss.

    mu is the mean of z over the draws: ``center="fixed"`` takes it from their density, and the weight is a function of
    the timestep; ``"batch"``, the paper's, takes it from each batch, ``"ema"`` from all batches so far, weighed by
    ``ema_decay`` per batch. These two, and ``"loss_zscore"`` with either, are bound, and called as ``bound(t, loss)``;
    see ``BoundALSR``. As curves over log-SNR they are what they are for a batch centred at the mean of the density: the
    curve of the fixed centre, and for ``"loss_zscore"`` that of a sample whose loss is the mean, EDM's.

    Args:
        form: of the bump: ``"cauchy"``, ``"gaussian"`` or ``"loss_zscore"``.
        alpha: its strength, > 0; the paper's ablation has 0.01, 0.05 and 0.1.
        center: where mu, or mean and std of the losses, come from: ``"fixed"``, ``"batch"`` or ``"ema"``.
        mu: the fixed centre; default: the mean of z under the density of the draws.
        sigma_data: standard deviation of the data, > 0; default: the schedule's, or 0.5 where it states none.
        ema_decay: for ``"ema"``, what is left of a batch at the next one, in (0, 1).

    Raises:
        ValueError: a bad value, ``"loss_zscore"`` with a fixed centre, or (from ``bind``) a density without a mean.

    Source: Sun & Shi 2026, arXiv 2603.10391; ``"loss_zscore"`` is from the README of its code, read second-hand.

    Example:
        >>> from snrweights import get_weighting
        >>> get_weighting("alsr").over_log_snr("edm", prediction_type="edm")(torch.tensor([2.4, 2.4 + 20**0.5]))
        tensor([1.0000, 0.5000])
    """

    form: str = hyper("cauchy", choices=tuple(_FORMS))
    alpha: float = hyper(0.05, above=0)
    center: str = hyper("fixed", choices=("fixed", *_DECAY), in_curve=False)
    mu: float | None = hyper(None)
    sigma_data: float | None = hyper(None, above=0)
    ema_decay: float = hyper(0.99, above=0, below=1, in_curve=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.needs_loss and not self.batch_dependent:
            raise ValueError(
                "`ALSR(form='loss_zscore')` compares a loss with those of its batch, and there is no fixed mean of "
                "them: `center` must be 'batch' or 'ema', got 'fixed'."
            )

    @property
    def batch_dependent(self) -> bool:
        """Whether mu, or the mean of the losses, is measured."""
        return self.center != "fixed"

    @property
    def needs_loss(self) -> bool:
        """Whether losses are compared."""
        return self.form == "loss_zscore"

    @property
    def averaged_over_steps(self) -> bool:
        """Whether they are averaged over batches."""
        return self.center == "ema"

    def for_draws(self, schedule: Schedule, density: Density) -> ALSR:
        """Fill in the schedule's sigma_data, and the mean of z under the density."""
        sigma_data = self.sigma_data or schedule.sigma_data or 0.5
        if self.mu is not None:
            return dataclasses.replace(self, sigma_data=sigma_data)
        mean, _ = log_snr_moments(density)
        if not math.isfinite(mean):
            raise ValueError(f"`ALSR(mu=None)`: log-SNR has no mean under {density}; give `mu=`, or another density.")
        return dataclasses.replace(self, sigma_data=sigma_data, mu=mean + 2 * math.log(sigma_data))

    def bound_to(self, curve: WeightCurve, schedule: Schedule, weights: Tensor) -> BoundWeighting:
        """Return a plain bound weight for the fixed centre, else a ``BoundALSR``."""
        return (BoundALSR if self.batch_dependent else BoundWeighting)(curve, schedule, weights)

    def log_weight(self, log_snr: Tensor) -> Tensor:
        """Return ln(SNR + 1 / sigma_data²) + ln bump, with the fixed centre."""
        if self.mu is None:
            raise ValueError("`ALSR(mu=None)` needs the density of the draws: call `bind` or `over_log_snr` first.")
        return self.log_weight_about(log_snr, self.mu)

    def log_weight_about(self, log_snr: Tensor, mu: float | Tensor) -> Tensor:
        """Return the same with another centre, a number or a tensor ()."""
        bump, limit = _FORMS[self.form]
        log_bump = bump(self.alpha * (self.z(log_snr) - mu).square())
        log_bump = torch.where(log_snr.abs() == LIMIT, limit, log_bump)
        return log_error_ratio("edm", log_snr, self.sigma_data or 0.5) + log_bump

    def z(self, log_snr: Tensor) -> Tensor:
        """Return ln(sigma_data² SNR)."""
        return log_snr + 2 * math.log(self.sigma_data or 0.5)


class BoundALSR(BoundWeighting):
    """ALSR with a centre that is measured: ``bound(t, loss)`` takes it from the batch, or from the batches so far.

    Set ``reduce`` on several processes, and the batch is that of all of them. With gradient accumulation call
    ``center_on(t)`` with the timesteps of the whole optimizer step before its first micro-batch: the weights are then
    those of one large batch. The losses of a step cannot be known ahead: ``"loss_zscore"`` centres on each micro-batch
    (``center="batch"``) or on the running mean (``"ema"``, which is indifferent to how a step is cut up).

    Weights are detached, nothing waits for the device, and there is one collective of three numbers per call, with
    ``center_on`` per step. Timesteps at infinite log-SNR and losses that are not finite are left out of the means. With
    ``"batch"`` a single sample is its own mean: its weight is EDM's. Every call counts as one of training: with
    ``"ema"`` weigh held-out batches by a copy.

    Example:
        >>> from snrweights import get_weighting
        >>> bound = get_weighting("alsr", center="batch").bind("edm", prediction_type="edm")
        >>> bound(torch.tensor([0.1, 1.0]))  # as far from their mean as each other
        tensor([0.7905, 0.7905])
        >>> bound(torch.tensor([0.1]))
        tensor([1.])
    """

    def __init__(self, curve: WeightCurve, schedule: Schedule, weights: Tensor) -> None:
        super().__init__(curve, schedule, weights)
        weighting = curve.weighting
        assert isinstance(weighting, ALSR)
        self._alsr = weighting
        self._decay = _DECAY[weighting.center](weighting)
        self._centred = False  # by center_on, until its next call
        self._sums = torch.zeros(3, dtype=torch.float64)  # number, sum and sum of squares of z, or of the losses

    @torch.no_grad()
    def __call__(self, t: Tensor, loss: Tensor | None = None) -> Tensor:
        """Return the weights of timesteps ``t``, shape (B,) or ().

        Args:
            t: timesteps.
            loss: the unweighted losses of the same shape, on the target that was bound; for ``"loss_zscore"``.

        Raises:
            ValueError: shapes that differ, or no loss where one is needed.
        """
        if t.ndim > 1:
            raise ValueError(f"`t` must have shape (B,) or (), got {tuple(t.shape)}.")
        finite = self.schedule.log_snr(t).clamp(-LIMIT, LIMIT)
        log_weight = self._log_weight_by_loss(finite, t, loss) if self._alsr.needs_loss else self._log_weight(finite)
        return self.curve.convert(log_weight, finite).exp().to(self.dtype)

    def _log_weight(self, finite: Tensor) -> Tensor:
        if not self._centred:
            self._add(self._alsr.z(finite), finite.abs() < LIMIT)
        number, total, _ = self._sums.unbind()
        assert self._alsr.mu is not None
        mu = torch.where(number > 0, total / number, self._alsr.mu)
        return self._alsr.log_weight_about(finite, mu)

    def _log_weight_by_loss(self, finite: Tensor, t: Tensor, loss: Tensor | None) -> Tensor:
        if loss is None or loss.shape != t.shape:
            got = None if loss is None else tuple(loss.shape)
            raise ValueError(f"{self._alsr!r} needs `loss`, one for each of `t`, shape {tuple(t.shape)}; got {got}.")
        edm = self._alsr.log_weight(finite)
        weighted = self.curve.convert(edm, finite).exp() * loss.to(finite)  # a common factor does not matter
        self._add(weighted, weighted.isfinite())
        mean, square = (self._sums[1:] / self._sums[0]).unbind()
        variance = square - mean.square()
        spread = variance > 1e-12 * square  # else all are equal, up to rounding
        score = torch.where(spread, (weighted - mean) / torch.where(spread, variance, 1.0).sqrt(), 0.0)
        return edm + torch.log((1 + self._alsr.alpha * score).clamp(min=0))

    def _add(self, values: Tensor, valid: Tensor) -> None:
        """Let earlier sums fade, and add those of a batch, over all processes."""
        if self._sums.device != values.device:
            self._sums = self._sums.to(values.device, exact_dtype(values.device))
        values = torch.where(valid, values, 0.0)
        sums = torch.stack((valid.to(values).sum(), values.sum(), values.square().sum()))
        if self.reduce is not None:
            sums = self.reduce(sums)
        self._sums = self._decay * self._sums + sums

    @torch.no_grad()
    def center_on(self, t: Tensor) -> None:
        """Centre on ``t``, any shape, until the next call; not for ``"loss_zscore"``, which does not look at it."""
        if self._alsr.needs_loss:
            return
        finite = self.schedule.log_snr(t).clamp(-LIMIT, LIMIT)
        self._add(self._alsr.z(finite), finite.abs() < LIMIT)
        self._centred = True

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums, fading: ``{"sums": (3,)}``."""
        return {"sums": self._sums.cpu().clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a state, on every process."""
        super().load_state_dict(state)
        self._sums = state["sums"].to(self._sums)
