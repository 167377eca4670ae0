"""The loss of masked diffusion: draws, masks, what is refused, and the measured ELBO."""

import math

import numpy as np
import pytest
import torch
from joints import LENGTH, MASK_ID, MASKS, TOKENS, Joint, wrong_model
from masked_formulas import INF, METHODS, SCHEDULES
from scipy import stats

import snrweights
from snrweights import masked
from snrweights.masked import (
    CosineSchedule,
    PolynomialSchedule,
    count_factor,
    draw_times,
    elbo_from_token_mean,
    get_masked_schedule,
    get_masked_weighting,
    is_monotone,
    mask_tokens,
    masked_factor,
    masked_loss,
    masked_weight,
    negative_elbo,
    token_mean,
)


@pytest.fixture(scope="module")
def joint():
    return Joint()


@pytest.fixture(scope="module")
def wrong():
    return wrong_model()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("counts", ["independent", "exact"])
def test_masks_have_the_distribution_they_state(schedule, counts):
    number, ratio = 40_000, 0.6
    t = get_masked_schedule(schedule).time(torch.full((number,), 1 - ratio, dtype=torch.float64))
    tokens = torch.zeros(number, LENGTH, dtype=torch.long)
    masked, mask = mask_tokens(tokens, t, schedule, MASK_ID, counts=counts, generator=seeded(1))
    assert torch.equal(masked == MASK_ID, mask)
    everything = torch.cat((torch.zeros(1, LENGTH, dtype=torch.bool), MASKS))
    seen = torch.stack([(mask == each).all(1).sum() for each in everything]).double().numpy()
    count = everything.sum(1).numpy()
    if counts == "exact":  # ceil(0.6 * 4) = 3 of 4
        assert (seen[count != 3] == 0).all()
        expected = np.full(4, number / 4)
        assert stats.chisquare(seen[count == 3], expected).pvalue > 1e-3
    else:
        expected = number * ratio**count * (1 - ratio) ** (LENGTH - count)
        assert stats.chisquare(seen, expected).pvalue > 1e-3


def test_exact_counts_are_uniform_at_uniform_ratio():
    t = draw_times(6000, draws="stratified", generator=seeded(0))
    _, mask = mask_tokens(torch.zeros(6000, 6, dtype=torch.long), t, "linear", 9, counts="exact")
    assert mask.sum(1).bincount().tolist() == [0, *[1000] * 6]


def test_exact_counts_at_the_ends_are_one_and_all():
    t = torch.tensor([0.0, 2.0**-24, 1 - 2.0**-24, 1.0])
    _, mask = mask_tokens(torch.zeros(4, 5, dtype=torch.int32), t, "cosine", 9, counts="exact")
    assert mask.sum(1).tolist() == [1, 1, 5, 5]
    _, mask = mask_tokens(torch.zeros(4, 5, dtype=torch.int32), t[[0, 3]].repeat(2), "cosine", 9)
    assert mask.sum(1).tolist() == [0, 5, 0, 5]


def test_masks_come_from_the_generator_and_tokens_keep_their_dtype():
    tokens, t = torch.arange(40, dtype=torch.int32).reshape(4, 10), torch.full((4,), 0.5)
    first, second, third = (mask_tokens(tokens, t, "linear", 99, generator=seeded(seed))[0] for seed in (1, 1, 2))
    assert first.dtype == torch.int32
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert torch.equal(first[first != 99], tokens[first != 99])


def test_antithetic_times_are_pairs_and_never_an_end():
    for size in (6, 7):
        t = draw_times(size, generator=seeded(3))
        half = (size + 1) // 2
        torch.testing.assert_close(t[:half][: size - half] + t[half:], torch.ones(size - half), rtol=0, atol=1e-7)
    assert t.dtype == torch.float32
    assert t.shape == (7,)
    assert torch.equal(t, draw_times(7, generator=seeded(3)))
    assert not torch.equal(t, draw_times(7))
    torch.manual_seed(0)
    first = draw_times(7)
    torch.manual_seed(0)
    assert torch.equal(first, draw_times(7))


