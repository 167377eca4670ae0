"""Samplers that draw where training says the noise is: importance sampling of timesteps from measured losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from snrweights.densities import Density
from snrweights.history import LossHistory
from snrweights.predictions import LIMIT
from snrweights.quantiles import inside
from snrweights.samplers import Draw, TimestepSampler, whole
from snrweights.schedules import DiscreteSchedule, exact_dtype
from snrweights.statistics import LossStatistics
from snrweights.tracking import LossVarianceTracker, Reduce

Evidence = LossVarianceTracker | LossHistory
MODES = ("resample", "reweight", "uncorrected")
_PREFIX = "evidence."  # of the evidence's part of a state
BINS, MEMORY = 32, 100  # of a sampler's own tracker: bins, and losses that an average bin counts when old ones fade


@dataclass(frozen=True)
class Rule:
    """How often a noise level is drawn: q ∝ p root(statistics), mixed with a share ``floor`` of p.

    Attributes:
        root: from statistics of the weighted losses to a number >= 0 per bin.
        of: whose second moment is least under it, for people.
        floor: default share of p in q.
        history: keep that many last losses of every bin (of uniform timesteps: of each) and draw from p until
            all have as many; None: moments that fade.
        excess: what counts is the losses less the optimal ones.
    """

    root: Callable[[LossStatistics], Tensor]
    of: str
    floor: float = 0.1
    history: int | None = None
    excess: bool = False


def _loss(statistics: LossStatistics) -> Tensor:
    return statistics.second_moment.sqrt()


def _gradient(statistics: LossStatistics) -> Tensor:
    return statistics.gradient_square.sqrt()


def _deviation(statistics: LossStatistics) -> Tensor:
    return statistics.variance.sqrt()


def _mean(statistics: LossStatistics) -> Tensor:
    return statistics.mean.clamp_min(0)  # an estimate of a gap is below 0 by its error


RULES: dict[str, Rule] = {  # of functions that can be pickled, with a model that has a sampler attached
    "loss_second_moment": Rule(_loss, "the loss estimate", floor=0.001, history=10),
    "gradient": Rule(_gradient, "the gradient at the model's output"),
    "variance": Rule(_deviation, "the loss about its mean at each noise level"),
    "gap": Rule(_mean, "the weighted gap to the optimal loss", excess=True),
}
BY_LOSS = tuple(name for name, known in RULES.items() if not known.excess)  # that need nothing but losses


@dataclass(frozen=True)
class Prediction:
    """What a sampler's statistics say of its draws, against as many independent draws from p.

    Attributes:
        of: whose second moment.
        ratio: of the second moment under q, with importance weights, to that under p; below 1 is better. The variance
            that training sees is that of the gradient over all parameters, which is not the same: measure it.
        effective_sample_size: 1 / E_q[(p/q)²], as a share of the draws.
    """

    of: str
    ratio: float
    effective_sample_size: float

    def __str__(self) -> str:
        if math.isnan(self.ratio):
            return f"second moment of {self.of}: not measured yet"
        return (
            f"second moment of {self.of}: {self.ratio:.3f} of that under the base density; "
            f"effective sample size {100 * self.effective_sample_size:.0f} %"
        )


class ImportanceSampler(TimestepSampler):
    """Draws timesteps by what their losses were, with weights p / q that keep the expected gradient.

    The density p (``density``) is that of the objective. In bins of log-SNR q ∝ p root, root by ``rule``:

    - ``"gradient"``: √E[w² |g|²], g the gradient of the sample's loss L at the model's output; |g|² is L up to a
      constant for a mean squared error. For a fixed objective q ∝ p √E[w² |g|²] has the least second moment of g.
    - ``"loss_second_moment"``: √E[(w L)²] over the last 10 losses of each timestep, uniform until all have theirs and
      with a share .001 of p (Nichol & Dhariwal 2021, arXiv 2102.09672): least variance of the *loss estimate*.
    - ``"variance"``: √Var[w L]: the importance ratio of ALSR (Sun & Shi 2026, arXiv 2603.10391, Eq. 12; p* ∝ p √Var is
      our reading, second-hand).
    - ``"gap"``: max(E[w (L - L*)], 0), the weighted gap to the optimal loss L* (Xu et al. 2025, arXiv 2506.13763,
      second-hand: there q ∝ w gap over ln sigma, which it is here for a p that is log-uniform, and the draws have no
      p / q: mode ``"uncorrected"``). Needs ``optimum``.

    Feed it with ``update`` after every batch; old losses fade, so that a bin counts 100 on average. On several
    processes give ``reduce``: statistics are then summed over them at every refresh, a collective inside ``draw`` that
    the host waits for.

    Args:
        schedule: whatever ``as_schedule`` reads.
        rule: a name, or a ``Rule``.
        density: see ``TimestepSampler``.
        mode: ``"resample"`` draws from q with weights p / q; ``"reweight"`` draws from p with weights q / p, which
            changes the objective (ALSR's Eq. 12 as it stands); ``"uncorrected"`` draws from q with weights 1, which
            changes it too: under the rule ``"gap"`` a noise level then counts w² gap.
        bins: number of bins of about equal mass under p, at most the timesteps of a discrete schedule; default 32, or
            those timesteps where the rule keeps a history.
        floor: share of p in q, in (0, 1]; no weight p / q exceeds 1 / floor. Default: the rule's.
        warm_up: losses that a bin must have seen, in a history at most as many as it keeps; until then it counts as the
            average bin.
        refresh_every: batches between two computations of q.
        evidence: count in this tracker, with its bins and its ``reduce``, in place of one of the sampler's own.
        reduce: sums a tensor over processes.
        optimum: for the rule ``"gap"``, the optimal loss at log-SNR (B,) in the unit of the losses given to ``update``:
            ``snrweights.optimal.extended.ExtendedCurve(curve, prediction_type)``.
        **options: ``draws``, ``seed``, ``rank``, ``world_size``, ``accumulation``, as for ``TimestepSampler``.

    Raises:
        ValueError: a bad argument, with the choices.
        TypeError: an option that it does not take.

    Example:
        >>> sampler = ImportanceSampler("linear", "gradient", bins=2, warm_up=1, refresh_every=1)
        >>> sampler.update(torch.tensor([100, 900]), torch.tensor([9.0, 1.0]))
        >>> t, weight = sampler.draw(1000)
        >>> sampler.predicted().ratio < 1, weight.unique()  # of the gradient at the model's output
        (True, tensor([0.6897, 1.8182]))
    """

    def __init__(
        self,
        schedule: Any,
        rule: str | Rule = "gradient",
        *,
        density: Density | str | None = None,
        mode: Literal["resample", "reweight", "uncorrected"] = "resample",
        bins: int | None = None,
        floor: float | None = None,
        warm_up: int = 10,
        refresh_every: int = 10,
        evidence: Evidence | None = None,
        reduce: Reduce | None = None,
        optimum: Callable[[Tensor], Tensor] | None = None,
        **options: Any,
    ) -> None:
        if "base" in options:
            raise TypeError(
                "An ImportanceSampler takes no `base`: its `density` is the one that the objective is under."
            )
        super().__init__(schedule, density, **options)
        if isinstance(rule, str) and rule not in RULES:
            raise ValueError(f"Unknown rule {rule!r}; choose one of {list(RULES)}.")
        self.rule = RULES[rule] if isinstance(rule, str) else rule
        if self.rule.excess != (optimum is not None):
            needed = [name for name, known in RULES.items() if known.excess]
            raise ValueError(f"`optimum` is needed by the rules {needed} and by no other, got {optimum} with {rule!r}.")
        self.mode, self.optimum = mode, optimum
        self.floor = self.rule.floor if floor is None else floor
        self.warm_up, self.refresh_every = warm_up, refresh_every
        self._check(bins)
        self.evidence = self._evidence(evidence, bins, reduce)
        kept = self.evidence.length if isinstance(self.evidence, LossHistory) else warm_up
        self._enough = min(warm_up, kept)
        self._fades = evidence is None and isinstance(self.evidence, LossVarianceTracker)
        inner = self.evidence.edges[1:-1].to("cpu", torch.float64)
        self._inner = inner
        self._mass = torch.cat((self._quantiles.mass_up_to(inner), inner.new_ones(1))).diff(prepend=inner.new_zeros(1))
        self._tilt = torch.ones_like(self._mass)  # q / p
        self._known = torch.zeros_like(self._mass, dtype=torch.bool)  # bins that have seen enough

    def _check(self, bins: int | None) -> None:
        if self.mode not in MODES:
            raise ValueError(f"`mode` must be one of {list(MODES)}, got {self.mode!r}.")
        for name, value in (("bins", bins), ("warm_up", self.warm_up), ("refresh_every", self.refresh_every)):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be >= 1, got {value}.")
        if not 0 < self.floor <= 1:
            raise ValueError(
                f"`floor` must be in (0, 1], got {self.floor}: a noise level that is never drawn would bias."
            )

    def _evidence(self, given: Evidence | None, bins: int | None, reduce: Reduce | None) -> Evidence:
        history = self.rule.history
        if given is not None:
            if bins is not None or reduce is not None:
                raise ValueError("Give `evidence`, or `bins` and `reduce`: it has its own.")
            if isinstance(given, LossHistory) and history is None:
                raise ValueError(
                    f"`evidence` is a LossHistory, which lacks the moments that the rule {self.rule} wants."
                )
            return given
        if bins is None:
            per_timestep = history is not None and isinstance(self.schedule, DiscreteSchedule)
            bins = len(self.schedule.grid()) if per_timestep else BINS
        end = torch.tensor([LIMIT], dtype=torch.float64)
        edges = torch.cat((-end, self._quantiles.edges(bins), end))
        if history is None:
            return LossVarianceTracker(edges=edges, reduce=reduce)
        return LossHistory(edges, history, reduce=reduce)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.rule.of!r}, {self.mode!r}, {len(self._mass)} bins, {self.density!r})"

    @torch.no_grad()
    def update(
        self, t: Tensor, loss: Tensor, *, weight: Tensor | None = None, gradient_square: Tensor | None = None
    ) -> None:
        """Add what a batch has cost. Negative losses and squared norms count as not finite.

        Args:
            t: (B,) timesteps.
            loss: (B,) losses, unweighted.
            weight: (B,) of the weighting, without the factors of this sampler.
            gradient_square: (B,) squared norms of the gradients of the unweighted losses at the model's output; default
                what they are for a mean squared error, up to a constant: the losses.

        Raises:
            ValueError: the shapes are not all (B,).
        """
        for name, value in (("loss", loss), ("weight", weight), ("gradient_square", gradient_square)):
            if value is not None and (value.ndim != 1 or value.shape != t.shape):
                raise ValueError(
                    f"`{name}` must have the shape (B,) of `t`, {tuple(t.shape)}, got {tuple(value.shape)}."
                )
        loss = torch.where(loss < 0, torch.nan, loss)
        log_snr = self.schedule.log_snr(t)
        square = loss if gradient_square is None else torch.where(gradient_square < 0, torch.nan, gradient_square)
        if self.optimum is not None:
            loss = loss - self.optimum(log_snr)
        if weight is not None:
            loss, square = loss * weight, square * weight.square()
        if self._fades and self.evidence.decay is None:  # type: ignore[union-attr]
            # by samples, as many as the first batch has: bins would never see enough of small batches otherwise
            batch = len(t) * self._options["world_size"]
            self.evidence.decay = math.exp(-batch / (MEMORY * len(self._mass)))  # type: ignore[union-attr]
        self.evidence.update(loss, log_snr, gradient_square=square)

    def sync(self) -> None:
        """Add up what all processes have seen; with ``reduce`` a collective."""
        self.evidence.sync()

    def refresh(self) -> None:
        """Compute q anew from what was seen; on several processes a collective. ``draw`` calls it."""
        self.evidence.sync()
        statistics = self.evidence.compute(device=None)
        self._move(statistics.count.device)
        # once known a bin stays so, even where it is drawn so seldom that its moments fade
        self._known = self._known | (statistics.count >= self._enough)
        root = self._root(statistics)
        mean = (self._mass * root).sum()
        tilt = (1 - self.floor) * root / mean + self.floor
        learned = mean > 0
        if self.rule.history is not None:
            learned = learned & (self._known | (self._mass == 0)).all()
        self._tilt = torch.where(learned, tilt, torch.ones_like(tilt))

    def _root(self, statistics: LossStatistics) -> Tensor:
        """Return the rule's root per bin; a bin that has seen too little counts as the average of the others."""
        root = self.rule.root(statistics)
        mass = self._mass.to(root)
        known = self._known.to(root.device) & root.isfinite() & (mass > 0)
        known_mass = torch.where(known, mass, 0.0)
        average = (known_mass * torch.where(known, root, 0.0)).sum() / known_mass.sum()
        return torch.where(known, root, average)

    def _move(self, device: torch.device) -> None:
        if self._tilt.device != device:
            dtype = exact_dtype(device)
            self._inner, self._mass, self._tilt = (x.to(device, dtype) for x in (self._inner, self._mass, self._tilt))
            self._known = self._known.to(device)

    def draw(self, batch_size: int, *, index: int | None = None, device: torch.device | str = "cpu") -> Draw:
        """Draw a batch; see ``TimestepSampler.draw``. Every ``refresh_every`` batches q is computed anew first."""
        if (self.drawn if index is None else index) % self.refresh_every == 0:
            self.refresh()
        return super().draw(batch_size, index=index, device=device)

    def at(self, u: Tensor) -> Draw:
        """Return what uniform numbers ``u`` (B,) draw from q, or from p in the mode ``reweight``."""
        self._move(u.device)
        return super().at(self._through_q(u) if self.mode != "reweight" else u)

    def _through_q(self, u: Tensor) -> Tensor:
        """Turn quantiles of q into quantiles of p."""
        q = self._mass * self._tilt
        upper = q.cumsum(0)
        u = inside(u) * upper[-1]
        bin = torch.bucketize(u, upper[:-1], right=True)
        fraction = ((u - (upper - q)[bin]) / q[bin]).clamp(0, 1)
        return (self._mass.cumsum(0) - self._mass)[bin] + fraction * self._mass[bin]

    def weight(self, t: Tensor) -> Tensor:
        """Return the factors (B,), float32, on the losses of timesteps ``t`` (B,)."""
        self._move(t.device)
        return self._factors(self._tilt)[torch.bucketize(self.schedule.log_snr(t), self._inner)].float()

    def _factors(self, tilt: Tensor) -> Tensor:
        """Return the weights of draws by bin."""
        return {"resample": 1 / tilt, "reweight": tilt, "uncorrected": torch.ones_like(tilt)}[self.mode]

    def probabilities(self) -> tuple[Tensor, Tensor]:
        """Return the probability of each bin under p and under q, (bins,) each, on the CPU."""
        return self._mass.cpu(), (self._mass * self._tilt).cpu()

    def predicted(self) -> Prediction:
        """Return what the statistics up to now say of the draws; reads them off the device."""
        square = self._root(self.evidence.compute()).square()
        mass, tilt = self._mass.to(square), self._tilt.to(square)
        drawn, weight = mass if self.mode == "reweight" else mass * tilt, self._factors(tilt)
        spread = drawn * weight**2
        return Prediction(
            of=self.rule.of,
            ratio=float((spread * square).sum() / (mass * square).sum()),
            effective_sample_size=float(1 / spread.sum()),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Return q, the evidence and the count of draws.

        With ``reduce`` the evidence is that up to the last ``sync``. A history is that of this process alone.
        """
        own = {"tilt": self._tilt.cpu().clone(), "known": self._known.cpu().clone()}
        evidence = {_PREFIX + name: value for name, value in self.evidence.state_dict().items()}
        return {**super().state_dict(), **own, **evidence}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a state, on every process.

        Raises:
            ValueError: it is damaged, or of a sampler with other bins.
        """
        own = {name: value for name, value in state.items() if not name.startswith(_PREFIX)}
        if set(own) != {"drawn", "tilt", "known"}:
            raise ValueError(f"Not the state of an ImportanceSampler: it has {sorted(state)}.")
        tilt, known = own["tilt"].to("cpu", torch.float64), own["known"].to("cpu", torch.bool)
        mean = float((self._mass.cpu() * tilt).sum()) if tilt.shape == known.shape == self._mass.shape else math.nan
        if not abs(mean - 1) < 1e-4 or not bool((tilt > 0).all()):
            raise ValueError(
                f"The state of the ImportanceSampler is damaged or of other bins: `tilt` has shape "
                f"{tuple(tilt.shape)} and mean {mean}; {tuple(self._mass.shape)} and 1 are wanted."
            )
        drawn = whole(own["drawn"])
        self.evidence.load_state_dict(
            {name.removeprefix(_PREFIX): value for name, value in state.items() if name.startswith(_PREFIX)}
        )
        self.drawn, self._tilt, self._known = drawn, tilt.to(self._mass), known.to(self._mass.device)
