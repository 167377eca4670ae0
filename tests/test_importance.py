"""Importance sampling: q against closed forms and a transcription, no bias, predictions, state, processes, refusals."""

import math
import threading

import numpy as np
import pytest
import torch
from cases import SCHEDULES, NoHostSync, expected_gradient, small_gradient

from snrweights import DiscreteSchedule, EDMSchedule, FlowSchedule, ImportanceSampler, LossVarianceTracker
from snrweights.densities import Normal
from snrweights.history import LossHistory
from snrweights.importance import RULES, Rule
from snrweights.quantiles import quantiles
from snrweights.samplers import TimestepSampler

LINEAR, FLOW, EDM = SCHEDULES["linear"], FlowSchedule(num_train_timesteps=1000), EDMSchedule()
SHORT = DiscreteSchedule.from_name("linear", 50)


def importance(schedule, rule, **options):
    """A sampler of any rule; that of the gap with an optimal loss of 0 everywhere."""
    if rule == "gap":
        options = {"optimum": torch.zeros_like, **options}
    return ImportanceSampler(schedule, rule, **options)


def bin_of(sampler, t):
    """The bin of log-SNR that a timestep is in."""
    return torch.bucketize(sampler.schedule.log_snr(t), sampler.evidence.edges[1:-1])


def q_of(sampler):
    return sampler.probabilities()[1]


def mixed(p, root, floor):
    """The q that a rule asks for."""
    q = p * root / (p * root).sum()
    return (1 - floor) * q + floor * p


def taught(schedule, rule="gradient", rounds=20, size=500, seed=1, **options):
    """A sampler that has seen the losses of the small model, and has its q."""
    sampler = importance(schedule, rule, seed=seed, refresh_every=10**9, **options)
    for _ in range(rounds):
        t = sampler.draw(size).t
        sampler.update(t, small_gradient(schedule, t)[1])
    sampler.refresh()
    assert float((sampler._tilt - 1).abs().max()) > 0.2
    return sampler


def per_bin(sampler, rows):
    """Feed every bin the same number of losses: rows (n, bins) at timesteps in the middle of the bins."""
    middles = TimestepSampler(sampler.schedule, sampler.density).at(
        (torch.arange(rows.shape[1], dtype=torch.float64) + 0.5) / rows.shape[1]
    )
    assert bin_of(sampler, middles.t).tolist() == list(range(rows.shape[1]))
    return middles.t.repeat(len(rows)), rows.flatten()


