"""What a tracker does with bad input, with nothing, with a damaged state, and in a long run."""

import csv
import io
import json
import math
import sys

import pytest
import torch
from cases import NoHostSync
from safetensors.torch import load_file, save_file

from snrweights import LossVarianceTracker, get_weighting, plots

ALL_OPTIONS = {
    "plain": {},
    "decay": {"decay": 0.99},
    "window": {"window": 7},
    "snapshots": {"snapshot_every": 3},
    "faded snapshots": {"decay": 0.99, "snapshot_every": 1},
    "windowed snapshots": {"window": 4, "snapshot_every": 1},
    "converted": {"unit": "edm", "sigma_data": 0.5},
}


# losses ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", [None, "epsilon", "sample", "v_prediction"])
def test_a_negative_mean_squared_error_is_counted_and_kept_out(prediction_type):
    tracker = LossVarianceTracker(bins=1, unit="epsilon")
    given = torch.tensor([-1.0, 1.0, -math.inf, -1e-30, 0.0, 3.0])
    tracker.update(given, torch.zeros(6), prediction_type=prediction_type)
    result = tracker.compute()
    assert (result.count.item(), result.nonfinite.item()) == (3, 3)
    expected = LossVarianceTracker(bins=1, unit="epsilon")
    expected.update(torch.tensor([1.0, 0.0, 3.0]), torch.zeros(3), prediction_type=prediction_type)
    assert result.mean.item() == expected.compute().mean.item() > 0
    assert "3 losses were not finite, or negative" in str(result)


def test_without_a_unit_a_loss_may_be_negative():
    tracker = LossVarianceTracker(bins=1)
    tracker.update(torch.tensor([-1.0, 3.0]), torch.zeros(2))
    result = tracker.compute()
    assert (result.count.item(), result.nonfinite.item()) == (2, 0)
    assert (result.mean.item(), result.variance.item()) == (1, 4)
    loaded = LossVarianceTracker(bins=1)
    tracker.update(torch.tensor([-9.0]), torch.zeros(1))
    loaded.load_state_dict(tracker.state_dict())  # a negative sum is not taken for damage
    assert loaded.compute().mean.item() == pytest.approx(-7 / 3)


def test_a_squared_norm_is_not_negative():
    tracker = LossVarianceTracker(bins=1)
    square = torch.tensor([-1.0, math.nan, 2.0])
    tracker.update(torch.ones(3), torch.zeros(3), gradient_square=square)
    assert tracker.compute().gradient_square.item() == 2


@pytest.mark.parametrize(
    ("loss", "log_snr", "square", "message"),
    [
        ((3,), (2,), None, r"both have shape \(B,\), got \(3,\) and \(2,\)"),
        ((), (), None, r"both have shape \(B,\), got \(\) and \(\)"),
        ((3, 1), (3, 1), None, r"both have shape \(B,\), got \(3, 1\) and \(3, 1\)"),
        ((3,), (3,), (3, 1), r"`gradient_square` must have shape \(3,\), got \(3, 1\)"),
    ],
)
def test_wrong_shapes_are_refused_and_change_nothing(loss, log_snr, square, message):
    tracker = LossVarianceTracker()
    square = None if square is None else torch.ones(square)
    with pytest.raises(ValueError, match=message):
        tracker.update(torch.ones(loss), torch.zeros(log_snr), gradient_square=square)
    assert tracker.updates == 0
    assert int(tracker.compute().count.sum()) == 0


