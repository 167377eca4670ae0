"""A tracker on several processes, one after the other in this one; tests/distributed has real ones."""

import math
from contextlib import suppress
from itertools import pairwise

import pytest
import torch

from snrweights import LossVarianceTracker

STATISTICS = ("count", "mean", "variance", "second_moment", "gradient_square", "nonfinite")
OPTIONS = [{}, {"decay": 0.9}, {"window": 2}, {"snapshot_every": 2}, {"decay": 0.9, "snapshot_every": 1}]


def batch(size, seed):
    """Losses, log-SNR and squared norms of gradients, some of them not finite."""
    generator = torch.Generator().manual_seed(seed)
    loss, log_snr, square = torch.rand(3, size, generator=generator, dtype=torch.float64)
    loss[:: 7 + seed], square[1 :: 5 + seed] = math.inf, math.nan
    return loss, 20 * log_snr - 10, square


def update(tracker, losses, log_snr, square):
    tracker.update(losses, log_snr, gradient_square=square)


class Captured(Exception):
    """Ends a reduction where the tensor has been seen."""


def sync(*trackers):
    """Sync trackers as if each were on a process of its own; return the tensors that they gave to the collective."""
    given = []

    def capture(tensor):
        given.append(tensor)
        raise Captured

    for tracker in trackers:
        tracker.reduce = capture
        with suppress(Captured):
            tracker.sync()
    for tracker in trackers:
        tracker.reduce = lambda tensor: torch.stack(given).sum(0)
        tracker.sync()
    assert len(given) == len(trackers)
    return given


def on_processes(number, **options):
    def unused(tensor):
        raise AssertionError("a collective outside of sync")

    return [LossVarianceTracker(reduce=unused, **options) for _ in range(number)]


def assert_equal(found, expected, rtol=1e-12):
    for name in STATISTICS:
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=rtol, atol=rtol, equal_nan=True, msg=name
        )


def assert_same_state(one, other):
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sizes", [(30, 30, 30), (30, 11, 4), (30, 7, 0)], ids=str)
def test_uneven_batches_are_those_of_one_process(options, sizes):
    """The last of each process may be smaller, or empty."""
    one, several = LossVarianceTracker(**options), on_processes(3, **options)
    for i in range(8):
        batches = [batch(size if i in (3, 7) else 30, 3 * i + rank) for rank, size in enumerate(sizes)]
        update(one, *(torch.cat(parts) for parts in zip(*batches, strict=True)))
        for tracker, own in zip(several, batches, strict=True):
            update(tracker, *own)
        if i % 2:
            sync(*several)
    for tracker in several:
        assert_equal(tracker.compute(), one.compute())
        assert_same_state(tracker, several[0])
        for (step, found), (expected_step, expected) in zip(tracker.history(), one.history(), strict=True):
            assert step == expected_step
            assert_equal(found, expected)
    assert int(one.compute().nonfinite.sum()) > 0
    assert bool(options.get("snapshot_every")) == bool(one.history())


@pytest.mark.parametrize("options", [{}, {"snapshot_every": 2}], ids=str)
def test_a_process_may_have_made_fewer_updates(options):
    one, several = LossVarianceTracker(), on_processes(2, **options)
    for rank, tracker in enumerate(several):
        for i in range(6 - 3 * rank):
            update(one, *batch(20, 10 * rank + i))
            update(tracker, *batch(20, 10 * rank + i))
    given = sync(*several)
    assert given[0].shape == given[1].shape  # or the collective would wait for ever
    for tracker in several:
        assert_equal(tracker.compute(), one.compute())
        assert tracker.updates == 5  # of 4.5
        assert_same_state(tracker, several[0])
    history = several[0].history()
    assert [step for step, _ in history] == ([2, 4] if options else [])
    if options:  # at update 4 the second process had seen its 3
        seen = LossVarianceTracker()
        for seed in (0, 1, 2, 3, 10, 11, 12):
            update(seen, *batch(20, seed))
        assert_equal(history[1][1], seen.compute())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_processes_agree_whatever_each_has_done(options):
    """With different numbers of updates, or none, they fade by their mean number and forget at the same time."""
    several = on_processes(3, **options)
    for syncs in range(1, 6):
        for rank, tracker in enumerate(several):
            for i in range(rank * syncs % 4):
                update(tracker, *batch(20, 100 * syncs + 10 * rank + i))
        sync(*several)
        for tracker in several[1:]:
            assert_same_state(tracker, several[0])
            assert tracker.updates == several[0].updates
    steps = [step for step, _ in several[0].history()]
    assert all(low < high for low, high in pairwise(steps))
    assert all(step % options.get("snapshot_every", 1) == 0 for step in steps)


def test_what_all_have_seen_fades_by_the_mean_number_of_updates():
    first, second = on_processes(2, bins=1, decay=0.5)
    first.update(torch.ones(4), torch.zeros(4))
    second.update(torch.ones(4), torch.zeros(4))
    sync(first, second)
    assert first.compute().count.item() == 8
    for _ in range(4):
        first.update(torch.empty(0), torch.empty(0))
    assert first.compute().count.item() == 8 / 16  # as far as this process knows
    sync(first, second)
    assert first.compute().count.item() == second.compute().count.item() == 8 / 4


