"""Samplers of masked diffusion against a joint distribution that can be solved, and what each promises."""

import functools
import itertools

import pytest
import torch
from diffusers import AmusedScheduler
from snrweights.integrations.masked_sampling import SAMPLERS, ancestral, by_confidence

from snrweights.masked import CosineSchedule, LinearSchedule

LENGTH, LEVELS = 3, 3
STATES = torch.tensor(list(itertools.product(range(LEVELS), repeat=LENGTH)))  # (27, 3)
JOINT = torch.rand(len(STATES), generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 2 + 0.02
JOINT /= JOINT.sum()
BOTH = sorted(SAMPLERS)


def exact(tokens):
    """Return the logits of every token given those that are known, under the joint."""
    agrees = ((tokens[:, None] == STATES) | (tokens[:, None] == LEVELS)).all(-1)  # (B, 27)
    of_value = torch.nn.functional.one_hot(STATES, LEVELS).to(JOINT.dtype)  # (27, 3, 3)
    return torch.einsum("bs,s,slk->blk", agrees.to(JOINT.dtype), JOINT, of_value).log()


def generators(count, seed=0):
    return [torch.Generator().manual_seed(1000 * seed + i) for i in range(count)]


def masked(count, length=LENGTH, mask_id=LEVELS):
    return torch.full((count, length), mask_id)


@functools.cache
def revealed_in(order):
    """Return the probability of each state where token i is revealed in turn number ``order[i]``."""
    known, probability = torch.full_like(STATES, LEVELS), torch.ones_like(JOINT)
    for turn in sorted(set(order)):
        due = torch.tensor([one == turn for one in order])
        log_p = exact(known).log_softmax(-1).gather(-1, STATES[..., None])[..., 0]
        probability = probability * log_p[:, due].sum(1).exp()
        known = torch.where(due, STATES, known)
    return probability


def law(schedule, steps):
    """Return the distribution that the ancestral sampler of the exact model has, by all orders of revealing."""
    chances = schedule.alpha(torch.linspace(1, 0, steps + 1, dtype=torch.float64)).diff()
    total = torch.zeros_like(JOINT)
    for when in itertools.product(range(steps), repeat=LENGTH):
        turns = sorted(set(when))
        total += chances[list(when)].prod() * revealed_in(tuple(turns.index(one) for one in when))
    return total


def chi_square(samples, expected):
    """Return Pearson's statistic over its mean, 1; its standard deviation is 0.28."""
    places = (samples * LEVELS ** torch.arange(LENGTH - 1, -1, -1)).sum(1)
    expected = expected * len(samples)
    seen = torch.bincount(places, minlength=len(STATES))
    return ((seen - expected) ** 2 / expected).sum().item() / (len(STATES) - 1)


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineSchedule()], ids=["linear", "cosine"])
def test_ancestral_samples_of_an_exact_model_approach_the_joint(schedule):
    away = []
    for steps in (1, LENGTH, 24):
        expected = law(schedule, steps)
        samples = ancestral(exact, masked(4000), LEVELS, schedule, steps, generators=generators(4000))
        assert chi_square(samples, expected) < 2
        away.append((expected - JOINT).abs().sum().item() / 2)
    assert away[0] > 0.15  # all at once, as if they were independent
    assert away[1] < away[0] / 2
    assert away[2] < away[0] / 15  # two tokens in one step, in a few samples
    assert chi_square(samples, JOINT) < 2


def test_what_is_left_of_the_error_falls_as_one_over_the_steps():
    errors = [(law(LinearSchedule(), steps) - JOINT).abs().sum().item() for steps in (1, 4, 8, 16)]
    assert errors[2] / errors[1] == pytest.approx(0.5, abs=0.1)
    assert errors[3] / errors[2] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("steps", [1, 3, 7, 30])
def test_each_step_reveals_what_the_schedule_says(steps):
    """Ancestral: so many in the mean; by confidence: so many exactly."""
    count, length = 64, 20
    for schedule in (LinearSchedule(), CosineSchedule()):
        at = {1 - float(a): i for i, a in enumerate(schedule.alpha(torch.linspace(1, 0, steps + 1).double()))}
        for name in BOTH:
            seen = []

            def predict(tokens, seen=seen):
                seen.append((tokens == 5).sum(1))
                return torch.randn(*tokens.shape, 5, generator=torch.Generator().manual_seed(len(seen)))

            done = SAMPLERS[name](predict, masked(count, length, 5), 5, schedule, steps, generators=generators(count))
            assert ((done >= 0) & (done < 5)).all()
            assert seen[0].eq(length).all()
            if name == "confidence":
                prescribed = list(dict.fromkeys(round(length * ratio) for ratio in at))  # steps that reveal none
                assert prescribed[-1] == 0
                assert [left.unique().tolist() for left in seen] == [[left] for left in prescribed[:-1]]
            elif steps < 10:
                for left, ratio in zip(seen, at, strict=False):
                    error = (length * ratio * (1 - ratio) / count) ** 0.5
                    assert left.double().mean().item() == pytest.approx(length * ratio, abs=4 * error + 1e-9)


