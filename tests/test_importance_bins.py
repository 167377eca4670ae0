"""The bins that an ``ImportanceSampler`` counts in, on tables of timesteps."""

import pytest
import torch

from snrweights import DiscreteSchedule, ImportanceSampler
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
