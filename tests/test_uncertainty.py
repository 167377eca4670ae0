"""The learnt uncertainty: where it starts, what it converges to, its file, and training with it."""

import json
import math

import pytest
import torch
from diffusers import DDPMPipeline
from safetensors.torch import load_file, save_file
from training import TINY, assert_bit_equal, final_state, main

from snrweights import ImportanceSampler, LearnedUncertainty, LossVarianceTracker, as_schedule, get_weighting
from snrweights.plots import plot_uncertainty
from snrweights.uncertainty import with_uncertainty


def expected(log_snr):
    """ln E[loss | log_snr] of the synthetic losses: 2.5 from highest to lowest."""
    return -1 + 1.25 * torch.sin(0.7 * log_snr)


def fitted(steps=600, batch=512):
    """Trained on losses that are exponentially distributed about exp(expected), at EDM's noise levels."""
    draw = torch.Generator().manual_seed(0)
    uncertainty = LearnedUncertainty()
    optimizer = torch.optim.Adam(uncertainty.parameters(), lr=1e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        log_snr = 2.4 + 2.4 * torch.randn(batch, generator=draw)
        losses = -torch.rand(batch, generator=draw).log() * expected(log_snr).exp()
        optimizer.zero_grad()
        uncertainty.loss(losses, log_snr).mean().backward()
        optimizer.step()
        decay.step()
    return uncertainty


@pytest.fixture(scope="module")
def uncertainty():
    return fitted()


def test_at_first_the_loss_is_the_loss_and_every_noise_level_learns():
    fresh, losses = LearnedUncertainty(), torch.rand(9)
    log_snr = torch.linspace(-9, 9, 9)
    assert torch.equal(fresh.loss(losses, log_snr), losses)
    fresh.loss(losses, log_snr).mean().backward()
    assert fresh.weight.grad.abs().min() > 0


def test_it_converges_to_the_logarithm_of_the_mean_loss(uncertainty):
    log_snr = 2.4 + torch.linspace(-4.8, 4.8, 97)  # two standard deviations to both sides
    with torch.no_grad():
        error = uncertainty(log_snr) - expected(log_snr)
    assert error.square().mean().sqrt() < 0.05
    assert error.abs().max() < 0.15


def test_the_optimum_is_the_logarithm_of_the_mean():
    losses = torch.tensor([0.2, 0.5, 3.8], dtype=torch.float64)
    u = losses.mean().log().requires_grad_()
    with_uncertainty(losses, u).mean().backward()
    assert u.grad.item() == pytest.approx(0, abs=1e-12)


def test_infinite_log_snr_is_that_of_the_last_noise_level(uncertainty):
    ends = uncertainty(torch.tensor([-math.inf, -20.0, 20.0, math.inf], dtype=torch.float64))
    assert ends.isfinite().all()
    assert ends[0] == ends[1] != ends[2] == ends[3]


def test_features_are_of_the_seed_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, same, other = LearnedUncertainty(seed=1), LearnedUncertainty(seed=1), LearnedUncertainty(seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.frequencies, same.frequencies)
    assert torch.equal(one.phases, same.phases)
    assert not torch.equal(one.frequencies, other.frequencies)
    assert [name for name, _ in one.named_parameters()] == ["weight"]
    wide = LearnedUncertainty(bandwidth=3.0, seed=1)
    torch.testing.assert_close(wide.frequencies, 3 * one.frequencies)


def test_autocast_does_not_round_it(uncertainty):
    log_snr = torch.linspace(-5, 5, 11)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(uncertainty(log_snr), uncertainty.float()(log_snr))
        assert uncertainty(log_snr).dtype == torch.float32


@pytest.mark.parametrize("schedule", ["linear", "edm"])
def test_it_compiles_in_one_graph_from_the_timestep_on(uncertainty, schedule):
    schedule = as_schedule(schedule)
    t = schedule.grid()[100:900:100]
    compiled = torch.compile(lambda t: uncertainty(schedule.log_snr(t)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(t), uncertainty(schedule.log_snr(t)))


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"features": 0}, "must be >= 1, got 0"), ({"bandwidth": 0.0}, r"must be > 0, got 0\.0")],
)
def test_bad_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        LearnedUncertainty(**setting)