@pytest.mark.parametrize("draws", ["antithetic", "independent", "stratified"])
def test_times_are_uniform_inside_the_open_interval(draws, monkeypatch):
    t = torch.cat([draw_times(64, draws=draws, generator=seeded(i)) for i in range(300)])
    assert stats.kstest(t.numpy(), "uniform").pvalue > 1e-3
    monkeypatch.setitem(masked.draws.DRAWS, draws, lambda count, stream: torch.tensor([0.0, 1.0], dtype=torch.float64))
    ends = draw_times(2, draws=draws)
    assert 0 < ends[0] < ends[1] < 1
    for method in METHODS:
        assert masked_weight(ends, "linear", method).isfinite().all()


def test_antithetic_times_vary_less_than_independent_ones():
    def spread(draws):
        means = [
            masked_weight(draw_times(8, draws=draws, generator=seeded(i)), "linear", "simple").mean()
            for i in range(300)
        ]
        return torch.stack(means).var()

    assert spread("antithetic") < 1e-10 < spread("stratified") < spread("independent") / 10


def batch(seed=0):
    stream = seeded(seed)
    logits = torch.randn(5, LENGTH, TOKENS, generator=stream)
    tokens = torch.randint(0, TOKENS, (5, LENGTH), generator=stream)
    mask = torch.rand(5, LENGTH, generator=stream) < 0.5
    mask[0], mask[1] = False, True
    return logits, tokens, mask, torch.tensor([0.0, 1.0, 0.3, 0.5, 0.9])


def test_the_loss_is_the_factor_times_the_sum_over_masked_tokens():
    logits, tokens, mask, t = batch()
    losses = masked_loss(logits, tokens, mask, t, "cosine", "sigmoid", reduction="none", bias=1.0)
    for i in range(1, 5):
        total = sum(-logits[i, j].log_softmax(0)[tokens[i, j]] for j in range(LENGTH) if mask[i, j])
        factor = masked_factor(t[i : i + 1], "cosine", "sigmoid", bias=1.0)[0]
        assert losses[i].item() == pytest.approx((factor * total).item(), rel=1e-5)
    assert losses[0] == 0
    mean = masked_loss(logits, tokens, mask, t, CosineSchedule(), masked.get_masked_weighting("sigmoid", bias=1.0))
    assert mean.item() == pytest.approx(losses.mean().item(), rel=1e-6)


@pytest.mark.parametrize("counts", ["independent", "exact"])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_masked_is_no_loss_and_no_gradient(method, counts):
    logits, tokens, mask, t = batch()
    logits.requires_grad_()
    loss = masked_loss(logits[:1], tokens[:1], mask[:1], t[:1], "linear", method, counts=counts)
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()
    assert (token_mean(logits[:1], tokens[:1], mask[:1]) == 0).all()


def test_what_is_not_masked_does_not_matter():
    logits, tokens, mask, t = batch()
    expected = masked_loss(logits, tokens, mask, t, "linear", "simple", reduction="none")
    junk = tokens.masked_fill(~mask, -7)
    certain = logits.masked_fill(~mask[..., None], -INF)
    certain[..., 0] = certain[..., 0].masked_fill(~mask, 0)
    certain.requires_grad_()
    losses = masked_loss(certain, junk, mask, t, "linear", "simple", reduction="none")
    assert torch.equal(losses, expected)
    losses.sum().backward()
    assert (certain.grad[~mask] == 0).all()
    assert certain.grad.isfinite().all()


def test_half_precision_logits_are_summed_in_single():
    logits, tokens, mask, t = batch()
    loss = masked_loss(logits.bfloat16(), tokens, mask, t, "linear", "simple")
    assert loss.dtype == torch.float32
    assert loss == masked_loss(logits.bfloat16().float(), tokens, mask, t, "linear", "simple")
    assert masked_weight(t.bfloat16(), "linear", "simple").dtype == torch.float32


