"""The tracker against numpy, its file, and its refusals."""

import csv
import io
import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from cases import NoHostSync
from safetensors.torch import load_file, save_file

from snrweights import LossVarianceTracker
from snrweights.densities import logit_normal


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
    assert sorted(state) == ["edges", "moments", "moments_before", "updates"]
    other.load_state_dict(state)
    assert_same(other, tracker)
    other.update(*batch(10, 1))
    assert_same(tracker, filled())


def test_a_state_that_was_loaded_is_left_alone():
    state, other = filled(decay=0.5).state_dict(), LossVarianceTracker(decay=0.5)
    before = state["moments"].clone()
    other.load_state_dict(state)
    other.update(*batch(10, 1))
    assert torch.equal(state["moments"], before)


def test_edges_may_be_given():
    edges = torch.tensor([-3.0, -1.0, 5.0])
    tracker = LossVarianceTracker(edges=edges)
    assert torch.equal(tracker.edges, edges.double())
    tracker.update(torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 0.0]))
    assert tracker.compute().mean.tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"`edges` must be \(bins \+ 1,\) and rise, got \[1.0, 0.0\]."):
        LossVarianceTracker(edges=torch.tensor([1.0, 0.0]))


def test_a_state_with_other_bins_is_refused_with_both_named():
    tracker = LossVarianceTracker()
    with pytest.raises(ValueError, match=r"other bins: 7 bins from -5 to 9; this tracker has 40 bins from -16 to 16\."):
        tracker.load_state_dict(filled(bins=7, low=-5.0, high=9.0).state_dict())
    with pytest.raises(ValueError, match=r"bins: 40 bins from -16 to 15; this tracker has 40 bins from -16 to 16\."):
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
    monkeypatch.setattr("snrweights.files.save", lambda tensors, metadata: (_ for _ in ()).throw(OSError("disk full")))
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
    assert repr(LossVarianceTracker()) == "LossVarianceTracker(40 bins from -16 to 16, unit=None)"


# units ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["epsilon", "sample", "v_prediction", "flow_prediction", "edm"])
def test_losses_of_every_target_are_counted_in_one_unit(target):
    log_snr = torch.linspace(-7.9, 7.9, 20, dtype=torch.float64)
    x0_error = torch.rand(20, dtype=torch.float64)
    snr = log_snr.exp()
    ratio = {
        "epsilon": snr,
        "sample": 1.0,
        "v_prediction": 1 + snr,
        "flow_prediction": (1 + snr.sqrt()) ** 2,
        "edm": snr + 1 / 0.5**2,
    }
    tracker = LossVarianceTracker(bins=20, low=-8, high=8, unit="epsilon", sigma_data=0.5)
    tracker.update(ratio[target] * x0_error, log_snr, prediction_type=target)
    assert tracker.compute().unit == "epsilon"
    torch.testing.assert_close(tracker.compute().mean, snr * x0_error, rtol=1e-12, atol=0)


def test_without_a_unit_there_is_nothing_to_convert_to():
    with pytest.raises(ValueError, match="`prediction_type` 'sample' was given to a tracker without a unit"):
        LossVarianceTracker().update(torch.ones(1), torch.zeros(1), prediction_type="sample")
    with pytest.raises(ValueError, match="Unknown prediction_type 'noise'"):
        LossVarianceTracker(unit="noise")


# bins, windows, decay, snapshots ----------------------------------------------------------------------------------


