"""Reweighted losses as bounds: what a denoiser's gap to the optimal loss bounds, noise level by noise level.

Write l for log-SNR and ``D(l) = E ||eps_hat - E[eps | z]||²``, summed over dimensions: the loss of epsilon above the
optimal one, l_theta - l*. The chain that runs from the prior at ``low`` to l with the model and finishes with the
optimal decoder q(x | z_l) has a distribution p_l of x, and in the limit of many steps

    KL(q || p_l)  ≤  K(l) = KL_prior + ½ ∫_low^l D dl'            KL_prior = KL(q(z_low) || p(z_low)) of the marginals

K(l) is the KL of whole paths, of which that of their ends is a part. It rises with l, and K(high) is the gap of the
ELBO, the model's negative ELBO less the entropy of the data, where the decoder is the optimal one. For an objective w
over log-SNR that nowhere rises, the weighted loss is a mixture of them,

    improved_bound(w)  =  KL_prior + ½ ∫ w D dl / w(low)  =  ∫ K dμ,   μ = -dw / w(low), and w(high) / w(low) at high,

which bounds KL(q || ∫ p_l dμ), since KL is convex, and is at most the gap of the ELBO.

**What it bounds** is that mixture of models, each finished by an optimal decoder that nobody can run: the closer w
keeps to the noise, the more of the work the decoder does. It says nothing of the samples of the model, and weightings
cannot be ranked by it: a weight that is all at ``low`` has KL_prior for a bound, whatever the model.

Source: Shi & Titsias 2025, arXiv 2511.19664, for the bounds and for the reweighted loss as their mixture, of which only
the abstract was read; the formulas above, their constants and the terms of the ELBO are derived here, and tested
against closed forms and enumeration. Weighted losses as mixtures of ELBOs: Kingma & Gao 2023, arXiv 2303.00848.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from snrweights.densities import Density
from snrweights.diagnose import Denoise, ModelGap, diagnose, stderr_of_mean
from snrweights.elbo_terms import decoder_nats, prior_kl_of_points
from snrweights.losses import Method
from snrweights.objective import MONOTONE_TOLERANCE, log_objective
from snrweights.optimal.curve import OptimalLossCurve
from snrweights.optimal.information import information
from snrweights.optimal.reference import ReferenceSet
from snrweights.schedulers import as_schedule
from snrweights.schedules import Schedule
from snrweights.weightings.base import _REGISTRY, get_weighting

NO_RANKING = (
    "Each number bounds the KL of a mixture of models that finish with an optimal decoder, which nobody can run: not "
    "that of the model's samples. Weightings are not ranked by it."
)
_LEVELS = 33
_CHUNK = 1024
_PER_STEP = 32
_NODES, _WEIGHTS = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(_PER_STEP))


@dataclass(frozen=True, eq=False)
class ImprovedBound:
    """The bound that a weighted loss is, or why it is none. Bounds have no order: comparing two is an error.

    Attributes:
        name: of the weighting.
        nats: the bound; None where the objective rises somewhere.
        stderr: its standard error, None likewise.
        spacing_error: about how far the levels' spacing puts it off, None likewise.
        negative_mass: ``∫ max(dw/dl, 0) dl`` over the range, with the largest w at 1, as in ``objective``.
        growth: w at the schedule's own noisy end relative to w(low), None likewise. Beyond 1, and all the more where it
            is infinite, the bound is one of the range: on a longer one it is another.
        log_snr: (F,) where the weight was evaluated, rising.
        weight: (F,) w there, relative to its largest value.
    """

    name: str
    nats: float | None
    stderr: float | None
    spacing_error: float | None
    negative_mass: float
    growth: float | None
    log_snr: Tensor = field(repr=False)
    weight: Tensor = field(repr=False)

    @property
    def monotone(self) -> bool:
        """Whether the objective is a non-negative mixture of the cascade's bounds."""
        return self.nats is not None

    def _refuse(self, other: object) -> NoReturn:
        raise TypeError(f"Bounds of weightings have no order. {NO_RANKING}")

    __lt__ = __le__ = __gt__ = __ge__ = _refuse


