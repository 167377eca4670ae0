"""Moments of a training step's gradient over all parameters, at fixed weights: of single samples, and of batches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from snrweights.integrations.processes import Process
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector
from tqdm.auto import tqdm

import snrweights
from snrweights.samplers import Draw
from snrweights.seeds import generator, seed_of
from snrweights.uniforms import Draws

TRAINING, EVIDENCE, MEASUREMENT = range(201, 204)  # streams of random numbers, beside the seed
BINS = 32  # of equal mass under the base density, in which mean gradients are kept
CHUNK = 50  # gradients of single samples in memory at once
POINTS = 64  # quantiles per sample of a batch on which means over draws are taken


@dataclass
class Case:
    """A model and the objective whose gradient is estimated. Images and noise are functions of (seed, stream, index).

    Attributes:
        model: called with (x, t).
        process: noises and says the target.
        weight: of the objective, on the loss of a timestep.
        images: (N, C, H, W) in [-1, 1].
        seed: of images and noise.
    """

    model: nn.Module
    process: Process
    weight: snrweights.BoundWeighting
    images: Tensor
    seed: int = 0

    def noisy(self, t: Tensor, stream: int, index: int) -> tuple[Tensor, Tensor]:
        """Return noisy images (B, C, H, W) at timesteps ``t`` (B,) and the targets."""
        numbers = generator(self.seed, stream, index)
        images = self.images[torch.randint(len(self.images), (len(t),), generator=numbers)]
        noise = torch.randn(images.shape, generator=numbers)
        return self.process.noisy_and_target(images, noise, self.process.schedule.log_snr(t))

    def backward(self, drawn: Draw, stream: int, index: int) -> None:
        """Add the gradient of one batch to the parameters'."""
        x, target = self.noisy(drawn.t, stream, index)
        losses = snrweights.per_sample_mse(self.model(x, drawn.t), target)
        (self.weight(drawn.t) * drawn.weight * losses).mean().backward()

    def sampler(self, stream: int, draws: Draws) -> snrweights.TimestepSampler:
        """Return a sampler from the base density."""
        seed = seed_of(self.seed, stream)
        return snrweights.TimestepSampler(self.process.schedule, self.process.density, draws=draws, seed=seed)


@dataclass
class Evidence:
    """Losses and gradients of single samples, their timesteps spread evenly over the base density.

    Attributes:
        t: (n,) timesteps.
        loss: (n,) unweighted.
        square: (n,) squared norms of the unweighted losses' gradients over all parameters.
        weight: (n,) of the objective.
        edges: (BINS - 1,) between bins of equal mass, in log-SNR.
        gram: (BINS, BINS) inner products of the weighted losses' mean gradients, without bias.
    """

    t: Tensor
    loss: Tensor
    square: Tensor
    weight: Tensor
    edges: Tensor
    gram: Tensor

    @cached_property
    def of_objective(self) -> Tensor:
        """Squared norms (n,) of the gradients of the weighted losses."""
        return self.square * self.weight.double().square()