def test_between_two_syncs_a_process_adds_its_own():
    tracker, other = on_processes(2, bins=1, snapshot_every=1)
    for each in (tracker, other):
        each.update(torch.ones(1), torch.zeros(1))
    sync(tracker, other)
    tracker.update(torch.ones(1), torch.zeros(1))
    assert tracker.compute().count.item() == 3
    assert [(step, int(statistics.count)) for step, statistics in tracker.history()] == [(1, 2), (2, 3)]
    state = tracker.state_dict()
    assert state["moments"][0].item() == 2  # or all processes would take over what one has seen
    assert state["snapshot_steps"].tolist() == [1]
    assert state["updates"].tolist() == [1, 0]


def test_a_snapshot_by_hand_is_of_all_processes():
    trackers = on_processes(2, bins=1)
    for tracker in trackers:
        tracker.update(torch.ones(3), torch.zeros(3))
    given = sync(*trackers)
    for tracker in trackers:
        tracker.update(torch.ones(1), torch.zeros(1))
        calls = []
        tracker.reduce = lambda tensor, calls=calls: calls.append(tensor) or 2 * tensor
        tracker.snapshot(70)
        assert len(calls) == 1
        assert calls[0].shape == given[0].shape
        assert [(step, int(statistics.count)) for step, statistics in tracker.history()] == [(70, 8)]


def test_snapshots_of_a_long_run_are_as_many_and_the_same_on_all():
    one, several = LossVarianceTracker(bins=1, snapshot_every=1), on_processes(2, bins=1, snapshot_every=1)
    for i in range(900):
        for tracker in (one, *several):
            tracker.update(torch.ones(1), torch.zeros(1))
        if i % 100 == 99:
            sync(*several)
    assert [step for step, _ in several[0].snapshots] == [step for step, _ in one.snapshots]
    assert [2 * step for step, _ in one.snapshots] == [int(moments[0]) for _, moments in several[1].snapshots]


def test_of_too_many_snapshots_between_two_syncs_the_first_are_kept():
    several = on_processes(2, bins=1, snapshot_every=1)
    for rank, tracker in enumerate(several):
        for _ in range(300 + rank):
            tracker.update(torch.ones(1), torch.zeros(1))
    given = sync(*several)
    assert given[0].shape == given[1].shape == (2 + 256, 6, 1)
    for tracker in several:
        assert [step for step, _ in tracker.snapshots] == list(range(1, 257))
        assert tracker.updates == 301
        tracker.update(torch.ones(1), torch.zeros(1))
    sync(*several)
    assert several[0].compute().count.item() == 603
    assert several[0].snapshots[-1][0] == several[1].snapshots[-1][0]


def test_the_collective_is_small_without_snapshots():
    assert [given.shape for given in sync(*on_processes(2))] == [(2, 6, 40)] * 2


# merge ----------------------------------------------------------------------------------------------------------------


def test_merged_trackers_are_those_of_one_process(tmp_path):
    options = {"unit": "epsilon", "snapshot_every": 2}
    one, several = LossVarianceTracker(**options), [LossVarianceTracker(**options) for _ in range(2)]
    for i in range(6):
        batches = [batch(20 + rank, 10 * i + rank) for rank in range(2)]
        update(one, *(torch.cat(parts) for parts in zip(*batches, strict=True)))
        for tracker, own in zip(several, batches, strict=True):
            update(tracker, *own)
    merged = LossVarianceTracker.merge(several)
    merged.save(tmp_path / "tracker.safetensors")
    for tracker in (merged, LossVarianceTracker.load(tmp_path / "tracker.safetensors")):
        assert tracker.unit == "epsilon"
        assert tracker.updates == 6
        assert_equal(tracker.compute(), one.compute())
        for (step, found), (expected_step, expected) in zip(tracker.history(), one.history(), strict=True):
            assert step == expected_step
            assert_equal(found, expected)
    update(several[0], *batch(20, 0))
    update(several[0], *batch(20, 0))
    merged = LossVarianceTracker.merge(several)
    assert [step for step, _ in merged.history()] == [2, 4, 6]  # the other has no update 8
    assert merged.updates == 8
    assert_equal(LossVarianceTracker.merge(several[:1]).compute(), several[0].compute())


def test_what_does_not_belong_together_is_not_merged():
    with pytest.raises(ValueError, match="`trackers` is empty"):
        LossVarianceTracker.merge([])
    one = LossVarianceTracker()
    with pytest.raises(ValueError, match=r"same bins and options .* got .*40 bins from -16 to 16.*7 bins"):
        LossVarianceTracker.merge([one, LossVarianceTracker(bins=7)])
    with pytest.raises(ValueError, match=r"same bins and options .*'unit': None.*'unit': 'sample'"):
        LossVarianceTracker.merge([one, LossVarianceTracker(unit="sample")])
