"""What several processes tracked, added up in files; tests/distributed has real processes."""

import os
import threading

import pytest
import torch
from snrweights.integrations.shares import discard_shares, save_together

from snrweights import LossVarianceTracker


def tracker(value, number=2):
    one = LossVarianceTracker(bins=1, unit="epsilon")
    one.update(torch.full((number,), float(value)), torch.zeros(number))
    return one


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_last_process_adds_up(tmp_path):
    for rank in (2, 0, 1):
        save_together([tracker(rank), tracker(10 * rank, 1)], tmp_path, rank, 3)
        done = rank == 1
        assert done == (names(tmp_path) == ["tracker-1.safetensors", "tracker.safetensors"])
    first, second = (LossVarianceTracker.load(tmp_path / name).compute() for name in reversed(names(tmp_path)))
    assert (first.count.item(), first.mean.item(), first.unit) == (6, 1, "epsilon")
    assert (second.count.item(), second.mean.item()) == (3, 10)


def test_one_process_has_no_shares(tmp_path):
    save_together([tracker(1)], tmp_path)
    assert names(tmp_path) == ["tracker.safetensors"]


def test_the_shares_of_those_that_ended_stay_and_the_old_sum_goes(tmp_path):
    save_together([tracker(5)], tmp_path)
    for rank in (0, 2):
        save_together([tracker(rank)], tmp_path, rank, 3)
    assert names(tmp_path) == ["tracker.rank-0-of-3.safetensors", "tracker.rank-2-of-3.safetensors"]
    merged = LossVarianceTracker.merge([LossVarianceTracker.load(path) for path in tmp_path.iterdir()])
    assert merged.compute().mean.item() == 1


def test_shares_of_an_earlier_run_are_not_added_to_this_one(tmp_path):
    save_together([tracker(100), tracker(100)], tmp_path, 1, 3)  # of three processes, of which one ended
    save_together([tracker(100), tracker(100)], tmp_path, 1, 2)  # of two
    for name in ("mine.safetensors", "tracker.rank.txt"):
        (tmp_path / name).touch()
    for rank in (0, 1):
        discard_shares(tmp_path, rank, 2)
    assert names(tmp_path) == ["mine.safetensors", "tracker.rank.txt"]
    save_together([tracker(1)], tmp_path, 0, 2)
    assert "tracker.safetensors" not in names(tmp_path)
    save_together([tracker(3)], tmp_path, 1, 2)
    assert LossVarianceTracker.load(tmp_path / "tracker.safetensors").compute().mean.item() == 2


def test_a_share_of_a_process_that_goes_on_is_left(tmp_path):
    save_together([tracker(1)], tmp_path, 1, 2)
    discard_shares(tmp_path, 0, 2)  # this one starts late
    assert names(tmp_path) == ["tracker.rank-1-of-2.safetensors"]


def test_two_processes_may_end_together(tmp_path, monkeypatch):
    """Both find all shares: they add up the same, or the second finds that it is done."""
    both, exists = threading.Barrier(2), os.path.exists

    def together(self):
        found = exists(self)
        if found and str(self).endswith("rank-1-of-2.safetensors"):
            both.wait(10)
        return found

    monkeypatch.setattr("pathlib.Path.exists", together)
    for i in range(20):
        folder = tmp_path / str(i)
        folder.mkdir()
        failures = []

        def end(rank, folder=folder, failures=failures):
            try:
                save_together([tracker(rank)], folder, rank, 2)
            except BaseException as error:
                failures.append(error)

        tracker(0).save(folder / "tracker.rank-0-of-2.safetensors")  # so that neither is the first
        tracker(1).save(folder / "tracker.rank-1-of-2.safetensors")
        threads = [threading.Thread(target=end, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert names(folder) == ["tracker.safetensors"]
        assert LossVarianceTracker.load(folder / "tracker.safetensors").compute().count.item() == 4


def test_shares_that_do_not_belong_together_are_an_error(tmp_path):
    save_together([LossVarianceTracker(bins=2)], tmp_path, 0, 2)
    with pytest.raises(ValueError, match="same bins and options"):
        save_together([LossVarianceTracker(bins=3)], tmp_path, 1, 2)
    assert names(tmp_path) == ["tracker.rank-0-of-2.safetensors", "tracker.rank-1-of-2.safetensors"]
