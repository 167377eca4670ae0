"""The bins that an ``ImportanceSampler`` counts in, on tables of timesteps."""

import math

import pytest
import torch

from snrweights import DiscreteSchedule, ImportanceSampler, LossVarianceTracker
from snrweights.densities import Normal


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("steps", [12, 50, 997, 1000])
def test_a_rule_with_a_history_has_a_bin_for_each_timestep(steps, zero_snr):
    schedule = DiscreteSchedule.from_name("linear", steps, rescale_betas_zero_snr=zero_snr)
    sampler = ImportanceSampler(schedule, "loss_second_moment", warm_up=1)
    p, _ = sampler.probabilities()
    torch.testing.assert_close(p, torch.full((steps,), 1 / steps, dtype=torch.float64))
    t = torch.arange(steps)
    losses = torch.rand(steps, generator=torch.Generator().manual_seed(0)) + 0.1
    for _ in range(10):
        sampler.update(t, losses)
    sampler.refresh()
    wanted = 0.999 * losses.double() / losses.double().sum() + 0.001 / steps
    torch.testing.assert_close(sampler.probabilities()[1].flip(0), wanted)
    torch.testing.assert_close(sampler.weight(t), (1 / steps / wanted).float())


@pytest.mark.parametrize("density", [None, Normal(0.0, 2.0)])
@pytest.mark.parametrize("steps", [12, 31, 33, 1000])
def test_other_rules_have_bins_of_nearly_equal_mass(steps, density):
    schedule = DiscreteSchedule.from_name("linear", steps)
    sampler = ImportanceSampler(schedule, "gradient", density=density)
    p, _ = sampler.probabilities()
    assert len(p) == min(32, steps) if density is None else len(p) <= 32
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    if density is None:
        assert p.min() >= 1 / steps - 1e-12
    if steps == 1000:
        assert p.max() < 1.2 / 32
        assert p.min() > 0.8 / 32


@pytest.mark.parametrize("rows", [1, 4, 256])
@pytest.mark.parametrize("world_size", [1, 2])
def test_batches_of_any_size_are_learned_from(rows, world_size):
    """Old losses fade by the number of samples and not of batches, of which small ones would never make a bin known."""
    sampler = ImportanceSampler("linear", "gradient", bins=8, world_size=world_size, refresh_every=50)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5000 // rows // world_size):
        t = torch.randint(0, 1000, (world_size, rows), generator=generator)
        sampler.update(t.flatten()[:rows], 1.0 + t.flatten()[:rows])
    sampler.refresh()
    _, q = sampler.probabilities()
    assert q[0] > 1.4 / 8  # the noisiest
    assert q[-1] < 0.6 / 8
    batch, memory = rows * world_size, 100 * 8
    counted = sampler.evidence.compute().count.sum().item() * world_size
    assert counted == pytest.approx(batch / (1 - math.exp(-batch / memory)), rel=0.01)


def test_a_tracker_of_ones_own_fades_as_it_says():
    evidence = LossVarianceTracker(4, decay=0.5)
    sampler = ImportanceSampler("linear", evidence=evidence)
    sampler.update(torch.tensor([500]), torch.ones(1))
    assert evidence.decay == 0.5