@pytest.mark.parametrize("name", BOTH)
def test_known_tokens_stay(name):
    tokens = torch.randint(0, 5, (16, 20), generator=torch.Generator().manual_seed(1))
    given = torch.rand(16, 20, generator=torch.Generator().manual_seed(2)) < 0.5
    start = tokens.where(given, 5)

    def predict(x):
        assert torch.equal(x[given], tokens[given])
        return torch.zeros(*x.shape, 5)

    done = SAMPLERS[name](predict, start, 5, LinearSchedule(), 8, generators=generators(16))
    assert torch.equal(done[given], tokens[given])
    assert done.max() == 4
    none = SAMPLERS[name](pytest.fail, tokens, 5, LinearSchedule(), 8, generators=generators(16))
    assert torch.equal(none, tokens)  # nothing to reveal, nothing to ask


@pytest.mark.parametrize("name", BOTH)
def test_a_row_is_a_function_of_its_generator(name):
    def sample(rows):
        drawn = generators(6)
        return SAMPLERS[name](
            exact, masked(len(rows)), LEVELS, CosineSchedule(), 3, generators=[drawn[i] for i in rows]
        )

    together = sample(range(6))
    assert torch.equal(together, sample(range(6)))
    assert torch.equal(together[[4, 1]], sample([4, 1]))
    assert not torch.equal(together, sample([5, 4, 3, 2, 1, 0]))


def test_by_confidence_at_temperature_0_nothing_is_random():
    def sample(seed, **temperatures):
        options = {"generators": generators(8, seed), **temperatures}
        return by_confidence(exact, masked(8), LEVELS, LinearSchedule(), 4, **options)

    cold = {"temperature": 0, "choice_temperature": 0}
    assert torch.equal(sample(0, **cold), sample(1, **cold))
    assert len(sample(0, **cold).unique(dim=0)) == 1
    for warm in ({**cold, "temperature": 1.0}, {**cold, "choice_temperature": 4.5}):
        assert not torch.equal(sample(0, **warm), sample(1, **warm))
    # one after another, the surest first: by hand
    tokens = masked(1)
    for _ in range(LENGTH):
        log_p = exact(tokens).log_softmax(-1).masked_fill((tokens != LEVELS)[..., None], -torch.inf)
        place, value = divmod(log_p.flatten().argmax().item(), LEVELS)
        tokens[0, place] = value
    assert torch.equal(sample(0, **cold)[:1], tokens)


@pytest.mark.parametrize("choice_temperature", [0.3, 1.0])
def test_the_noise_of_the_choice_is_gumbels_and_falls_with_the_steps(choice_temperature):
    """Of two tokens the surer by d is first with probability sigmoid(d / (choice_temperature (1 - 1 / 2)))."""
    count, seen = 6000, []
    logits = torch.tensor([[[0.9, 0.1], [0.6, 0.4]]]).log().expand(count, 2, 2)

    def predict(tokens):
        seen.append(tokens != 2)
        return logits

    options = {"generators": generators(count), "temperature": 0, "choice_temperature": choice_temperature}
    by_confidence(predict, masked(count, 2, 2), 2, LinearSchedule(), 2, **options)
    first = seen[1].double().mean(0)
    expected = 1 / (1 + (0.6 / 0.9) ** (2 / choice_temperature))
    assert first.tolist() == pytest.approx([expected, 1 - expected], abs=0.02)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_at_the_temperature(temperature):
    count, logits = 6000, torch.tensor([0.0, 1.0, -1.0])
    expected = (logits / temperature).softmax(-1)
    for name in BOTH:
        options = {"generators": generators(count), "temperature": temperature}
        drawn = SAMPLERS[name](
            lambda x: logits.expand(*x.shape, 3), masked(count, 1), LEVELS, LinearSchedule(), 1, **options
        )
        seen = torch.bincount(drawn.flatten(), minlength=3) / count
        torch.testing.assert_close(seen, expected, rtol=0, atol=0.025)


def test_tokens_that_are_equally_sure_are_revealed_in_the_prescribed_number_which_amused_does_not():
    """Why diffusers' scheduler is not used: the margin of digits is sure to all digits of float32."""
    logits = torch.tensor([0.0, 60.0, 0.0]).expand(1, 16, 3)
    left = []

    def predict(tokens):
        left.append((tokens == LEVELS).sum().item())
        return logits

    by_confidence(predict, masked(1, 16), LEVELS, LinearSchedule(), 4, generators=generators(1), choice_temperature=0)
    assert left == [16, 12, 8, 4]
    amused = AmusedScheduler(mask_token_id=LEVELS, masking_schedule="linear")
    amused.set_timesteps(4, temperature=(0, 0))
    first = amused.step(logits, amused.timesteps[0], masked(1, 16), generator=torch.Generator()).prev_sample
    assert (first == LEVELS).sum() == 0  # 12 were to stay


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("ancestral", {"steps": 0}, "`steps` must be >= 1, got 0"),
        ("confidence", {"temperature": -1.0}, "`temperature` must be >= 0, got -1.0"),
        ("confidence", {"choice_temperature": -0.5}, "`choice_temperature` must be >= 0, got -0.5"),
        ("ancestral", {"generators": []}, "`generators` must be one for each of 2 rows, got 0"),
    ],
)
def test_what_cannot_be_is_refused(name, options, said):
    options = {"steps": 2, "generators": generators(2), **options}
    with pytest.raises(ValueError, match=said):
        SAMPLERS[name](exact, masked(2), LEVELS, LinearSchedule(), **options)
