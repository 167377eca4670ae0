"""The last losses of every noise level, against deques."""

import collections
import math

import numpy as np
import pytest
import torch
from cases import NoHostSync

from snrweights.history import LossHistory

EDGES = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0])


def by_deques(batches, length):
    """The last losses per bin, oldest first."""
    kept = [collections.deque(maxlen=length) for _ in range(len(EDGES) - 1)]
    for loss, log_snr in batches:
        for value, place in zip(loss.tolist(), torch.bucketize(log_snr, EDGES[1:-1]).tolist(), strict=True):
            if math.isfinite(value):
                kept[place].append(value)
    return kept


def batches(count, size, seed=0, nonfinite=0.0):
    g = torch.Generator().manual_seed(seed)
    for _ in range(count):
        loss = torch.rand(size, generator=g, dtype=torch.float64)
        bad = torch.rand(size, generator=g) < nonfinite
        yield torch.where(bad, torch.nan, loss), 2 * torch.randn(size, generator=g)


@pytest.mark.parametrize("size", [1, 3, 8, 100])
@pytest.mark.parametrize("length", [1, 4, 10])
def test_moments_are_those_of_the_last_losses(size, length):
    data = list(batches(60, size, nonfinite=0.1))
    history = LossHistory(EDGES, length)
    for seen, (loss, log_snr) in enumerate(data, start=1):
        history.update(loss, log_snr)
        if seen % 7 == 0 or seen == len(data):
            history.sync()
            result, kept = history.compute(), by_deques(data[:seen], length)
            full = [len(values) == length for values in kept]
            assert result.count.tolist() == [length if is_full else 0 for is_full in full]
            for place in np.flatnonzero(full):
                assert result.mean[place] == pytest.approx(np.mean(kept[place]), rel=1e-12)
                assert result.second_moment[place] == pytest.approx(np.mean(np.square(kept[place])), rel=1e-12)
                assert result.variance[place] == pytest.approx(np.var(kept[place]), rel=1e-9, abs=1e-15)
    assert any(full)
    assert result.nonfinite.sum() == sum(int(loss.isnan().sum()) for loss, _ in data)


def test_of_more_than_it_keeps_in_one_batch_the_last_stay():
    history = LossHistory(EDGES, 2)
    history.update(torch.tensor([5.0, 1.0, 6.0, 2.0, 7.0, 3.0]), torch.tensor([0.5, -0.5] * 3))
    history.sync()
    assert history.compute().mean[1:3].tolist() == [2.5, 6.5]


def test_an_empty_batch_and_an_unknown_log_snr_add_nothing():
    history = LossHistory(EDGES, 1)
    history.update(torch.empty(0), torch.empty(0))
    history.update(torch.tensor([1.0]), torch.tensor([math.nan]))
    history.update(torch.tensor([2.0, 3.0]), torch.tensor([-math.inf, math.inf]))
    history.sync()
    assert history.compute().count.tolist() == [1, 0, 0, 1]
    assert history.compute().nonfinite.sum() == 1


def test_nothing_counts_before_a_sync():
    history = LossHistory(EDGES, 1)
    history.update(torch.ones(1), torch.zeros(1))
    assert history.compute().count.sum() == 0


def test_two_processes_count_a_bin_when_both_have_filled_it():
    moments = []
    histories = [LossHistory(EDGES, 2, reduce=lambda x: moments.append(x) or x) for _ in range(2)]
    histories[0].update(torch.tensor([1.0, 2.0, 9.0, 9.0]), torch.tensor([-0.5, -0.5, 0.5, 0.5]))
    histories[1].update(torch.tensor([3.0, 6.0, 9.0]), torch.tensor([-0.5, -0.5, 0.5]))
    for history in histories:
        history.sync()
    total = sum(moments)
    for history in histories:
        history.reduce = lambda x: total
        history.sync()
        result = history.compute()
        assert result.count.tolist() == [0, 4, 0, 0]
        assert (result.mean[1], result.variance[1]) == (3, np.var([1, 2, 3, 6]))