@dataclass(frozen=True, eq=False)
class Cascade:
    """The bounds K(l) of a model over log-SNR, all on one range; as ``cascade`` returns them.

    Of a model that is told a class, with a curve of labelled data, everything is given the class: a mean over classes.

    Attributes:
        name: of the model.
        log_snr: (L,) levels, rising; the first and the last are the range of everything here.
        gaps: (L, M) D by draw, in nats: the squared error of epsilon above the optimal one, summed over dimensions.
        curve_stderr: (L,) the part of their error that all draws share; 0 where the draws are paired with the ideal
            denoiser's.
        prior: KL_prior in nats.
        prior_stderr: its standard error.
        information: I(x; z) at the clean end: ln N where N points are told apart.
        information_stderr: its standard error.
        decoder: mean of -ln p(x | z) at the clean end of 8-bit data, see ``decoder_nats``; None: no 8-bit data given.
        dim: numbers of a point.
        schedule: that the model was trained on.
        prediction_type: of the model.
        known: values of hyperparameters for weightings that need them: ``curve`` and ``data_variance``.
    """

    name: str
    log_snr: Tensor
    gaps: Tensor
    curve_stderr: Tensor
    prior: float
    prior_stderr: float
    information: float
    information_stderr: float
    decoder: float | None
    dim: int
    schedule: Schedule
    prediction_type: str | None
    known: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def range(self) -> tuple[float, float]:
        """(low, high): the log-SNRs between which everything here is."""
        return float(self.log_snr[0]), float(self.log_snr[-1])

    def nats(self) -> tuple[Tensor, Tensor]:
        """Return K at the levels (L,), in nats, and its standard error (L,). Between levels D is taken for linear."""
        steps = self.log_snr.diff()[:, None] / 4

        def integral(values: Tensor) -> Tensor:
            return torch.cat([values[:1] * 0, (steps * (values[1:] + values[:-1])).cumsum(0)])

        by_draw, shared = integral(self.gaps), integral(self.curve_stderr[:, None]).squeeze(1)
        return self.prior + by_draw.mean(1), torch.hypot(_stderr(by_draw), shared + self.prior_stderr)

    def gap(self) -> tuple[float, float]:
        """Return K at the clean end, the gap of the ELBO, in nats, and its standard error."""
        nats, stderr = self.nats()
        return float(nats[-1]), float(stderr[-1])

    def elbo(self) -> tuple[float, float] | None:
        """Return the ELBO of 8-bit data in nats, the mean over points, and its standard error; None of other data.

        ``-ELBO = E[-ln p(x | z_high)] + E KL(q(z_low | x) || p(z_low)) + ½ ∫ E ||eps - eps_hat||² dl``, in the limit of
        many steps; by dI/dl = ½ l* it is ``decoder + I(x; z_high) + K(high)``. Of a model with classes it is the bound
        on ln p(x | class).
        """
        if self.decoder is None:
            return None
        gap, stderr = self.gap()
        return -(self.decoder + self.information + gap), math.hypot(stderr, self.information_stderr)

    def bits_per_dim(self) -> tuple[float, float] | None:
        """Return the negative ELBO in bits per dimension, and its standard error; None where there is no ELBO."""
        found = self.elbo()
        return None if found is None else (-self.in_bits(found[0]), self.in_bits(found[1]))

    def in_bits(self, nats: float) -> float:
        """Return nats of a point as bits per dimension."""
        return nats / (self.dim * math.log(2))

    def improved_bound(
        self, method: Method, *, density: Density | str | None = None, clamp_max: float | None = None, **hp: Any
    ) -> ImprovedBound:
        """Return ``KL_prior + ½ ∫ w D dl / w(low)`` in nats, where w nowhere rises; else its negative mass.

        w is the objective w_KG of a training configuration, what multiplies ``½ E ||eps - eps_hat||² dl``: the
        weighting's own where it is defined by one (``elbo``, ``sigmoid``, ``flow``), whatever the density; for any
        other p(l) w_eps(l), the density of the draws times the weight on the error of epsilon, as in
        ``snrweights.objective``. That, and not w_eps, is what a run with this weighting minimises.

        D is taken for linear between the levels and w as it is, so that the bound never exceeds K(high).

        Args:
            method: a name, a weighting or a function w_eps(log_snr), as for ``objective``.
            density: that log-SNR is drawn from; default: the schedule's own.
            clamp_max: as for ``objective``.
            **hp: hyperparameters of the method; ``curve`` and ``data_variance`` are known here.

        Raises:
            ValueError: unknown method or hyperparameter, or an objective that vanishes on the range.
        """
        if isinstance(method, str) and method in _REGISTRY:
            takes = _REGISTRY[method].hyperparameters()
            hp = {name: value for name, value in self.known.items() if name in takes} | hp
        curve = get_weighting(method, **hp).over_log_snr(
            self.schedule, prediction_type=self.prediction_type, density=density, clamp_max=clamp_max
        )
        nodes, steps = _quadrature(self.log_snr)
        ends = torch.tensor(self.range, dtype=torch.float64)
        log_w = log_objective(curve, torch.cat([ends[:1], nodes, ends[1:]]))
        if not abs(float(log_w.max())) < math.inf:
            raise ValueError(f"{curve.weighting} under {curve.density} has no finite objective at {self.range}.")
        weight = (log_w - log_w.max()).exp()
        found: dict[str, Any] = {
            "name": curve.weighting.name if not isinstance(method, str) else method,
            "negative_mass": float(weight.diff().clamp_min(0).sum()),
            "log_snr": torch.cat([ends[:1], nodes, ends[1:]]),
            "weight": weight,
        }
        if found["negative_mass"] > MONOTONE_TOLERANCE:
            return ImprovedBound(nats=None, stderr=None, spacing_error=None, growth=None, **found)
        # within the tolerance it is still a bound: that of the running minimum of w, which is below it
        weight = steps * weight[1:-1] / weight[0] / 2
        shares = _shares(self.log_snr, nodes, weight)
        by_draw = shares @ self.gaps
        coarse = torch.cat([torch.arange(0, len(self.log_snr) - 1, 2), torch.tensor([len(self.log_snr) - 1])])
        by_coarse = _shares(self.log_snr[coarse], nodes, weight) @ self.gaps[coarse]
        shared = float(shares @ self.curve_stderr) + self.prior_stderr
        return ImprovedBound(
            nats=self.prior + float(by_draw.mean()),
            stderr=math.hypot(float(_stderr(by_draw)), shared),
            growth=float((log_objective(curve, self._noisy_end()) - log_w[0]).exp()),
            spacing_error=abs(float((by_coarse - by_draw).mean())) / 3,  # an error ∝ spacing², and the rest is 1 : 4
            **found,
        )

    def _noisy_end(self) -> Tensor:
        """Return the lowest log-SNR of the schedule; an atom at SNR 0 of a table is no part of its density."""
        reached = self.schedule.log_snr(self.schedule.grid()).double()
        return (reached if hasattr(self.schedule, "timestep_of") else reached[reached.isfinite()]).min()