ROWS = torch.rand(12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 2 * torch.arange(1, 9)


# q --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [LINEAR, FLOW, EDM])
@pytest.mark.parametrize("floor", [None, 0.01, 1.0])
@pytest.mark.parametrize(
    ("rule", "root"),
    [
        ("gradient", lambda loss, w: np.sqrt((w**2 * loss).mean(0))),
        ("variance", lambda loss, w: (w * loss).std(0)),
        ("loss_second_moment", lambda loss, w: np.sqrt(((w * loss)[-10:] ** 2).mean(0))),
    ],
)
def test_q_is_the_optimum_of_its_rule(rule, root, floor, schedule):
    sampler = importance(schedule, rule, bins=8, floor=floor)
    t, loss = per_bin(sampler, ROWS)
    weight = torch.linspace(0.5, 2.0, len(t), dtype=torch.float64)
    sampler.update(t, loss, weight=weight)
    sampler.refresh()
    p, q = sampler.probabilities()
    np.testing.assert_allclose(p, 1 / 8, rtol=1e-12)
    expected = mixed(
        p.numpy(), root(ROWS.numpy(), weight.view(12, 8).numpy()), RULES[rule].floor if floor is None else floor
    )
    np.testing.assert_allclose(q, expected, rtol=1e-12 if rule != "variance" else 1e-10)
    assert q.sum() == pytest.approx(1, abs=1e-14)


def test_gradients_at_the_output_take_the_place_of_losses():
    sampler = ImportanceSampler(LINEAR, "gradient", bins=8)
    t, square = per_bin(sampler, ROWS)
    weight = torch.linspace(0.5, 2.0, len(t), dtype=torch.float64)
    sampler.update(t, torch.ones_like(square), weight=weight, gradient_square=square)
    sampler.refresh()
    root = (weight**2 * square).view(12, 8).mean(0).sqrt()
    np.testing.assert_allclose(q_of(sampler), mixed(np.full(8, 1 / 8), root.numpy(), 0.1), rtol=1e-12)


class Resampler:
    """improved-diffusion's LossSecondMomentResampler, written from its description in arXiv 2102.09672 and its code."""

    def __init__(self, steps, history=10, uniform=0.001):
        self.losses = np.zeros((steps, history))
        self.counts = np.zeros(steps, dtype=int)
        self.uniform = uniform

    def update(self, t, losses):
        for step, loss in zip(t, losses, strict=True):
            if self.counts[step] == self.losses.shape[1]:
                self.losses[step] = np.append(self.losses[step, 1:], loss)
            else:
                self.losses[step, self.counts[step]] = loss
                self.counts[step] += 1

    def weights(self):
        steps, history = self.losses.shape
        if not (self.counts == history).all():
            return np.ones(steps) / steps
        weights = np.sqrt((self.losses**2).mean(1))
        return weights / weights.sum() * (1 - self.uniform) + self.uniform / steps


@pytest.mark.parametrize("schedule", [SHORT, DiscreteSchedule.from_name("linear", 50, rescale_betas_zero_snr=True)])
@pytest.mark.parametrize("size", [7, 64, 1500])
def test_loss_second_moment_is_improved_diffusions_sampler(schedule, size):
    theirs, ours = Resampler(50), ImportanceSampler(schedule, "loss_second_moment", refresh_every=1)
    g = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(6000 // size):
        t = torch.randint(0, 50, (size,), generator=g)
        loss = torch.rand(size, generator=g, dtype=torch.float64) * (1 + t)
        theirs.update(t.tolist(), loss.tolist())
        ours.update(t, loss)
        ours.refresh()
        np.testing.assert_allclose(q_of(ours).flip(0), theirs.weights(), rtol=1e-12)  # bins rise with log-SNR
        seen.append(theirs.weights().std() > 0)
    assert seen[-1]
    assert not seen[0] or size == 1500


@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2", "zero_snr"])
def test_a_history_has_a_bin_for_every_timestep(name):
    sampler = ImportanceSampler(SCHEDULES[name], "loss_second_moment")
    assert bin_of(sampler, torch.arange(1000)).tolist() == list(range(999, -1, -1))
    np.testing.assert_allclose(sampler.probabilities()[0], 1 / 1000, rtol=1e-9)


def test_a_history_waits_for_no_bin_without_mass():
    evidence = LossHistory(torch.linspace(-30, 30, 41), 2)
    sampler = ImportanceSampler(LINEAR, "loss_second_moment", evidence=evidence)
    t = torch.arange(1000).repeat(2)
    sampler.update(t[t < 800], 1.0 + t[t < 800])
    sampler.refresh()
    p, q = sampler.probabilities()
    assert (p == 0).any()
    assert torch.equal(p, q)  # some with mass have not seen two
    sampler.update(t, 1.0 + t)
    sampler.refresh()
    assert float((q_of(sampler)[p > 0] / p[p > 0] - 1).abs().max()) > 0.5


def test_until_something_is_known_q_is_p():
    for rule in RULES:
        sampler = importance(LINEAR, rule)
        assert torch.equal(sampler.draw(8).t, TimestepSampler(LINEAR).draw(8).t)
        assert (sampler.draw(100).weight == 1).all()
        sampler.refresh()
        p, q = sampler.probabilities()
        assert torch.equal(p, q)


def test_a_bin_that_has_seen_too_little_counts_as_the_average():
    sampler = ImportanceSampler(LINEAR, "gradient", bins=4, floor=0.1, warm_up=3)
    t, loss = per_bin(sampler, torch.tensor([[1.0, 9.0, 100.0, 16.0]]).repeat(3, 1))
    third = bin_of(sampler, t) == 2
    third[2] = False  # one of them is fed
    sampler.update(t[~third], loss[~third])
    sampler.refresh()
    root = np.array([1, 3, 8 / 3, 4])
    np.testing.assert_allclose(q_of(sampler), mixed(np.full(4, 0.25), root, 0.1), rtol=1e-12)


@pytest.mark.parametrize("size", [1, 16])
def test_small_batches_learn_too_and_a_known_bin_stays_known(size):
    sampler = ImportanceSampler(LINEAR, "gradient", refresh_every=50)
    loss = torch.where(torch.arange(1000) < 500, 1e-6, 1.0)
    tilts = []
    for index in range(3000 // size):
        t, _ = sampler.draw(size)
        sampler.update(t, loss[t])
        if index * size > 1500:
            tilts.append(q_of(sampler) * 32)
    tilts = torch.stack(tilts)
    assert tilts[:, 17:].max() < 0.11  # the clean half, at the floor throughout
    assert tilts[:, :15].min() > 1.7


# unbiased -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", ["independent", "stratified"])
@pytest.mark.parametrize("schedule", [SHORT, LINEAR, FLOW, EDM], ids=["short", "linear", "flow", "edm"])
@pytest.mark.parametrize("rule", RULES)
def test_the_expected_gradient_is_that_of_the_base_density(rule, schedule, draws):
    sampler = taught(schedule, rule, draws=draws, warm_up=1, **({"bins": 20} if schedule is LINEAR else {}))
    t, weight = sampler.draw(100_000)
    terms = torch.cat((small_gradient(schedule, t)[0], torch.ones(len(t), 1)), 1) * weight[:, None]
    expected = torch.cat((expected_gradient(schedule, sampler.density), torch.ones(1)))
    error = terms.std(0) / math.sqrt(len(t))  # of independent draws; of stratified ones it is less
    assert (error[:-1] < 0.01).all()
    assert error[-1] < 0.02
    assert ((terms.mean(0) - expected).abs() <= 4.5 * error + 1e-6).all()


@pytest.mark.parametrize("rule", ["gradient", "variance"])
def test_no_bias_while_q_follows_the_draws(rule):
    sampler = importance(LINEAR, rule, refresh_every=1, warm_up=2)
    sums = []
    for _ in range(1600):
        t, weight = sampler.draw(64)
        gradient, loss = small_gradient(LINEAR, t)
        sampler.update(t, loss)
        sums.append((gradient * weight[:, None]).mean(0))
    sums = torch.stack(sums)
    error = sums.std(0) / math.sqrt(len(sums))
    assert ((sums.mean(0) - expected_gradient(LINEAR, sampler.density)).abs() <= 4.5 * error).all()


@pytest.mark.parametrize("density", [None, Normal(0.0, 2.0), "laplace"])
@pytest.mark.parametrize("rule", RULES)
def test_by_enumeration_draws_are_q_and_weights_undo_it(rule, density):
    sampler = taught(SHORT, rule, density=density, warm_up=1)
    t = torch.arange(50)
    p_bins, q_bins = sampler.probabilities()
    p = quantiles(SHORT, sampler.density).probability
    q = p * (q_bins / p_bins)[bin_of(sampler, t)]
    assert q.sum() == pytest.approx(1, abs=1e-12)
    count = 200_000
    drawn = sampler.at((torch.arange(count, dtype=torch.float64) + 0.5) / count).t.bincount(minlength=50)
    assert (drawn - count * q).abs().max() <= 1
    np.testing.assert_allclose(q * sampler.weight(t), p, rtol=1e-6)  # weights are float32
    gradient = small_gradient(SHORT, t)[0]
    exact = (q * (p_bins / q_bins)[bin_of(sampler, t)]) @ gradient
    torch.testing.assert_close(exact, p @ gradient, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close((q * sampler.weight(t)) @ gradient, p @ gradient, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("u", [0.0, 1.0])
@pytest.mark.parametrize("schedule", [SCHEDULES["zero_snr"], FLOW, EDM])
def test_the_outermost_draws_are_legal(schedule, u):
    t, weight = taught(schedule).at(torch.tensor([u], dtype=torch.float64))
    schedule.check(t)
    assert weight.isfinite().all()


# reweight -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [LINEAR, FLOW])
def test_reweight_leaves_the_draws_and_weighs_by_q_over_p(schedule):
    resample, reweight = (
        taught(schedule, "gradient", mode=mode, rounds=1, warm_up=1) for mode in ("resample", "reweight")
    )
    torch.testing.assert_close(q_of(resample), q_of(reweight))
    t, weight = reweight.draw(10_000)
    assert torch.equal(t, TimestepSampler(schedule, seed=1).draw(10_000, index=1).t)
    p, q = reweight.probabilities()
    np.testing.assert_allclose(weight, (q / p)[bin_of(reweight, t)], rtol=1e-6)
    assert float(weight.mean()) == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(weight * resample.weight(t), torch.ones_like(weight))


def test_reweight_by_variance_raises_the_noise_levels_that_vary():
    sampler = ImportanceSampler(LINEAR, "variance", mode="reweight", bins=2, warm_up=1)
    t, loss = per_bin(sampler, torch.tensor([[1.0, 1.0], [1.2, 7.0]]))
    sampler.update(t, loss)
    sampler.refresh()
    noisy, clean = sampler.weight(t[:2]).tolist()
    assert (noisy, clean) == pytest.approx((0.1 + 0.9 * 0.2 / 3.1, 0.1 + 0.9 * 6 / 3.1), rel=1e-6)


# predictions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["resample", "reweight"])
@pytest.mark.parametrize("rule", RULES)
def test_predictions_are_those_of_enumeration(rule, mode):
    sampler = taught(SHORT, rule, mode=mode, warm_up=1)
    statistics = sampler.evidence.compute()
    p, q = sampler.probabilities()
    square = RULES[rule].root(statistics) ** 2
    drawn, weight = (q, p / q) if mode == "resample" else (p, q / p)
    predicted = sampler.predicted()
    ratio = float((drawn * weight**2 * square).sum() / (p * square).sum())
    assert predicted.ratio == pytest.approx(ratio, rel=1e-12)
    assert predicted.effective_sample_size == pytest.approx(1 / float((drawn * weight**2).sum()), rel=1e-12)
    assert 0 < predicted.effective_sample_size < 1


@pytest.mark.parametrize("floor", [1e-6, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_never_raises_its_own_second_moment(rule, floor):
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        sampler = importance(LINEAR, rule, bins=8, floor=floor)
        rows = torch.rand(12, 8, generator=g, dtype=torch.float64) * torch.randn(8, generator=g).exp() ** 3
        sampler.update(*per_bin(sampler, rows))
        sampler.refresh()
        assert sampler.predicted().ratio <= 1 + 1e-12
        if floor == 1e-6:  # (E √S)² / E S
            root = RULES[rule].root(sampler.evidence.compute())
            assert sampler.predicted().ratio == pytest.approx(float(root.mean() ** 2 / (root**2).mean()), rel=1e-4)


def test_the_gradient_that_is_drawn_has_the_predicted_second_moment():
    """A toy: |g|² is exponential about its mean at each noise level; the loss is a fourth of it."""
    mean = torch.exp(-SHORT.log_snr_table / 2).clamp(max=50.0)
    g = torch.Generator().manual_seed(0)
    samplers = {rule: importance(SHORT, rule, bins=50, refresh_every=10**9) for rule in RULES}
    t = torch.arange(50).repeat(400)
    square = mean[t] * torch.empty(len(t), dtype=torch.float64).exponential_(generator=g)
    second_moments = {}
    for rule, sampler in samplers.items():
        sampler.update(t, square / 4, gradient_square=square)
        sampler.refresh()
        drawn, weight = sampler.draw(200_000)
        second_moments[rule] = float((weight.double() ** 2 * mean[drawn]).mean() / mean.mean())
    measured = second_moments["gradient"]
    assert measured == pytest.approx(samplers["gradient"].predicted().ratio, rel=0.02)
    assert measured == pytest.approx(float(mean.sqrt().mean() ** 2 / mean.mean()), rel=0.03)
    # √E[L²] is the optimum for another quantity: on the gradient it does no better here than uniform draws
    assert measured < 0.9 < second_moments["loss_second_moment"]


def test_a_prediction_says_of_what():
    texts = {rule: str(taught(SHORT, rule, warm_up=1).predicted()) for rule in RULES}
    assert texts["gradient"].startswith("second moment of the gradient at the model's output: 0.")
    assert texts["loss_second_moment"].startswith("second moment of the loss estimate: 0.")
    assert texts["variance"].startswith("second moment of the loss about its mean at each noise level: 0.")
    assert all(text.endswith(" %") and "effective sample size" in text for text in texts.values())
    nothing = ImportanceSampler(LINEAR).predicted()
    assert str(nothing) == "second moment of the gradient at the model's output: not measured yet"
    assert nothing.effective_sample_size == pytest.approx(1)


# state ----------------------------------------------------------------------------------------------------------------


def trained(sampler, steps):
    batches = []
    for _ in range(steps):
        t, weight = sampler.draw(16)
        sampler.update(t, small_gradient(sampler.schedule, t)[1])
        batches += [t, weight]
    return batches


@pytest.mark.parametrize("schedule", [SHORT, FLOW])
@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_run_draws_bit_equal(rule, schedule):
    first, second = (importance(schedule, rule, refresh_every=7, seed=5) for _ in range(2))
    trained(first, 130)
    state = first.state_dict()
    kept = {name: value.clone() for name, value in state.items()}
    second.load_state_dict(state)
    assert second.drawn == 130
    assert all(torch.equal(a, b) for a, b in zip(trained(first, 40), trained(second, 40), strict=True))
    assert torch.equal(q_of(first), q_of(second))
    assert float((q_of(first) / first.probabilities()[0] - 1).abs().max()) > 0.1
    assert all(torch.equal(state[name], value) for name, value in kept.items())


def damaged(**changes):
    state = {**taught(SHORT, rounds=2, bins=8).state_dict(), **changes}
    return {name: value for name, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tilt": None}, "Not the state of an ImportanceSampler: it has ['drawn', 'evidence.edges'"),
        ({"drawn": None}, "Not the state of an ImportanceSampler: it has ['evidence.edges'"),
        ({"known": None}, "Not the state of an ImportanceSampler"),
        ({"more": torch.ones(1)}, "Not the state of an ImportanceSampler"),
        ({"drawn": torch.tensor(-3)}, "`drawn` must be a whole number, got -3."),
        ({"drawn": torch.tensor(2.5)}, "`drawn` must be a whole number, got 2.5."),
        ({"tilt": torch.full((8,), math.nan)}, "damaged or of other bins: `tilt` has shape (8,) and mean nan; (8,)"),
        ({"tilt": torch.full((8,), 2.0)}, "`tilt` has shape (8,) and mean 2.0; (8,) and 1 are wanted."),
        ({"tilt": torch.tensor([0.0, 2.0] * 4)}, "damaged or of other bins"),
        ({"tilt": torch.tensor([-1.0, 3.0] * 4)}, "damaged or of other bins"),
        ({"tilt": torch.ones(9)}, "`tilt` has shape (9,) and mean nan; (8,) and 1 are wanted."),
        ({"evidence.moments": None}, "Not the state of a LossVarianceTracker"),
        ({"evidence.moments": torch.full((6, 8), math.nan)}, "damaged: it holds values that are not finite."),
        ({"evidence.moments": torch.ones(6, 9)}, "`moments` is of shape (6, 9), not (6, 8)."),
        ({"evidence.edges": torch.linspace(-1, 1, 9)}, "The state has other bins"),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(changes, message):
    sampler = taught(SHORT, rounds=1, bins=8)
    before = sampler.state_dict()
    with pytest.raises(ValueError, match=r"state|whole") as raised:
        sampler.load_state_dict(damaged(**changes))
    assert message in str(raised.value)
    assert all(torch.equal(value, before[name]) for name, value in sampler.state_dict().items())


def test_the_state_of_another_rule_or_schedule_is_refused():
    with pytest.raises(ValueError, match="LossHistory"):
        ImportanceSampler(SHORT, "loss_second_moment").load_state_dict(taught(SHORT, bins=50).state_dict())
    with pytest.raises(ValueError, match="other bins"):
        ImportanceSampler(FLOW, bins=8).load_state_dict(damaged())


# processes ------------------------------------------------------------------------------------------------------------


def together(world_size, train):
    """Run ``train(rank, reduce)`` on threads whose ``reduce`` sums over all of them."""
    barrier, slots, results = threading.Barrier(world_size, timeout=60), [None] * world_size, [None] * world_size

    def work(rank):
        def reduce(tensor):
            slots[rank] = tensor.clone()
            barrier.wait()
            total = sum(slots)
            barrier.wait()
            return total

        results[rank] = train(rank, reduce)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("rule", ["gradient", "variance"])
def test_processes_agree_on_the_q_of_one_process_with_all_losses(rule):
    def train(rank, reduce, world_size=2):
        options = {"rank": rank, "world_size": world_size, "refresh_every": 5, "warm_up": 2, "seed": 3}
        sampler = importance(LINEAR, rule, reduce=reduce, **options)
        drawn = []
        for _ in range(41):
            t = sampler.draw(32 // world_size).t
            sampler.update(t, small_gradient(LINEAR, t)[1])
            drawn.append(t)
        sampler.refresh()
        return sampler, drawn

    (first, drawn), (second, others) = together(2, train)
    one, alone = train(0, None, world_size=1)
    assert torch.equal(q_of(first), q_of(second))
    assert float((q_of(one) * 32 - 1).abs().max()) > 0.3
    torch.testing.assert_close(q_of(first), q_of(one), rtol=0, atol=1e-12)
    assert all(torch.equal(torch.cat(parts), t) for *parts, t in zip(drawn, others, alone, strict=True))
    assert first.predicted() == second.predicted()


def test_processes_agree_on_histories():
    def train(rank, reduce):
        sampler = ImportanceSampler(SHORT, "loss_second_moment", rank=rank, world_size=2, reduce=reduce)
        t = torch.arange(50).repeat(10)
        sampler.update(t, 1.0 + t * (1 + rank))
        sampler.refresh()
        return sampler

    first, second = together(2, train)
    assert torch.equal(q_of(first), q_of(second))
    t = torch.arange(50.0, dtype=torch.float64)
    root = (((1 + t) ** 2 + (1 + 2 * t) ** 2) / 2).sqrt().flip(0)
    np.testing.assert_allclose(q_of(first), mixed(np.full(50, 1 / 50), root.numpy(), 0.001), rtol=1e-12)


# other rules and evidence ---------------------------------------------------------------------------------------------


def test_a_users_rule():
    rule = Rule(lambda statistics: statistics.mean, "something else", floor=0.2)
    sampler = importance(LINEAR, rule, bins=4, warm_up=1)
    sampler.update(*per_bin(sampler, torch.tensor([[1.0, 2.0, 3.0, 4.0]])))
    sampler.refresh()
    expected = mixed(np.full(4, 0.25), np.array([1.0, 2.0, 3.0, 4.0]), 0.2)
    np.testing.assert_allclose(q_of(sampler), expected, rtol=1e-12)
    assert sampler.predicted().of == "something else"


@pytest.mark.parametrize("rule", ["gradient", "variance"])
@pytest.mark.parametrize("schedule", [LINEAR, FLOW, SCHEDULES["zero_snr"]])
def test_a_users_tracker_with_its_own_bins(schedule, rule):
    tracker = LossVarianceTracker(bins=40)
    sampler = taught(schedule, rule, evidence=tracker, warm_up=1)
    assert sampler.evidence is tracker
    p, q = sampler.probabilities()
    assert len(p) == 40
    table = schedule.log_snr(TimestepSampler(schedule).at((torch.arange(10**5, dtype=torch.float64) + 0.5) / 10**5).t)
    shares = torch.bucketize(table, tracker.edges[1:-1]).bincount(minlength=40) / 1e5
    np.testing.assert_allclose(p, shares, atol=2e-5)
    assert (q[p == 0] == 0).all()
    t, weight = sampler.draw(50_000)
    assert weight.isfinite().all()
    assert ((bin_of(sampler, t).bincount(minlength=40) - 50_000 * q).abs() < 2).all()
    assert float(weight.double().mean()) == pytest.approx(1, abs=2e-3)


# cost -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [LINEAR, FLOW])
@pytest.mark.parametrize("rule", RULES)
def test_nothing_waits_for_the_device(rule, schedule):
    sampler = importance(schedule, rule, refresh_every=2)
    loss = torch.rand(8, requires_grad=True)
    with NoHostSync():
        for _ in range(4):
            t, _ = sampler.draw(8)
            sampler.update(t, loss, weight=torch.ones(8), gradient_square=loss)
        sampler.refresh()
    assert not any(value.requires_grad for value in sampler.state_dict().values())


@pytest.mark.parametrize("rule", RULES)
def test_memory_is_fixed(rule):
    sampler = importance(SHORT, rule)
    before = {name: value.shape for name, value in sampler.state_dict().items()}
    trained(sampler, 2000)
    assert {name: value.shape for name, value in sampler.state_dict().items()} == before


# bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_losses_that_are_negative_or_not_finite_are_counted_and_kept_out(rule):
    clean, dirty = (importance(SHORT, rule, bins=8) for _ in range(2))
    t, loss = per_bin(clean, ROWS)
    clean.update(t, loss)
    dirty.update(t, loss)
    dirty.refresh()
    bad = torch.tensor([-1.0, math.nan, math.inf, -math.inf])
    dirty.update(t[:4], bad)
    dirty.update(t[:4], bad, weight=torch.full((4,), 0.5))
    for sampler in (clean, dirty):
        sampler.refresh()
    # moments fade with every update, which rounds them
    torch.testing.assert_close(q_of(dirty), q_of(clean), rtol=1e-12, atol=0)
    faded = 1.0 if dirty.evidence.__class__ is LossHistory else dirty.evidence.decay
    assert float(dirty.evidence.compute().nonfinite.sum()) == pytest.approx(4 + 4 * faded)
    assert float(clean.evidence.compute().nonfinite.sum()) == 0


def test_gradients_that_are_negative_or_not_finite_are_kept_out():
    clean, dirty = (ImportanceSampler(SHORT, "gradient", bins=8) for _ in range(2))
    t, square = per_bin(clean, ROWS)
    for sampler in (clean, dirty):
        sampler.update(t, square, gradient_square=square)
    dirty.update(t[:3], torch.ones(3), gradient_square=torch.tensor([-1e6, math.nan, math.inf]))
    for sampler in (clean, dirty):
        sampler.refresh()
    torch.testing.assert_close(q_of(dirty), q_of(clean), rtol=1e-12, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_losses_of_zero_leave_q_at_p(rule):
    sampler = importance(SHORT, rule, bins=8)
    t, loss = per_bin(sampler, ROWS)
    sampler.update(t, 0 * loss)
    sampler.refresh()
    p, q = sampler.probabilities()
    assert torch.equal(p, q)
    assert str(sampler.predicted()).endswith("not measured yet")


def test_a_bin_of_zero_losses_is_drawn_at_the_floor():
    sampler = ImportanceSampler(SHORT, "gradient", bins=2, floor=0.25, warm_up=1)
    sampler.update(*per_bin(sampler, torch.tensor([[0.0, 3.0]])))
    sampler.refresh()
    np.testing.assert_allclose(q_of(sampler), [0.125, 0.875], rtol=1e-12)
    assert sampler.draw(1000).weight.max() == pytest.approx(4)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (
            {"rule": "loss"},
            ValueError,
            "Unknown rule 'loss'; choose one of ['loss_second_moment', 'gradient', 'variance', 'gap']",
        ),
        ({"mode": "weigh"}, ValueError, "`mode` must be one of ['resample', 'reweight', 'uncorrected'], got 'weigh'."),
        ({"bins": 0}, ValueError, "`bins` must be >= 1, got 0."),
        ({"warm_up": 0}, ValueError, "`warm_up` must be >= 1, got 0."),
        ({"refresh_every": 0}, ValueError, "`refresh_every` must be >= 1, got 0."),
        ({"floor": 0}, ValueError, "`floor` must be in (0, 1], got 0: a noise level that is never drawn would bias."),
        ({"floor": 1.5}, ValueError, "`floor` must be in (0, 1], got 1.5"),
        ({"floor": math.nan}, ValueError, "`floor` must be in (0, 1], got nan"),
        ({"rule": Rule(lambda s: s.mean, "x", floor=0.0)}, ValueError, "`floor` must be in (0, 1], got 0.0"),
        ({"draws": "sobol"}, ValueError, "`draws` must be one of"),
        ({"density": "gauss"}, ValueError, "Unknown density 'gauss'"),
        ({"base": "cosine"}, TypeError, "An ImportanceSampler takes no `base`"),
        ({"evidence": LossVarianceTracker(), "bins": 8}, ValueError, "Give `evidence`, or `bins` and `reduce`"),
        ({"evidence": LossVarianceTracker(), "reduce": sum}, ValueError, "Give `evidence`, or `bins` and `reduce`"),
        ({"evidence": LossHistory(torch.tensor([0.0, 1.0]))}, ValueError, "`evidence` is a LossHistory, which lacks"),
    ],
)
def test_a_bad_argument_is_named(arguments, kind, message):
    with pytest.raises(kind) as raised:
        ImportanceSampler("linear", **arguments)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("loss", (3,)), ("loss", (4, 1)), ("loss", ()), ("weight", (3,)), ("gradient_square", (4, 1))],
)
def test_a_wrong_shape_is_named(name, shape):
    given = {"loss": torch.ones(4), name: torch.ones(shape)}
    with pytest.raises(ValueError, match="must have the shape") as raised:
        ImportanceSampler("linear").update(torch.arange(4), **given)
    assert str(raised.value) == f"`{name}` must have the shape (B,) of `t`, (4,), got {shape}."


def test_a_short_schedule_has_fewer_bins():
    sampler = ImportanceSampler(DiscreteSchedule.from_name("linear", 10), "gradient")
    assert len(sampler.probabilities()[0]) == 10


def test_it_says_what_it_draws():
    text = repr(ImportanceSampler(FLOW, "gradient", mode="reweight"))
    assert text == (
        "ImportanceSampler(\"the gradient at the model's output\", 'reweight', 32 bins, FlowUniform(shift=1.0))"
    )