def test_it_neither_waits_for_the_device_nor_grows():
    history = LossHistory(EDGES, 3)
    before = {name: value.shape for name, value in history.state_dict().items()}
    with NoHostSync():
        for loss, log_snr in batches(500, 8):
            history.update(loss.requires_grad_(), log_snr)
        history.sync()
        history.compute(device=None)
    after = history.state_dict()
    assert {name: value.shape for name, value in after.items()} == before
    assert not any(value.requires_grad for value in after.values())


def test_a_state_continues_bit_equal_and_is_a_copy():
    history, other = LossHistory(EDGES, 4), LossHistory(EDGES, 4)
    data = list(batches(20, 5))
    for batch in data[:10]:
        history.update(*batch)
    history.sync()
    state = history.state_dict()
    other.load_state_dict(state)
    for either in (history, other):
        for batch in data[10:]:
            either.update(*batch)
        either.sync()
    for name, value in history.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert not torch.equal(state["losses"], history.state_dict()["losses"])


def filled(**changes):
    history = LossHistory(EDGES, 2)
    history.update(torch.rand(64), 2 * torch.randn(64))
    history.sync()
    return {**history.state_dict(), **changes}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "Not the state of a LossHistory: it has []"),
        ({**filled(), "more": torch.ones(1)}, "Not the state of a LossHistory: it has ['edges', 'losses', 'moments'"),
        (filled(losses=torch.full((5, 2), math.nan)), "damaged or another's: 'losses' has shape (5, 2)"),
        (filled(losses=torch.zeros(5, 3)), "damaged or another's: 'losses' has shape (5, 3), not (5, 2)"),
        (filled(seen=torch.tensor([1, 2, -1, 0, 0])), "damaged or another's: 'seen' has shape (5,)"),
        (filled(moments=torch.full((6, 4), math.inf)), "damaged or another's: 'moments' has shape (6, 4)"),
        (filled(edges=EDGES + 1), "The state has other bins: [-8.0, 0.0, 1.0, 2.0, 10.0]"),
    ],
)
def test_a_damaged_state_is_refused(state, message):
    history = LossHistory(EDGES, 2)
    history.update(torch.ones(1), torch.zeros(1))
    before = history.state_dict()
    with pytest.raises(ValueError, match="state") as raised:
        history.load_state_dict(state)
    assert message in str(raised.value)
    assert all(torch.equal(value, before[name]) for name, value in history.state_dict().items())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LossHistory(torch.tensor([1.0])), "`edges` must be (bins + 1,) and rise, got [1.0]."),
        (lambda: LossHistory(torch.tensor([1.0, 1.0])), "`edges` must be (bins + 1,) and rise, got [1.0, 1.0]."),
        (lambda: LossHistory(EDGES, 0), "`length` must be >= 1, got 0."),
        (
            lambda: LossHistory(EDGES).update(torch.ones(2), torch.ones(3)),
            "`loss` and `log_snr` must both have shape (B,), got (2,) and (3,).",
        ),
        (
            lambda: LossHistory(EDGES).update(torch.ones(2, 1), torch.ones(2, 1)),
            "`loss` and `log_snr` must both have shape (B,), got (2, 1) and (2, 1).",
        ),
    ],
)
def test_a_bad_argument_is_named(build, message):
    with pytest.raises(ValueError, match="must") as raised:
        build()
    assert str(raised.value) == message


def test_in_inference_mode_it_stays_fit_for_training():
    with torch.inference_mode():
        history = LossHistory(EDGES, length=2)
    history.update(torch.ones(4), torch.tensor([-2.0, -2.0, 2.0, 2.0]))
    with torch.inference_mode():
        history.sync()
        history.load_state_dict(history.state_dict())
    history.update(torch.ones(1), torch.zeros(1))
    history.sync()
    assert history.compute().count.tolist() == [2, 0, 0, 2]