def collect(case: Case, samples: int) -> Evidence:
    """Take the gradient of every sample by itself."""
    t = case.sampler(EVIDENCE, "stratified").draw(samples).t
    weight, log_snr = case.weight(t), case.process.schedule.log_snr(t)
    edges = log_snr.sort().values[torch.arange(1, BINS) * samples // BINS]
    bins = torch.bucketize(log_snr, edges)
    parameters = {name: value.detach() for name, value in case.model.named_parameters()}

    def loss_of(parameters: dict[str, Tensor], x: Tensor, target: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        prediction = functional_call(case.model, parameters, (x[None], t[None]))
        loss = (prediction[0] - target).square().mean()
        return loss, loss

    gradients_of = vmap(grad(loss_of, has_aux=True), (None, 0, 0, 0))
    losses, squares = torch.empty(samples), torch.empty(samples, dtype=torch.float64)
    sums = torch.zeros(BINS, sum(value.numel() for value in parameters.values()))
    for index, here in enumerate(tqdm(torch.arange(samples).split(CHUNK), desc="Single samples", mininterval=1)):
        with sdpa_kernel(SDPBackend.MATH):  # the other kernels are not batched over samples
            found, losses[here] = gradients_of(parameters, *case.noisy(t[here], EVIDENCE, index), t[here])
        flat = torch.cat([part.flatten(1) for part in found.values()], 1)
        squares[here] = flat.square().sum(1).double()
        sums.index_add_(0, bins[here], weight[here, None] * flat)
    count = bins.bincount(minlength=BINS).double()
    own = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, squares * weight.double().square())
    products = (sums @ sums.T).double()
    gram = products / count.outer(count)
    gram.diagonal().copy_((products.diagonal() - own) / (count * (count - 1)))  # without a sample times itself
    return Evidence(t, losses, squares, weight, edges, gram)


def explained(sampler: snrweights.TimestepSampler, evidence: Evidence, batch_size: int) -> dict[str, float]:
    """Return, by way of drawing, what leaves the second moment of a sample's gradient, from the bins' mean gradients.

    With a(u) the mean gradient at the quantile u, importance weight included: independent draws leave out |E a|²,
    stratified ones the mean over strata of |E[a | stratum]|², and antithetic ones 2 |E a|² - E a(u) a(1 - u).
    """
    u = (torch.arange(batch_size * POINTS, dtype=torch.float64) + 0.5) / (batch_size * POINTS)
    t, weight = sampler.at(u)
    bins = torch.bucketize(sampler.schedule.log_snr(t), evidence.edges)
    a = nn.functional.one_hot(bins, BINS) * weight.double()[:, None]

    def product(one: Tensor, other: Tensor) -> float:
        return float(((one @ evidence.gram) * other).sum(1).mean())

    mean, strata = a.mean(0, keepdim=True), a.unflatten(0, (batch_size, POINTS)).mean(1)
    return {
        "independent": product(mean, mean),
        "antithetic": 2 * product(mean, mean) - product(a, a.flip(0)),
        "stratified": product(strata, strata),
    }


def measure(case: Case, sampler: snrweights.TimestepSampler, batch_size: int, groups: int, batches: int) -> Tensor:
    """Return batch size times the trace of the covariance of a batch's gradient, without bias: one value a group.

    Images, noise and uniform numbers are the same for every sampler, so that ratios are known better than values.
    """
    traces = torch.empty(groups, dtype=torch.float64)
    for group in range(groups):
        total, squares = 0.0, 0.0
        for index in range(group * batches, (group + 1) * batches):
            case.model.zero_grad()
            case.backward(sampler.draw(batch_size, index=index), MEASUREMENT, index)
            gradient = parameters_to_vector(parameter.grad for parameter in case.model.parameters()).double()
            total, squares = total + gradient, squares + gradient.square().sum()
        traces[group] = batch_size * (squares - total.square().sum() / batches) / (batches - 1)
    return traces


def ratio_of(traces: Tensor, base: Tensor) -> tuple[float, float]:
    """Return the ratio of the means of two paired measurements (groups,), and its standard error by the jackknife."""
    groups = len(traces)
    without_one = (traces.sum() - traces) / (base.sum() - base)
    error = ((groups - 1) * without_one.var(correction=0)).sqrt()
    return float(traces.sum() / base.sum()), float(error)


def density_of(sampler: snrweights.TimestepSampler, evidence: Evidence) -> tuple[Tensor, Tensor]:
    """Return the density over log-SNR that a sampler draws from, in the evidence's bins (BINS,), and their edges."""
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    drawn, seen = sampler.schedule.log_snr(sampler.at(u).t), sampler.schedule.log_snr(evidence.t)
    mass = torch.bucketize(drawn, evidence.edges).bincount(minlength=BINS) / len(u)
    edges = torch.cat((seen.min()[None], evidence.edges, seen.max()[None]))
    return mass / edges.diff(), edges