def cascade(
    losses: ModelGap | Denoise | Tensor,
    curve: OptimalLossCurve,
    schedule: Any,
    *,
    data: Tensor | None = None,
    log_snr: Tensor | Sequence[float] | None = None,
    prediction_type: str | None = None,
    name: str = "the model",
    **options: Any,
) -> Cascade:
    """Return the bounds of a model over log-SNR, from its losses at noise levels, or from the model and its data.

    Args:
        losses: what ``snrweights.diagnose.diagnose`` returned; or a denoiser as it takes one, with ``data``; or losses
            of epsilon at ``log_snr``, means over dimensions: (L, M) of M draws that are the same at all levels, or
            (L,), taken as exact. The first two are compared with the ideal denoiser on the same draws, the third with
            the curve, whose error then counts.
        curve: the optimal loss of the data, from ``snrweights.optimal.optimal_loss``. KL_prior and the information in
            the ELBO are areas under it.
        schedule: whatever ``as_schedule`` reads: its coordinates say the prior, N(0, I) in ``vp`` and N(0, sigma² I)
            in others, and its timesteps the density of the draws that an objective has for a default.
        data: (N, ...) what the model was trained on. uint8, read as u / 127.5 - 1, gives the ELBO its decoder.
        log_snr: (L,) levels; of a denoiser by default 33, evenly over what the curve and the schedule both reach.
        prediction_type: of the model, for its weightings; default: what the schedule states.
        name: of the model.
        **options: for ``diagnose``, of a denoiser: ``labels``, ``flips``, ``draws``, ``batch_size``, ``seed`` and
            ``device``.

    Raises:
        ValueError: levels that do not rise or that the curve does not reach, losses of another shape, a curve of other
            data, or no data to go with a denoiser or with a curve of an older version.

    Source: see ``snrweights.bounds``.

    Example:
        >>> from snrweights.optimal import optimal_loss
        >>> points = torch.tensor([[-0.5], [0.5]])
        >>> curve = optimal_loss(points, torch.logspace(-2, 2, 41), draws=512)
        >>> found = cascade(lambda x, log_snr, index: 0 * x, curve, "flow", data=points, log_snr=[-4.0, 0.0, 4.0])
        >>> sigmoid = found.improved_bound("sigmoid")
        >>> sigmoid.nats < found.gap()[0], found.improved_bound("iddpm").nats is None
        (True, True)
    """
    schedule = as_schedule(schedule)
    if not isinstance(losses, (ModelGap, Tensor)):
        if data is None:
            raise ValueError("`data` must be given with a denoiser, got None.")
        levels = _common_levels(curve, schedule) if log_snr is None else torch.as_tensor(log_snr)
        losses = diagnose(losses, data, levels, curve, name=name, **options)
    elif options:
        raise TypeError(f"{sorted(options)} are for a denoiser, which `losses` is not.")
    if isinstance(losses, ModelGap):
        name, levels = losses.name, losses.log_snr
        _check_same(losses, curve)
        gaps = (losses.ratio("epsilon") * losses.dim)[:, None] * losses.distances
        curve_stderr = torch.zeros_like(levels)
    else:
        levels, gaps, curve_stderr = _against_curve(losses, log_snr, curve)
    low, high = float(levels[0]), float(levels[-1])
    at_low, at_high = information(curve, low), information(curve, high)
    dim = int(curve.made["dim"])
    variance = curve.made["variance"] / dim
    pixels = data is not None and data.dtype == torch.uint8
    return Cascade(
        name=name,
        log_snr=levels,
        gaps=gaps,
        curve_stderr=curve_stderr,
        prior=prior_kl_of_points(_second_moment(curve, data), dim, low, schedule.coords) - at_low[0],
        prior_stderr=at_low[1],
        information=at_high[0],
        information_stderr=at_high[1],
        decoder=decoder_nats(data, high) if pixels else None,  # type: ignore[arg-type]
        dim=dim,
        schedule=schedule,
        prediction_type=prediction_type or schedule.prediction_type,
        known={"curve": curve} | ({} if schedule.sigma_data else {"data_variance": variance}),
    )