# the file -------------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_it_is_the_same_to_the_last_bit(tmp_path):
    one = LearnedUncertainty(features=16, bandwidth=0.1, seed=3)
    torch.nn.init.normal_(one.weight)
    one.save(tmp_path / "u.safetensors")
    two = LearnedUncertainty.load(tmp_path / "u.safetensors")
    assert repr(two) == repr(one) == "LearnedUncertainty(features=16, bandwidth=0.1, seed=3)"
    assert_bit_equal(one.state_dict(), two.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["u.safetensors"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def without_settings(path):
    save_file(load_file(path), path)


def not_finite(path):
    one = LearnedUncertainty.load(path)
    torch.nn.init.constant_(one.weight, math.nan)
    one.save(path)


def other_features(path):
    one = LearnedUncertainty.load(path)
    one.features = 7
    one.save(path)


@pytest.mark.parametrize("damage", [cut, without_settings, not_finite, other_features])
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = tmp_path / "u.safetensors"
    LearnedUncertainty().save(path)
    damage(path)
    with pytest.raises(ValueError, match=r"`path` '.*u\.safetensors' is not the file of a LearnedUncertainty: "):
        LearnedUncertainty.load(path)


def test_a_file_that_is_not_there_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        LearnedUncertainty.load(tmp_path / "u.safetensors")


# the figure -----------------------------------------------------------------------------------------------------------


def test_the_figure_has_what_was_learnt_beside_what_was_tracked(uncertainty):
    tracker = LossVarianceTracker(bins=4, low=-4, high=4, unit="epsilon")
    tracker.update(torch.tensor([1.0, 3.0]).repeat(20), torch.full((40,), -1.0))
    tracker.update(torch.tensor([0.5]).repeat(20), torch.full((20,), 3.0))
    curve = get_weighting("edm").over_log_snr("edm", prediction_type="edm")
    points, line = plot_uncertainty(uncertainty, tracker.compute(), curve).axes[0].lines
    snr = torch.tensor([-1.0, 3.0]).exp()
    expected_means = torch.tensor([2.0, 0.5]) * (snr + 4) / snr
    torch.testing.assert_close(torch.tensor(points.get_ydata()), expected_means.double(), rtol=1e-6, atol=0)
    log_snr, learnt = (torch.tensor(axis) for axis in line.get_data())
    assert (log_snr[0], log_snr[-1]) == (-1, 3)  # where samples were
    torch.testing.assert_close(learnt, uncertainty(log_snr).exp().detach())
    assert len(plot_uncertainty(uncertainty, LossVarianceTracker().compute()).axes[0].lines) == 1


# training with it -----------------------------------------------------------------------------------------------------

ARGV = [*TINY, "--max-steps", "4", "--checkpointing-steps", "2", "--logging-steps", "1", "--learned-uncertainty"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    output = tmp_path_factory.mktemp("uncertain") / "run"
    main([*ARGV, "--output-dir", str(output)])
    return output


@pytest.mark.slow
def test_a_run_leaves_what_it_learnt_and_a_pipeline_without_it(run):
    learnt = LearnedUncertainty.load(run / "uncertainty.safetensors")
    assert learnt.weight.abs().max() > 0
    assert (run / "uncertainty.png").stat().st_size > 10_000
    DDPMPipeline.from_pretrained(run / "model")
    state = final_state(run, 4)
    assert state["model.uncertainty.weight"].abs().max() > 0
    assert "optimizer.uncertainty.weight.exp_avg" in state


@pytest.mark.slow
def test_resumed_it_ends_bit_equal(run, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000002").symlink_to(run / "checkpoints" / "step-00000002")
    main([*ARGV, "--output-dir", str(tmp_path), "--resume", "latest"])
    assert_bit_equal(final_state(run, 4), final_state(tmp_path, 4))
    one, two = (LearnedUncertainty.load(path / "uncertainty.safetensors") for path in (run, tmp_path))
    assert_bit_equal(one.state_dict(), two.state_dict())


@pytest.mark.slow
def test_a_sampler_learns_from_the_gradient_that_is_taken(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(ImportanceSampler, "update", lambda self, t, loss, *, weight: seen.append((t, weight)))
    argv = [*TINY, "--max-steps", "4", "--learning-rate", "0.02", "--lr-warmup-steps", "1", "--importance", "gradient"]
    argv += ["--method", "p2", "--set", "k=30", "--normalize", "none", "--learned-uncertainty"]
    main([*argv, "--output-dir", str(tmp_path)])
    weight = get_weighting("p2", k=30).bind("linear", prediction_type="epsilon")
    u = [-(given / weight(t)).log() for t, given in seen]
    assert u[0] == pytest.approx(torch.zeros(4), abs=1e-6)  # u starts at 0
    assert u[-1].mean() < -0.01


@pytest.mark.slow
def test_it_divides_the_gradient_and_not_the_loss_that_is_logged(tmp_path):
    argv = [*TINY, "--max-steps", "4", "--logging-steps", "1", "--learning-rate", "0.02", "--lr-warmup-steps", "1"]
    argv += ["--method", "p2", "--set", "k=30", "--normalize", "none"]  # losses of 1/30, u of -3.4 to be learnt
    losses = []
    for name, extra in (("plain", []), ("learnt", ["--learned-uncertainty"])):
        main([*argv, *extra, "--output-dir", str(tmp_path / name)])
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    plain, learnt = losses
    assert learnt[0] == plain[0]  # u starts at 0
    assert learnt[1:] != plain[1:]
    assert learnt == pytest.approx(plain, rel=0.5)
    u = LearnedUncertainty.load(tmp_path / "learnt" / "uncertainty.safetensors")(torch.linspace(-9, 9, 19))
    assert u.mean() < -0.01  # u itself in the loss would have made it negative