# nothing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [[], [math.nan, -1.0]], ids=["no losses", "no good losses"])
@pytest.mark.parametrize("options", [{}, {"decay": 0.9}], ids=str)
def test_without_losses_all_forms_are_empty(bad, options, tmp_path):
    tracker = LossVarianceTracker(bins=3, unit="epsilon", snapshot_every=1, **options)
    for _ in range(2):
        tracker.update(torch.tensor(bad), torch.zeros(len(bad)))
    tracker.save(tmp_path / "tracker.safetensors")
    for statistics in (tracker.compute(), LossVarianceTracker.load(tmp_path / "tracker.safetensors").compute()):
        for name in ("mean", "variance", "second_moment", "gradient_square"):
            assert bool(getattr(statistics, name).isnan().all()), name
        assert [row["mean"] for row in statistics.rows()] == [None] * 3
        assert all(math.isnan(term) for term in statistics.total_variance())
        written = json.loads(statistics.to_json())
        assert (written["variance_within"], written["variance_between"]) == (None, None)
        assert [row["gradient_square"] for row in csv.DictReader(io.StringIO(statistics.to_csv()))] == [""] * 3
        assert statistics.scalars() == {}
        lines = str(statistics).splitlines()
        assert lines[0] == "no losses seen"
        assert len(lines) == 1 + bool(bad)  # those that were not finite are not hidden


def test_without_losses_figures_are_empty(tmp_path):
    tracker = LossVarianceTracker(bins=3, unit="epsilon", snapshot_every=1)
    for _ in range(2):
        tracker.update(torch.empty(0), torch.empty(0))
    curve = get_weighting("min_snr").over_log_snr("linear", prediction_type="epsilon")
    figures = [
        plots.plot_loss_by_noise(tracker.compute()),
        plots.plot_weighted_loss(tracker.compute(), curve),
        plots.plot_history(tracker.history()),
    ]
    for figure in figures:
        plots.save(figure, tmp_path / "figure.png")
        assert all(len(line.get_xdata()) == 0 for ax in figure.axes for line in ax.get_lines())
        assert all(patch.get_height() == 0 for ax in figure.axes[:1] for patch in ax.patches)


# states that are not one ----------------------------------------------------------------------------------------------


def a_state(**options):
    tracker = LossVarianceTracker(bins=4, low=-2, high=2, snapshot_every=1, **options)
    for _ in range(3):
        tracker.update(torch.rand(8), torch.linspace(-2, 2, 8), gradient_square=torch.rand(8))
    return tracker.state_dict()


def with_value(name, index, value):
    def damage(state):
        state[name][index] = value

    return damage


def replaced(name, value):
    return lambda state: state.update({name: value(state[name])})