def test_bins_of_equal_mass_hold_equal_counts():
    density = logit_normal()
    tracker = LossVarianceTracker(bins=10, density=density)
    log_snr = density.icdf((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
    tracker.update(torch.ones(1000), log_snr)
    assert tracker.compute().count.tolist() == [100] * 10
    with pytest.raises(ValueError, match=r"10 bins of equal mass under .* do not fit between 0 and 1"):
        LossVarianceTracker(bins=10, low=0, high=1, density=density)


def test_a_window_forgets():
    tracker = LossVarianceTracker(bins=1, window=3)
    for i in range(10):
        tracker.update(torch.full((2,), float(i)), torch.zeros(2))
        seen = list(range(max(0, 3 * (i // 3 + (i % 3 == 2)) - 3), i + 1)) if i >= 2 else list(range(i + 1))
        assert tracker.compute().count.item() == 2 * len(seen)
        assert tracker.compute().mean.item() == pytest.approx(sum(seen) / len(seen))


def test_decay_is_a_decaying_sum():
    tracker = LossVarianceTracker(bins=1, decay=0.9)
    losses = torch.rand(50, 4, dtype=torch.float64)
    for loss in losses:
        tracker.update(loss, torch.zeros(4))
    factor = 0.9 ** torch.arange(49, -1, -1, dtype=torch.float64)
    mean = (factor[:, None] * losses).sum() / (4 * factor.sum())
    assert tracker.compute().mean.item() == pytest.approx(mean.item(), rel=1e-12)
    assert tracker.compute().count.item() == pytest.approx(4 * factor.sum().item(), rel=1e-12)
    second = (factor[:, None] * losses**2).sum() / (4 * factor.sum())
    assert tracker.compute().second_moment.item() == pytest.approx(second.item(), rel=1e-12)


def test_snapshots_are_the_sums_up_to_their_step(tmp_path):
    tracker, plain = LossVarianceTracker(snapshot_every=2), LossVarianceTracker()
    counts = []
    for i in range(7):
        tracker.update(*batch(10, i))
        plain.update(*batch(10, i))
        if i % 2:
            counts.append((i + 1, plain.compute().count))
    history = tracker.history()
    assert [step for step, _ in history] == [2, 4, 6]
    for (step, count), (expected_step, expected) in zip(
        [(step, statistics.count) for step, statistics in history], counts, strict=True
    ):
        assert step == expected_step
        assert torch.equal(count, expected)
    tracker.save(tmp_path / "tracker.safetensors")
    loaded = LossVarianceTracker.load(tmp_path / "tracker.safetensors")
    assert [step for step, _ in loaded.history()] == [2, 4, 6]
    assert torch.equal(loaded.history()[1][1].count, counts[1][1])


def test_snapshots_take_a_bounded_memory():
    tracker = LossVarianceTracker(bins=2, snapshot_every=1)
    for _ in range(1000):
        tracker.update(torch.ones(1), torch.zeros(1))
    steps = [step for step, _ in tracker.history()]
    assert len(steps) <= 256
    assert steps == sorted(steps)
    assert steps[-1] == 1000


def test_the_last_two_snapshots_are_never_dropped():
    tracker = LossVarianceTracker(bins=1, snapshot_every=1)
    for update in range(1, 600):
        tracker.update(torch.ones(1), torch.zeros(1))
        assert tracker.since(update - 1).count.item() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, r"`decay` must lie in \(0, 1\), got 1.0"),
        ({"decay": 0.5, "window": 3}, "`decay` or `window`, not both"),
        ({"window": 0}, "`window` must be >= 1, got 0"),
        ({"snapshot_every": 0}, "`snapshot_every` must be >= 1, got 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LossVarianceTracker(**options)


# gradients and reports ---------------------------------------------------------------------------------------------


def test_gradient_moments_are_kept_beside_the_losses():
    tracker = LossVarianceTracker(bins=2, low=-1, high=1)
    log_snr = torch.tensor([-0.5, -0.5, 0.5])
    tracker.update(torch.ones(3), log_snr)
    assert bool(tracker.compute().gradient_square.isnan().all())
    tracker.update(torch.ones(3), log_snr, gradient_square=torch.tensor([1.0, 3.0, math.inf]))
    assert tracker.compute().gradient_square.tolist()[0] == 2
    assert math.isnan(tracker.compute().gradient_square[1])
    with pytest.raises(ValueError, match=r"`gradient_square` must have shape \(3,\), got \(2,\)"):
        tracker.update(torch.ones(3), log_snr, gradient_square=torch.ones(2))


def test_both_terms_add_up_to_the_variance():
    loss, log_snr = batch(5000, 3)
    tracker = LossVarianceTracker(low=-50, high=50)
    tracker.update(loss, log_snr)
    seen = loss[loss.isfinite() & ~log_snr.isnan()].double()
    within, between = tracker.compute().total_variance()
    assert within > 0
    assert between > 0
    assert within + between == pytest.approx(seen.var(correction=0).item(), rel=1e-9)


def test_reports_say_the_same_in_every_form():
    tracker = LossVarianceTracker(bins=4, low=-2, high=2, unit="epsilon")
    tracker.update(torch.tensor([1.0, 3.0, 5.0, math.nan]), torch.tensor([-1.5, -1.5, 0.5, 0.5]))
    statistics = tracker.compute()
    written = json.loads(statistics.to_json())
    assert written["unit"] == "epsilon"
    assert [row["count"] for row in written["bins"]] == [2, 0, 1, 0]
    assert written["bins"][0]["second_moment"] == 5
    assert written["bins"][1]["mean"] is None
    table = list(csv.DictReader(io.StringIO(statistics.to_csv())))
    assert [row["count"] for row in table] == ["2", "0", "1", "0"]
    assert float(table[0]["variance"]) == 1
    assert table[1]["mean"] == ""
    text = str(statistics)
    assert "-2.00 to -1.00" in text
    assert "1 losses were not finite" in text
    assert len(text.splitlines()) == 1 + 2 + 2  # a head, two bins, variance, not finite
    scalars = statistics.scalars()
    assert scalars["loss_by_noise/mean_at_-1.5"] == 2
    assert scalars["loss_by_noise/std_at_-1.5"] == 1
    assert scalars["loss_by_noise/variance_within"] == pytest.approx(2 / 3)
    assert str(LossVarianceTracker().compute()) == "no losses seen"


def test_a_report_is_of_all_processes_up_to_now():
    tracker = LossVarianceTracker(reduce=lambda moments: 2 * moments)  # two processes that see the same
    tracker.update(torch.ones(3), torch.zeros(3))
    assert tracker.compute().count.sum() == 3
    assert tracker.report().count.sum() == 6


def test_since_counts_what_came_after_a_snapshot():
    tracker = LossVarianceTracker(bins=1, snapshot_every=2)
    for loss in range(1, 7):
        tracker.update(torch.tensor([float(loss)]), torch.zeros(1))
    assert tracker.since(0).mean.item() == pytest.approx(3.5)
    assert tracker.since(1).mean.item() == pytest.approx(3.5)
    assert tracker.since(2).mean.item() == pytest.approx(4.5)
    assert tracker.since(5).mean.item() == pytest.approx(5.5)
    with pytest.raises(ValueError, match=r"forgets nothing, got decay 0\.5"):
        LossVarianceTracker(decay=0.5).since(0)


@pytest.mark.parametrize("options", [{}, {"decay": 0.5}, {"window": 1}, {"snapshot_every": 1}])
def test_reading_in_inference_mode_leaves_it_fit_for_training(options):
    """As a function that logs may be decorated."""
    tracker, plain = LossVarianceTracker(**options), LossVarianceTracker(**options)
    for seed in range(3):
        for one in (tracker, plain):
            one.update(*batch(8, seed))
        with torch.inference_mode():
            tracker.report()
            tracker.load_state_dict(tracker.state_dict())
        plain.report()
    assert torch.equal(tracker.compute().count, plain.compute().count)
    with torch.inference_mode():
        made = LossVarianceTracker(**options)
    made.update(*batch(8, 0))
    assert made.compute().count.sum() > 0


def test_scalars_of_narrow_bins_have_names_of_their_own():
    tracker = LossVarianceTracker(bins=400)
    tracker.update(torch.ones(4000), torch.linspace(-15.99, 15.99, 4000))
    scalars = tracker.compute().scalars()
    assert sum("/mean_at_" in name for name in scalars) == 400
    assert "loss_by_noise/mean_at_-15.96" in scalars
