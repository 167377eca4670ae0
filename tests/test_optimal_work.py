"""The sums of a long computation: shared, saved, killed, taken up again, refused."""

import errno
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import optimal_worker as worker
import pytest
import torch

from snrweights.optimal import OptimalLossCurve, optimal_loss
from snrweights.optimal.work import Progress, Work
from snrweights.seeds import generator


def curve(state=None, **other):
    return optimal_loss(worker.data(), worker.SIGMAS, state=state, **{**worker.OPTIONS, **other})


def assert_same(one, other):
    assert torch.equal(one.value, other.value)
    assert torch.equal(one.stderr, other.stderr)
    assert torch.equal(one.confused, other.confused)
    assert (one.how, one.made) == (other.how, other.made)


@pytest.fixture(scope="module")
def whole():
    found = curve()
    assert set(found.how) == {"pairs", "importance"}
    return found


class Killed(Exception):
    pass


def stopped_after(monkeypatch, steps):
    """Let ``Work`` save after every step and fail in the one after so many."""
    monkeypatch.setattr("snrweights.optimal.work.SAVE_EVERY", 0.0)
    save, count = Work._save, iter(range(steps))

    def counting(*arguments):
        save(*arguments)
        if next(count, None) is None:
            raise Killed

    monkeypatch.setattr(Work, "_save", counting)


@pytest.mark.parametrize("steps", [0, 1, 20, 39, 200, 340])
def test_stopped_anywhere_it_ends_with_the_same_bits(steps, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stopped_after(patch, steps)
        with pytest.raises(Killed):
            curve(tmp_path)
    files = {"draws.0", *(["pairs.0"] if steps >= 39 else []), *(["near-pairs.0"] if steps > 339 else [])}
    assert {path.stem for path in tmp_path.iterdir()} == files  # in the midst of each stage
    assert_same(curve(tmp_path), whole)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bits(whole, tmp_path):
    state, output = tmp_path / "state", tmp_path / "curve.safetensors"
    moments = random.Random(0)
    kills = 0
    command = [sys.executable, Path(worker.__file__), state, output, "0.0005"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    while not output.exists():
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(moments.randrange(40, 170)):  # so many steps are saved
            if not process.stdout.readline():
                break
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        process.stdout.close()
    assert kills >= 2
    assert_same(OptimalLossCurve.load(output), whole)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 1}, "seed"),
        ({"draws": 65}, "draws"),
        ({"chunk": 9}, "chunk"),
        ({"small_noise": "bound"}, "small_noise"),
        ({"labels": None}, "data"),
        ({"world": 2, "reduce": lambda x: x}, "world"),
    ],
)
def test_the_state_of_something_else_is_refused_by_name(change, name, tmp_path):
    curve(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"is of another computation: `{name}` is .* there and .* here"):
        curve(tmp_path, **change)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_state_of_other_data_levels_or_versions_is_refused(tmp_path, monkeypatch):
    curve(tmp_path)
    data = worker.data()
    data[0, 0] += 1e-9
    with pytest.raises(ValueError, match=r"`data` is [0-9a-f]{64} there"):
        optimal_loss(data, worker.SIGMAS, state=tmp_path, **worker.OPTIONS)
    with pytest.raises(ValueError, match="`sigmas` is"):
        optimal_loss(worker.data(), worker.SIGMAS * 1.01, state=tmp_path, **worker.OPTIONS)
    monkeypatch.setattr("snrweights.optimal.estimator.__version__", "9.9")
    with pytest.raises(ValueError, match=r"`version` is .* there and 9\.9 here"):
        curve(tmp_path)


@pytest.mark.parametrize("damage", ["empty", "half", "text", "other tensors"])
def test_a_damaged_state_is_computed_anew(damage, whole, tmp_path):
    curve(tmp_path)
    path = next(tmp_path.glob("draws.*"))
    if damage == "other tensors":
        path.write_bytes(next(tmp_path.glob("near-pairs.*")).read_bytes())
    else:
        path.write_bytes({"empty": b"", "half": path.read_bytes()[:-1000], "text": b"not tensors" * 99}[damage])
    with pytest.warns(UserWarning, match=r"draws\.0\.safetensors is damaged; this stage begins anew"):
        assert_same(curve(tmp_path), whole)
    assert_same(curve(tmp_path), whole)


def test_without_room_for_the_state_it_goes_on(whole, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.warns(UserWarning, match="cannot be written; going on without one: .* No space left") as warned:
        assert_same(curve(tmp_path), whole)
    assert len(warned) == 1
    assert list(tmp_path.iterdir()) == []


def test_steps_are_shared_in_order_and_summed_once():
    steps, shares, sums = list(range(10)), [], []
    for rank in range(3):
        own = []
        total = torch.zeros(2, dtype=torch.int64)
        count = torch.zeros((), dtype=torch.float64)

        def add(step, own=own, total=total, count=count):
            own.append(step)
            total.add_(step)
            count.add_(1)

        calls = []
        work = Work(None, {}, rank, 3, lambda x, calls=calls: calls.append(x) or 2 * x)
        sums.append(work.sums("all", steps, [total, count], add))
        shares.append(own)
        assert len(calls) == 1
    assert [step for share in shares for step in share] == steps
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for (total, count), share in zip(sums, shares, strict=True):
        assert total.tolist() == [2 * sum(share)] * 2
        assert total.dtype == torch.int64
        assert count == 2 * len(share)


def test_wrong_processes_are_named():
    with pytest.raises(ValueError, match=r"`rank` must be in \[0, world\), got 2 with `world` 2"):
        curve(rank=2, world=2, reduce=lambda x: x)
    with pytest.raises(ValueError, match="`reduce` must sum over the 2 processes, got None"):
        curve(rank=0, world=2)


def test_partners_are_drawn_by_their_share_in_any_chunks():
    """A weighted draw from a row cut into chunks is that from the whole row, for the same uniform number."""
    from snrweights.optimal.small_noise import _drawn

    shares = torch.rand(50, 33, generator=generator(0), dtype=torch.float64) ** 8
    shares[:, ::3] = 0
    uniform = torch.rand(50, generator=generator(1), dtype=torch.float64)
    whole, _ = _drawn(shares, uniform)
    parts = shares.split(7, dim=1)
    number, left = _drawn(torch.stack([part.sum(1) for part in parts], 1), uniform)
    inside = torch.stack([_drawn(parts[n][m : m + 1], left[m : m + 1])[0][0] for m, n in enumerate(number.tolist())])
    assert torch.equal(7 * number + inside, whole)
    assert (shares.gather(1, whole[:, None]) > 0).all()
    none = torch.tensor([0.0], dtype=torch.float64)
    assert _drawn(torch.tensor([[0.0, 0.0, 1.0]]).double(), none)[0] == 2


class Terminal:
    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_progress_says_how_long_it_still_takes_and_only_on_a_terminal(monkeypatch, capsys):
    silent = Progress(True)
    silent("draws", 0.5)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    clock = iter([0.0, 30.0, 4000.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    shown = Progress(True)
    for share in (0.1, 0.2, 1.0):
        shown("draws", share)
    lines = terminal.text.split("\r\x1b[K")[1:]
    assert lines == [
        "optimal loss, draws:  10%",
        "optimal loss, draws:  20%, 4:00 left",
        "optimal loss, draws: 100% in 1:06:40\n",
    ]
    Progress(False)("draws", 0.5)
    assert len(terminal.text.split("\r")) == 4