@pytest.mark.parametrize("counts", ["independent", "exact"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_reads_no_values(method, counts):
    """On the meta device, where reading one is an error."""
    logits, tokens, mask, t = (each.to("meta") for each in batch())
    for schedule in SCHEDULES:
        assert masked_loss(logits, tokens, mask, t, schedule, method, counts=counts).shape == ()
        assert masked_weight(t, schedule, method).device.type == "meta"
    assert mask_tokens(tokens, t, "linear", MASK_ID, counts=counts)[1].device.type == "meta"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"t": torch.full((5,), 1.5)}, ValueError, r"`t` must lie in \[0, 1\], got 1.5"),
        ({"t": torch.full((5,), -1e-3)}, ValueError, r"`t` must lie in \[0, 1\], got -0.001"),
        ({"t": torch.full((5,), math.nan)}, ValueError, r"`t` must lie in \[0, 1\], got nan"),
        ({"t": torch.ones(5, dtype=torch.long)}, TypeError, "`t` must be a floating point tensor.*got torch.int64"),
        ({"t": 0.5}, TypeError, "`t` must be a floating point tensor.*got float"),
        ({"t": torch.rand(4)}, ValueError, r"one time per sequence, shape \(5,\), got \(4,\)"),
        ({"t": torch.rand(5, 1)}, ValueError, r"one time per sequence, shape \(5,\), got \(5, 1\)"),
        ({"tokens": torch.rand(5, LENGTH)}, TypeError, "`tokens` must be a tensor of integers, got torch.float32"),
        ({"tokens": torch.ones(5, LENGTH) > 0}, TypeError, "`tokens` must be a tensor of integers, got torch.bool"),
        ({"tokens": torch.ones(LENGTH).long()}, ValueError, r"`tokens` must have shape \(B, L\).*got \(4,\)"),
        ({"tokens": torch.ones(0, LENGTH).long()}, ValueError, r"`tokens` must have shape \(B, L\).*got \(0, 4\)"),
        ({"logits": torch.ones(5, TOKENS)}, ValueError, r"`logits` must have shape \(5, 4, K\).*got \(5, 3\)"),
        (
            {"logits": torch.ones(5, TOKENS, LENGTH)},
            ValueError,
            r"`logits` must have shape \(5, 4, K\).*got \(5, 3, 4\)",
        ),
        (
            {"mask": torch.ones(5, LENGTH)},
            TypeError,
            "`mask` must be bool, True where a token is masked, got torch.float32",
        ),
        ({"mask": torch.ones(5, 1) > 0}, ValueError, r"`mask` must have the shape of `tokens`, \(5, 4\), got \(5, 1\)"),
        (
            {"schedule": "sine"},
            ValueError,
            r"Unknown masking schedule 'sine'; choose one of \['linear', 'cosine', 'polyn",
        ),
        ({"schedule": 3}, TypeError, r"`schedule` must be a name in \['linear', .*or a MaskedSchedule, got 3"),
        ({"schedule": snrweights.CosineSchedule()}, TypeError, "a MaskedSchedule, got CosineSchedule"),
        ({"method": "min_snr"}, ValueError, r"Unknown weighting 'min_snr'; choose one of \['elbo', 'simple', 'flow'"),
        ({"method": snrweights.get_weighting("elbo")}, TypeError, r"or a MaskedWeighting, got ELBO\(\)"),
        ({"gamma": 5}, ValueError, r"Weighting 'elbo' has no hyperparameter 'gamma'; it takes \[\]"),
        (
            {"method": "sigmoid", "bias": math.nan},
            ValueError,
            r"`Sigmoid\(bias=...\)` must be a finite number, got nan",
        ),
        ({"method": get_masked_weighting("sigmoid"), "bias": 2}, TypeError, r"\['bias'\] go with a method's name only"),
        ({"counts": "all"}, ValueError, r"`counts` must be one of \['independent', 'exact'\], got 'all'"),
        ({"reduction": "sum"}, ValueError, r"Unknown reduction 'sum'; choose one of \['mean', 'none'\]"),
    ],
)
def test_what_has_no_meaning_is_refused_with_the_choices(change, error, message):
    logits, tokens, mask, _ = batch()
    arguments = {"logits": logits, "tokens": tokens, "mask": mask, "t": torch.full((5,), 0.5), "schedule": "linear"}
    masked_loss(**arguments)
    with pytest.raises(error, match=message):
        masked_loss(**{**arguments, **change})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: PolynomialSchedule(0.0),
            ValueError,
            r"`PolynomialSchedule\(power=...\)` must be > 0 and finite, got 0.0",
        ),
        (lambda: PolynomialSchedule(math.nan), ValueError, "> 0 and finite, got nan"),
        (lambda: draw_times(0), ValueError, "`batch_size` must be >= 1, got 0"),
        (lambda: draw_times(1, draws="sobol"), ValueError, r"`draws` must be one of \['independent', .*got 'sobol'"),
        (lambda: mask_tokens(torch.ones(2, 2), torch.rand(2), "linear", 9), TypeError, "`tokens`.*got torch.float32"),
        (lambda: mask_tokens(torch.ones(2, 2).long(), torch.rand(3), "linear", 9), ValueError, r"got \(3,\)"),
        (lambda: mask_tokens(torch.ones(2, 2).long(), torch.full((2,), 2.0), "linear", 9), ValueError, "got 2.0"),
        (
            lambda: mask_tokens(torch.ones(2, 2).long(), torch.rand(2), "linear", 9, counts="some"),
            ValueError,
            r"`counts` must be one of \['independent', 'exact'\], got 'some'",
        ),
        (
            lambda: mask_tokens(torch.ones(2, 2).long(), torch.rand(2), "linear", 1.5),
            TypeError,
            "`mask_id` must be an integer, got 1.5",
        ),
        (lambda: elbo_from_token_mean(1.0, 0), ValueError, "`length` must be >= 1, got 0"),
        (lambda: elbo_from_token_mean(1.0, 4, counts="some"), ValueError, "got 'some'"),
        (lambda: count_factor(0, "linear", "elbo"), ValueError, "`length` must be >= 1, got 0"),
        (lambda: negative_elbo(lambda z: z, torch.ones(2, 2).long(), 9, draws=0), ValueError, "`draws` must be >= 1"),
        (lambda: negative_elbo(lambda z: z, torch.ones(2, 2).long(), 9, batch_size=0), ValueError, "`batch_size`"),
        (
            lambda: negative_elbo(lambda z: z, torch.ones(2, 2).long(), 9),
            ValueError,
            r"`logits` must have shape \(2, 2",
        ),
        (lambda: masked_weight(torch.tensor([0.5, math.nan]), "linear", "elbo"), ValueError, "got nan"),
        (lambda: is_monotone("edm", "x"), ValueError, "Unknown masking schedule 'x'"),
    ],
)
def test_other_arguments_are_refused_too(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_measured_elbo_is_the_entropy_within_its_error(joint):
    results = [negative_elbo(joint.predict, joint.sample(400, i), MASK_ID, generator=seeded(i)) for i in range(60)]
    scores = torch.tensor([(result.nats - joint.entropy.item()) / result.error for result in results])
    assert abs(scores.mean()) < 3 / math.sqrt(60)
    assert 0.5 < scores.std() < 1.3


def test_draws_and_strata_lower_the_variance_on_fixed_sequences(joint, wrong):
    tokens = joint.sample(64, 1)

    def spread(**options):
        return np.std([negative_elbo(wrong, tokens, MASK_ID, generator=seeded(i), **options).nats for i in range(60)])

    one, four = spread(), spread(draws=4)
    assert one < negative_elbo(wrong, tokens, MASK_ID).error
    assert four < one / 1.5


def test_batches_give_the_same_elbo_and_no_gradient(joint):
    tokens = joint.sample(50, 1)
    sizes = []
    weight = torch.ones((), requires_grad=True)

    def predict(masked):
        sizes.append(len(masked))
        assert not (weight * masked).requires_grad
        return joint.predict(masked)

    result = negative_elbo(predict, tokens, MASK_ID, draws=200, batch_size=20, generator=seeded(1))
    assert sizes[:3] == [20, 20, 10]
    assert len(sizes) == 600
    at_once = negative_elbo(joint.predict, tokens, MASK_ID, draws=200, generator=seeded(2))
    assert result.nats == pytest.approx(at_once.nats, rel=0.02)
    assert result.length == LENGTH
    assert result.bits_per_token == pytest.approx(result.nats / LENGTH / math.log(2))


def test_one_sequence_has_no_standard_error():
    result = negative_elbo(lambda masked: torch.zeros(1, 3, 2), torch.tensor([[0, 1, 0]]), 2)
    assert math.isnan(result.error)
    assert result.nats == pytest.approx(3 * math.log(2))