def _common_levels(curve: OptimalLossCurve, schedule: Schedule) -> Tensor:
    reached = schedule.log_snr(schedule.grid()).double()
    reached = reached[reached.isfinite()]
    low, high = (-2 * curve.sigmas[[-1, 0]].log()).tolist()
    return torch.linspace(max(low, float(reached.min())), min(high, float(reached.max())), _LEVELS, dtype=torch.float64)


def _second_moment(curve: OptimalLossCurve, data: Tensor | None) -> float:
    """Return the mean of ||x||², which older curves do not say, from the curve or the data."""
    if "second_moment" in curve.made:
        return float(curve.made["second_moment"])
    if data is None:
        raise ValueError("`data` must be given with a curve that does not say their second moment, got None.")
    return ReferenceSet(data, None, False, "cpu", _CHUNK).second_moment


def _check_same(losses: ModelGap, curve: OptimalLossCurve) -> None:
    optimum = curve.at((-losses.log_snr / 2).exp(), reduction="mean")
    if losses.dim != curve.made["dim"] or not torch.allclose(losses.optimum, optimum, rtol=1e-9, atol=0):
        raise ValueError(f"`curve` {curve} is not the one that `losses` were compared with.")


def _against_curve(
    losses: Tensor, log_snr: Tensor | Sequence[float] | None, curve: OptimalLossCurve
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the levels (L,), losses less the curve (L, M) and the curve's error (L,), both summed over dimensions."""
    levels = torch.as_tensor([] if log_snr is None else log_snr, dtype=torch.float64).contiguous()
    if levels.ndim != 1 or len(levels) < 2 or not bool((levels.diff() > 0).all()):
        raise ValueError(f"`log_snr` must be at least two rising noise levels, got {log_snr}.")
    if losses.shape[:1] != levels.shape or losses.ndim > 2 or not bool(losses.isfinite().all()):
        raise ValueError(
            f"`losses` must be finite and (L,) or (L, M) with L = {len(levels)}, got {tuple(losses.shape)}."
        )
    sigmas, by_draw = (-levels / 2).exp(), losses.double().reshape(len(levels), -1)
    error = torch.hypot(curve.stderr_at(sigmas), curve.interpolation_error_at(sigmas)) * levels.exp()
    return levels, by_draw * curve.made["dim"] - curve.at(sigmas, "epsilon")[:, None], error


def _stderr(by_draw: Tensor) -> Tensor:
    """Return the standard error of the mean over draws; 0 of a single one, which stands for exact values."""
    return stderr_of_mean(by_draw) if by_draw.shape[-1] > 1 else by_draw[..., 0] * 0


def _quadrature(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return nodes and weights of an integral over log-SNR: Gauss-Legendre between each two levels."""
    step = levels.diff()[:, None]
    return (levels[:-1, None] + step * (_NODES + 1) / 2).flatten(), (step / 2 * _WEIGHTS).flatten()


def _shares(levels: Tensor, nodes: Tensor, weight: Tensor) -> Tensor:
    """Return what each level (L,) counts in Σ weight f(nodes), with f linear between the levels."""
    right = torch.searchsorted(levels, nodes).clamp(1, len(levels) - 1)
    part = (nodes - levels[right - 1]) / (levels[right] - levels[right - 1]) * weight
    return torch.zeros_like(levels).index_add_(0, right - 1, weight - part).index_add_(0, right, part)
