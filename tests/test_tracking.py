"""The tracker against numpy, its file, and its refusals."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from cases import NoHostSync
from safetensors.torch import load_file, save_file

from snrweights import LossVarianceTracker


def batch(size, seed):
    generator = torch.Generator().manual_seed(seed)
    log_snr = 14 * torch.randn(size, generator=generator)
    return torch.rand(size, generator=generator) * torch.sigmoid(log_snr), log_snr


def by_numpy(loss, log_snr, edges):
    """Count, mean and variance per bin; the outermost bins take what lies beyond."""
    edges = np.concatenate(([-np.inf], edges[1:-1], [np.inf]))
    of_bin = [loss[(log_snr > low) & (log_snr <= high)] for low, high in pairwise(edges)]
    count = np.array([len(values) for values in of_bin])
    mean = np.array([values.mean() if len(values) else np.nan for values in of_bin])
    variance = np.array([values.var() if len(values) else np.nan for values in of_bin])
    return count, mean, variance


@pytest.mark.parametrize("options", [{}, {"bins": 7, "low": -5.0, "high": 9.0}, {"bins": 1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_are_those_of_all_batches_together(options, dtype):
    tracker = LossVarianceTracker(**options)
    batches = [batch(size, seed) for seed, size in enumerate((500, 1, 64, 1000))]
    for loss, log_snr in batches:
        tracker.update(loss.to(dtype), log_snr.to(dtype))
    result = tracker.compute()
    loss, log_snr = (torch.cat(parts).double().numpy() for parts in zip(*batches, strict=True))
    count, mean, variance = by_numpy(loss, log_snr, result.edges.numpy())
    assert result.count.tolist() == count.tolist()
    np.testing.assert_allclose(result.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(result.variance, variance, rtol=1e-9, atol=1e-15)
    assert result.nonfinite.sum() == 0


def test_bins_are_of_equal_width_from_low_to_high():
    assert LossVarianceTracker(bins=4, low=-1, high=1).edges.tolist() == [-1, -0.5, 0, 0.5, 1]


def test_an_empty_bin_is_nan_and_not_zero():
    tracker = LossVarianceTracker(bins=2, low=-1, high=1)
    tracker.update(torch.tensor([2.0]), torch.tensor([-0.5]))
    result = tracker.compute()
    assert result.count.tolist() == [1, 0]
    assert (result.mean[0], result.variance[0]) == (2, 0)
    assert math.isnan(result.mean[1])
    assert math.isnan(result.variance[1])


def test_a_loss_that_is_not_finite_is_counted_and_kept_out():
    tracker = LossVarianceTracker(bins=2, low=-1, high=1)
    loss = torch.tensor([1.0, math.nan, 3.0, math.inf, -math.inf])
    tracker.update(loss, torch.tensor([-0.5, -0.5, -0.5, 0.5, 0.5]))
    result = tracker.compute()
    assert result.count.tolist() == [2, 0]
    assert result.nonfinite.tolist() == [1, 2]
    assert (result.mean[0], result.variance[0]) == (2, 1)


def test_infinite_log_snr_belongs_to_the_outermost_bins_and_nan_to_none():
    tracker = LossVarianceTracker(bins=3, low=-1, high=1)
    tracker.update(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([-math.inf, math.inf, math.nan]))
    result = tracker.compute()
    assert result.count.tolist() == [1, 0, 1]
    assert result.mean[[0, 2]].tolist() == [1, 2]
    assert result.nonfinite.sum() == 1


def test_a_large_mean_does_not_drown_the_variance():
    tracker = LossVarianceTracker(bins=1)
    tracker.update(torch.tensor([1000.0, 1000.5, 1001.0], dtype=torch.float64), torch.zeros(3))
    assert tracker.compute().variance.item() == pytest.approx(1 / 6, rel=1e-8)


def test_compute_is_a_snapshot():
    tracker = LossVarianceTracker(bins=1)
    tracker.update(torch.ones(2), torch.zeros(2))
    before = tracker.compute()
    tracker.update(3 * torch.ones(2), torch.zeros(2))
    assert (before.count.item(), before.mean.item()) == (2, 1)
    assert (tracker.compute().count.item(), tracker.compute().mean.item()) == (4, 2)


def test_update_takes_no_gradient_and_does_not_wait_for_the_device():
    tracker = LossVarianceTracker()
    loss, log_snr = torch.rand(8, requires_grad=True), torch.randn(8)
    with NoHostSync():
        tracker.update(loss, log_snr)
    assert not any(value.requires_grad for value in tracker.state_dict().values())


def test_an_empty_batch_adds_nothing():
    tracker = LossVarianceTracker()
    tracker.update(torch.empty(0), torch.empty(0))
    assert tracker.compute().count.sum() == 0


# state and file -------------------------------------------------------------------------------------------------------


def filled(**options):
    tracker = LossVarianceTracker(**options)
    tracker.update(*batch(100, 0))
    return tracker


def assert_same(first, second):
    for name in ("edges", "count", "mean", "variance", "nonfinite"):
        torch.testing.assert_close(
            getattr(first.compute(), name), getattr(second.compute(), name), rtol=0, atol=0, equal_nan=True
        )


def test_a_file_keeps_bins_and_moments_exactly(tmp_path):
    tracker = filled(bins=7, low=-5.0, high=9.0)
    tracker.save(tmp_path / "tracker.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["tracker.safetensors"]
    loaded = LossVarianceTracker.load(tmp_path / "tracker.safetensors")
    assert_same(loaded, tracker)
    for either in (tracker, loaded):
        either.update(*batch(10, 1))
    assert_same(loaded, tracker)


def test_a_state_continues_elsewhere_and_is_a_copy():
    tracker, other = filled(), LossVarianceTracker()
    state = tracker.state_dict()
    assert sorted(state) == ["edges", "moments"]
    other.load_state_dict(state)
    assert_same(other, tracker)
    other.update(*batch(10, 1))
    assert_same(tracker, filled())


def test_a_state_with_other_bins_is_refused_with_both_named():
    tracker = LossVarianceTracker()
    with pytest.raises(ValueError, match=r"other bins: 7 from -5 to 9, this tracker 40 from -16 to 16\."):
        tracker.load_state_dict(filled(bins=7, low=-5.0, high=9.0).state_dict())
    with pytest.raises(ValueError, match=r"other bins: 40 from -16 to 15, this tracker 40 from -16 to 16\."):
        tracker.load_state_dict(filled(high=15.0).state_dict())
    assert tracker.compute().count.sum() == 0


@pytest.mark.parametrize(
    "state",
    [
        {"edges": torch.zeros(41)},
        {"edges": torch.zeros(41), "moments": torch.zeros(4, 40), "more": torch.zeros(1)},
        {"edges": torch.zeros(41), "moments": torch.zeros(3, 40)},
    ],
)
def test_something_else_is_not_a_state(state, tmp_path):
    with pytest.raises(ValueError, match=r"Not the state of a LossVarianceTracker: it has \['edges'"):
        LossVarianceTracker().load_state_dict(state)
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"`path` '.*other.safetensors' is not a tracker's file: "):
        LossVarianceTracker.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("damage", [lambda data: data[:-5], lambda data: b"", lambda data: b"not safetensors at all"])
def test_a_damaged_file_is_refused_by_name(damage, tmp_path):
    path = tmp_path / "tracker.safetensors"
    filled().save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"`path` '.*tracker.safetensors' is not a tracker's file: "):
        LossVarianceTracker.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "tracker.safetensors"
    filled().save(path)
    old = load_file(path)
    monkeypatch.setattr(
        "snrweights.tracking.save_file", lambda state, path: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        filled(bins=3).save(path)
    assert torch.equal(load_file(path)["moments"], old["moments"])


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        LossVarianceTracker.load(tmp_path / "nothing.safetensors")


# bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: LossVarianceTracker(bins=0), "`bins` must be >= 1, got 0."),
        (lambda: LossVarianceTracker(low=1, high=1), "`low` must be below `high`, got 1 and 1."),
        (
            lambda: LossVarianceTracker().update(torch.ones(2), torch.ones(3)),
            "`loss` and `log_snr` must both have shape (B,), got (2,) and (3,).",
        ),
        (
            lambda: LossVarianceTracker().update(torch.ones(()), torch.ones(())),
            "`loss` and `log_snr` must both have shape (B,), got () and ().",
        ),
        (
            lambda: LossVarianceTracker().update(torch.ones(2, 2), torch.ones(2, 2)),
            "`loss` and `log_snr` must both have shape (B,), got (2, 2) and (2, 2).",
        ),
    ],
)
def test_a_bad_argument_is_named(run, message):
    with pytest.raises(ValueError, match="must") as raised:
        run()
    assert str(raised.value) == message


def test_repr_names_the_bins():
    assert repr(LossVarianceTracker()) == "LossVarianceTracker(bins=40, low=-16, high=16)"