NAN, BACK = math.nan, torch.tensor([2.0, 1, 0, -1, -2], dtype=torch.float64)
DAMAGE = {
    "edges missing": (lambda state: state.pop("edges"), r"missing: \['edges'\]"),
    "updates missing": (lambda state: state.pop("updates"), r"missing: \['updates'\]"),
    "snapshots without steps": (lambda state: state.pop("snapshot_steps"), r"missing: \['snapshot_steps'\]"),
    "steps without snapshots": (lambda state: state.pop("snapshots"), r"missing: \['snapshots'\]"),
    "one too many": (lambda state: state.update(more=torch.ones(1)), r"unknown: \['more'\]"),
    "edges nan": (with_value("edges", 1, NAN), "`edges` is damaged: it holds values that are not finite"),
    "edges backwards": (replaced("edges", lambda _: BACK), "`edges` is not increasing"),
    "edges equal": (with_value("edges", 1, -2.0), "`edges` is not increasing"),
    "edges of two dimensions": (
        replaced("edges", lambda value: value[None]),
        r"`edges` is not of shape \(bins \+ 1,\)",
    ),
    "one edge": (replaced("edges", lambda value: value[:1]), r"`edges` is not of shape \(bins \+ 1,\)"),
    "edges whole": (replaced("edges", torch.Tensor.long), "`edges` is of torch.int64"),
    "moments nan": (with_value("moments", (1, 0), NAN), "`moments` is damaged: it holds values that are not finite"),
    "moments infinite": (with_value("moments_before", (2, 0), math.inf), "`moments_before` is damaged"),
    "count negative": (with_value("moments", (0, 0), -1.0), "`moments` is damaged: a count .* is negative"),
    "squares negative": (with_value("moments_before", (2, 3), -1e-9), "`moments_before` is damaged: .* is negative"),
    "moments whole": (replaced("moments", torch.Tensor.long), "`moments` is of torch.int64, not torch.float64"),
    "moments half": (replaced("moments", lambda value: value.half()), "`moments` is of torch.float16"),
    "moments of few bins": (
        replaced("moments", lambda value: value[:, 1:]),
        r"`moments` is of shape \(6, 3\), not \(6, 4\)",
    ),
    "moments of few rows": (
        replaced("moments", lambda value: value[1:]),
        r"`moments` is of shape \(5, 4\), not \(6, 4\)",
    ),
    "updates real": (
        replaced("updates", lambda value: value.double()),
        "`updates` is of torch.float64, not torch.int64",
    ),
    "updates single": (replaced("updates", lambda value: value[0]), r"`updates` is of shape \(\), not \(2,\)"),
    "updates negative": (with_value("updates", 0, -3), "`updates` is negative"),
    "snapshots too few": (
        replaced("snapshots", lambda value: value[1:]),
        r"`snapshots` is of shape \(2, 6, 4\), not \(3, 6, 4\)",
    ),
    "snapshots of few bins": (
        replaced("snapshots", lambda value: value[..., 1:]),
        r"`snapshots` is of shape \(3, 6, 3\)",
    ),
    "snapshots nan": (with_value("snapshots", (1, 1, 1), NAN), "`snapshots` is damaged"),
    "snapshots negative": (with_value("snapshots", (1, 0, 1), -1.0), "`snapshots` is damaged: a count"),
    "steps real": (replaced("snapshot_steps", lambda value: value.double()), "`snapshot_steps` is of torch.float64"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_refused_and_the_damage_named(damage, tmp_path):
    change, message = DAMAGE[damage]
    state = a_state()
    change(state)
    tracker = LossVarianceTracker(bins=4, low=-2, high=2)
    tracker.update(torch.ones(2), torch.zeros(2))
    before = tracker.state_dict()
    with pytest.raises(ValueError, match=message):
        tracker.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in tracker.state_dict().items())
    path = tmp_path / "tracker.safetensors"
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    with pytest.raises(ValueError, match=f"`path` '.*tracker.safetensors' is not a tracker's file: .*{message}"):
        LossVarianceTracker.load(path)


def test_every_byte_of_a_file_is_needed(tmp_path):
    path = tmp_path / "tracker.safetensors"
    tracker = LossVarianceTracker(bins=2, low=-1, high=1)
    tracker.save(path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"'.*tracker.safetensors' is not a tracker's file: "):
            LossVarianceTracker.load(path)
    path.write_bytes(whole)
    assert torch.equal(LossVarianceTracker.load(path).edges, tracker.edges)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("not json", "Expecting value"),
        ('{"decay": 5}', r"`decay` must lie in \(0, 1\), got 5"),
        ('{"colour": "red"}', "unexpected keyword argument 'colour'"),
        ("[1]", "must be a mapping"),
        ('{"unit": "noise"}', "Unknown prediction_type 'noise'"),
    ],
)
def test_damaged_options_are_refused(options, message, tmp_path):
    path = tmp_path / "tracker.safetensors"
    save_file(a_state(), path, metadata={"options": options})
    with pytest.raises(ValueError, match=f"'.*tracker.safetensors' is not a tracker's file: .*{message}"):
        LossVarianceTracker.load(path)


def test_bins_of_other_widths_are_named_so():
    state = a_state()
    state["edges"] = torch.tensor([-2.0, -1, 0.5, 1, 2], dtype=torch.float64)
    with pytest.raises(
        ValueError,
        match=r"4 bins from -2 to 2, of unequal widths with the middle edge at 0.5; this .* 4 bins from -2 to 2",
    ):
        LossVarianceTracker(bins=4, low=-2, high=2).load_state_dict(state)


