"""Uniform numbers of a step: each exactly uniform, antithetic or stratified over all processes and micro-batches."""

import itertools

import pytest
import torch
from scipy import stats

from snrweights.uniforms import DRAWS, uniforms


def step(draws, batch_size=4, world_size=1, accumulation=1, step=0, seed=3):
    """All numbers of an optimizer step, as its processes draw them one after the other."""
    places = itertools.product(range(accumulation), range(world_size))
    options = {"seed": seed, "world_size": world_size, "accumulation": accumulation}
    parts = (uniforms(batch_size, draws, index=step * accumulation + i, rank=rank, **options) for i, rank in places)
    return torch.cat(list(parts))


@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize("batch_size", [1, 4, 5])
def test_each_number_is_uniform_by_itself(draws, batch_size):
    u = torch.stack([uniforms(batch_size, draws, seed=1, index=index) for index in range(3000)])
    assert u.dtype == torch.float64
    assert ((u >= 0) & (u <= 1)).all()
    for slot in u.T:
        assert stats.kstest(slot.numpy(), "uniform").pvalue > 1e-3


def test_independent_numbers_are_not_correlated():
    u = torch.stack([uniforms(2, "independent", index=index) for index in range(3000)])
    assert abs(torch.corrcoef(u.T)[0, 1]) < 4 / 3000**0.5


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_antithetic_numbers_are_pairs_over_the_whole_step(world_size, accumulation):
    u = step("antithetic", 4, world_size, accumulation).sort().values
    torch.testing.assert_close(u + u.flip(0), torch.ones_like(u), rtol=0, atol=1e-15)


def test_of_an_odd_count_one_number_has_no_partner():
    u = step("antithetic", 7)
    assert len(u) == 7
    assert ((u[:, None] + u - 1).abs().min(1).values < 1e-15).sum() == 6


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("batch_size", [1, 4, 5])
def test_stratified_numbers_are_one_in_each_interval_of_the_whole_step(batch_size, world_size, accumulation):
    u = step("stratified", batch_size, world_size, accumulation)
    assert (u * len(u)).floor().sort().values.tolist() == list(range(len(u)))


@pytest.mark.parametrize("draws", ["antithetic", "stratified"])
def test_the_order_is_random(draws):
    u = torch.stack([step(draws, 6, step=index) for index in range(500)])
    assert abs(torch.corrcoef(torch.stack((u.flatten(), torch.arange(6.0).repeat(500))))[0, 1]) < 4 / 3000**0.5


@pytest.mark.parametrize("draws", DRAWS)
def test_processes_and_micro_batches_share_the_numbers_of_one_process(draws):
    one = step(draws, 24, step=5)
    for world_size, accumulation in [(2, 1), (1, 3), (4, 3), (24, 1)]:
        parts = step(draws, 24 // (world_size * accumulation), world_size, accumulation, step=5)
        assert torch.equal(parts, one)


@pytest.mark.parametrize("draws", DRAWS)
def test_numbers_are_a_function_of_seed_and_index(draws):
    assert torch.equal(step(draws, step=7), step(draws, step=7))
    assert not torch.equal(step(draws, step=7), step(draws, step=8))
    assert not torch.equal(step(draws, seed=1), step(draws, seed=2))


def test_the_generators_of_the_script_are_left_alone():
    before = torch.get_rng_state()
    uniforms(4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"draws": "sobol"}, "`draws` must be one of ['independent', 'antithetic', 'stratified'], got 'sobol'."),
        ({"batch_size": 0}, "`batch_size` must be >= 1, got 0."),
        ({"world_size": 0}, "`world_size` must be >= 1, got 0."),
        ({"accumulation": -1}, "`accumulation` must be >= 1, got -1."),
        ({"rank": 2, "world_size": 2}, "`rank` must be in [0, 2), got 2."),
        ({"rank": -1}, "`rank` must be in [0, 1), got -1."),
        ({"seed": -1}, "`seed` must be >= 0, got -1."),
        ({"index": -1}, "`index` must be >= 0, got -1."),
    ],
)
def test_a_bad_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match="must be") as raised:
        uniforms(**{"batch_size": 4, **arguments})
    assert str(raised.value) == message
