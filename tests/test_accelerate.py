"""A tracker that an Accelerator sums, saves and restores."""

import pytest
import torch
from accelerate import Accelerator
from snrweights.integrations.accelerate import SumOverProcesses, attach_to, log_loss_by_noise

from snrweights import LossVarianceTracker


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(16, generator=generator), 6 * torch.randn(16, generator=generator)


def test_a_run_that_was_resumed_has_the_moments_of_one_that_was_not(tmp_path):
    accelerator, whole, first, second = (
        Accelerator(cpu=True),
        *(LossVarianceTracker(snapshot_every=2) for _ in range(3)),
    )
    handle = attach_to(first, accelerator)
    for seed in range(3):
        whole.update(*batch(seed))
        first.update(*batch(seed))
    accelerator.save_state(str(tmp_path / "state"))
    assert (tmp_path / "state" / "tracker.safetensors").is_file()
    handle.detach()
    attach_to(second, accelerator)
    accelerator.load_state(str(tmp_path / "state"))
    for seed in range(3, 7):
        whole.update(*batch(seed))
        second.update(*batch(seed))
    second.sync()
    expected, found = whole.state_dict(), second.state_dict()
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name


def test_a_state_with_other_bins_is_refused_when_it_is_loaded(tmp_path):
    accelerator = Accelerator(cpu=True)
    handle = attach_to(LossVarianceTracker(bins=7), accelerator)
    accelerator.save_state(str(tmp_path))
    handle.detach()
    attach_to(LossVarianceTracker(), accelerator)
    with pytest.raises(ValueError, match=r"other bins: 7 bins from -16 to 16; this tracker has 40 bins"):
        accelerator.load_state(str(tmp_path))


def test_a_state_of_another_unit_is_refused_when_it_is_loaded(tmp_path):
    accelerator = Accelerator(cpu=True)
    handle = attach_to(LossVarianceTracker(unit="epsilon"), accelerator)
    accelerator.save_state(str(tmp_path))
    handle.detach()
    handle = attach_to(LossVarianceTracker(), accelerator)
    with pytest.raises(ValueError, match=r"tracker.safetensors has losses of unit 'epsilon'; the tracker's is None\."):
        accelerator.load_state(str(tmp_path))
    handle.detach()
    attach_to(LossVarianceTracker(unit="epsilon"), accelerator)
    accelerator.load_state(str(tmp_path))


def test_the_sum_is_where_the_moments_are():
    """A process that has seen nothing has its moments on the CPU, where a GPU's collective does not reach."""

    class OnAnotherDevice:
        device = torch.device("meta")

        def reduce(self, tensor, reduction):
            assert (tensor.device, reduction) == (self.device, "sum")
            return torch.ones(tensor.shape)

    assert SumOverProcesses(OnAnotherDevice())(torch.zeros(2)).tolist() == [1, 1]


def test_detached_nothing_is_saved_any_more(tmp_path):
    accelerator, tracker = Accelerator(cpu=True), LossVarianceTracker()
    handle = attach_to(tracker, accelerator)
    assert isinstance(tracker.reduce, SumOverProcesses)
    handle.detach()
    handle.detach()
    assert tracker.reduce is None
    accelerator.save_state(str(tmp_path))
    assert not (tmp_path / "tracker.safetensors").exists()


def test_what_is_logged_is_what_was_seen(monkeypatch):
    accelerator, tracker, logged = Accelerator(cpu=True), LossVarianceTracker(bins=2, low=-1, high=1), []
    monkeypatch.setattr(accelerator, "log", lambda values, step: logged.append((values, step)))
    tracker.update(torch.tensor([1.0, 3.0]), torch.tensor([-0.5, -0.5]))
    log_loss_by_noise(accelerator, tracker, 7)
    [(values, step)] = logged
    assert step == 7
    assert values["loss_by_noise/mean_at_-0.5"] == 2
    assert values["loss_by_noise/std_at_-0.5"] == 1


def test_detached_it_sums_as_it_did_before():
    def reduce(tensor):
        return 2 * tensor

    tracker = LossVarianceTracker(reduce=reduce)
    handle = attach_to(tracker, Accelerator(cpu=True))
    assert isinstance(tracker.reduce, SumOverProcesses)
    handle.detach()
    handle.detach()
    assert tracker.reduce is reduce