def test_a_state_of_a_device_without_float64_is_taken():
    state = {name: value.float() if value.is_floating_point() else value for name, value in a_state().items()}
    tracker = LossVarianceTracker(bins=4, low=-2, high=2)
    tracker.load_state_dict(state)
    assert tracker.compute().mean.dtype == torch.float64
    assert int(tracker.compute().count.sum()) == 24
    assert LossVarianceTracker(bins=40).edges[1].item() != LossVarianceTracker(bins=40).edges[1].float().item()
    fine = LossVarianceTracker(bins=40)
    fine.load_state_dict(
        {name: value.float() if "u" not in name else value for name, value in fine.state_dict().items()}
    )


@pytest.mark.parametrize("options", ALL_OPTIONS.values(), ids=ALL_OPTIONS)
def test_a_loaded_tracker_goes_on_like_the_saved_one(options, tmp_path):
    tracker = LossVarianceTracker(**options)

    def five(*trackers):
        for _ in range(5):
            loss, log_snr = torch.rand(16), 8 * torch.randn(16)
            for each in trackers:
                each.update(loss, log_snr)

    five(tracker)
    tracker.save(tmp_path / "tracker.safetensors")
    loaded = LossVarianceTracker.load(tmp_path / "tracker.safetensors")
    five(tracker, loaded)
    for name, value in tracker.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert loaded._options() == tracker._options()
    assert str(loaded.compute()) == str(tracker.compute())
    assert load_file(tmp_path / "tracker.safetensors")["moments"].dtype == torch.float64


def test_a_loaded_tracker_moves_to_the_device_of_the_losses_as_a_whole():
    tracker = LossVarianceTracker(bins=4, low=-2, high=2, snapshot_every=1, reduce=torch.clone)
    tracker.load_state_dict(a_state())
    tracker.update(torch.ones(2), torch.zeros(2))
    tracker._move(torch.device("meta"))
    held = [value for value in vars(tracker).values() if isinstance(value, torch.Tensor)]
    held += [*tracker._marks, *(moments for _, moments in tracker.snapshots)]
    assert len(held) == 4 + 1 + 3
    assert {value.device.type for value in held} == {"meta"}


# a long run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", [None, torch.clone], ids=["one process", "several"])
@pytest.mark.parametrize("options", ALL_OPTIONS.values(), ids=ALL_OPTIONS)
def test_no_update_waits_for_the_device(options, reduce):
    tracker = LossVarianceTracker(reduce=reduce, **options)
    loss, log_snr = torch.rand(64), 8 * torch.randn(64)
    prediction_type = "sample" if tracker.unit else None
    with NoHostSync():
        for _ in range(2 * 7 * 3):
            tracker.update(loss, log_snr, prediction_type=prediction_type, gradient_square=loss)
    assert int(tracker.compute().count.sum()) > 0


def bytes_held(tracker):
    """Bytes of all tensors that a tracker refers to."""
    held, waiting = 0, list(vars(tracker).values())
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            held += value.untyped_storage().nbytes()
        elif isinstance(value, (list, tuple)):
            waiting.extend(value)
            held += sys.getsizeof(value)
    return held


@pytest.mark.parametrize("reduce", [None, torch.clone], ids=["one process", "several"])
@pytest.mark.parametrize("options", ALL_OPTIONS.values(), ids=ALL_OPTIONS)
def test_memory_is_bounded_over_ten_thousand_updates(options, reduce):
    tracker = LossVarianceTracker(bins=2, reduce=reduce, **options)
    loss, log_snr, held = torch.rand(2), torch.randn(2), []
    for i in range(10_000):
        tracker.update(loss, log_snr)
        if i % 500 == 499:
            held.append(bytes_held(tracker))
    matrix = 6 * 2 * 8
    most = (3 + 2 * 256 if "snapshot_every" in options else 3) * (matrix + 200) + 10_000
    assert max(held) <= most
    if "snapshot_every" not in options:
        assert len(set(held)) == 1
    tracker.sync()
    assert len(tracker.state_dict().get("snapshots", [])) <= 256
    assert bytes_held(tracker) <= most
