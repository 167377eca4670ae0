"""The one pass over the data: seeds, labels, flips, precision, error bars; the subset estimators; the file."""

import json
import math
from itertools import pairwise

import pytest
import torch

from snrweights.optimal import OptimalLossCurve, optimal_loss
from snrweights.optimal.controls import controls, regressed
from snrweights.optimal.draws import PairSums, pair_sums
from snrweights.optimal.pairs import draws_of, level_sums
from snrweights.optimal.reference import ReferenceSet
from snrweights.optimal.subsets import subset_optimal_loss
from snrweights.optimal.work import Work
from snrweights.seeds import generator

SIGMAS = torch.tensor([0.3, 0.6, 1.0, 3.0], dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def posterior(x, sources, noise, sigma):
    """W (M, N) at x_g + sigma eps, by definition."""
    return (-torch.cdist(sources + sigma * noise, x).square() / (2 * sigma**2)).softmax(1)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_the_size_of_the_chunks_does_not_matter(chunk):
    x = normal(60, 5)
    for labels in (None, torch.arange(60) % 4):
        whole = optimal_loss(x, SIGMAS, draws=32, labels=labels)
        parts = optimal_loss(x, SIGMAS, draws=32, labels=labels, chunk=chunk)
        torch.testing.assert_close(parts.value, whole.value, rtol=1e-12, atol=0)
        torch.testing.assert_close(parts.stderr, whole.stderr, rtol=1e-11, atol=0)
        assert parts.how == whole.how


def test_the_seed_gives_the_bits():
    x = normal(50, 4).float()
    one, again, other = (optimal_loss(x, SIGMAS, draws=64, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.value, again.value)
    assert torch.equal(one.stderr, again.stderr)
    assert not torch.equal(one.value, other.value)


def test_sums_over_parts_of_the_points_add_up():
    x, noise = normal(40, 3), normal(9, 3, seed=1)
    inv, draws, drawn = SIGMAS.reciprocal().flip(0), torch.arange(9), draws_of(x[:9], noise)
    whole, left, right = (PairSums.zeros(4, 9, x.device) for _ in range(3))
    whole.add(x, drawn, inv, draws)
    left.add(x[:15], drawn, inv, draws)
    right.add(x[15:], drawn, inv, draws)
    left.merge(right)
    torch.testing.assert_close(left.values(), whole.values(), rtol=1e-13, atol=0)
    assert torch.equal(left.twins, whole.twins)
    assert torch.equal(left.confused(), whole.confused())


def test_every_draw_is_half_the_posterior_mean_of_d():
    x, noise = normal(40, 3), normal(9, 3, seed=1)
    sums = PairSums.zeros(4, 9, x.device)
    sums.add(x, draws_of(x[:9], noise), SIGMAS.reciprocal().flip(0), torch.arange(9))
    d = torch.cdist(x[:9], x).square()
    for level, sigma in enumerate(SIGMAS.flip(0)):
        both = [(posterior(x, x[:9], sign * noise, sigma) * d).sum(1) / 2 for sign in (1, -1)]
        torch.testing.assert_close(sums.values()[level], (both[0] + both[1]) / 2, rtol=1e-11, atol=1e-300)
        unsure = [posterior(x, x[:9], sign * noise, sigma)[range(9), range(9)] < 0.9 for sign in (1, -1)]
        assert sums.confused()[level] == (unsure[0] | unsure[1]).sum()


def test_three_forms_have_one_mean():
    """A - ||x_hat||², the posterior variance, and the pair form, on the same draws."""
    x = normal(30, 3)
    x = x - x.mean(0)
    g, noise = torch.randint(30, (40_000,), generator=generator(5)), normal(40_000, 3, seed=6)
    w = posterior(x, x[g], noise, 0.8)
    d = torch.cdist(x[g], x).square()
    ab = x.square().sum(1).mean() - (w @ x).square().sum(1)
    v = (w * d).sum(1) - (w @ x - x[g]).square().sum(1)
    pair = (w * d).sum(1) / 2
    for other in (ab, v):
        difference = other - pair
        assert difference.mean().abs() < 3 * difference.std() / 200
    curve = optimal_loss(x, [0.8], draws=4000)
    assert (curve.value - v.mean()).abs() < 3 * (curve.stderr**2 + v.var() / 40_000).sqrt()


def test_the_controls_are_those_of_the_definition_and_have_no_mean():
    reference = ReferenceSet(normal(200, 8) * torch.arange(1, 9), None, False, "cpu", 64)
    rows, noise = reference.rows(torch.arange(200)), normal(200, 8, seed=2)
    axes = reference.near_principal_axes(3, 0)
    lam, turn = torch.linalg.eigh(axes.T @ (rows.T @ rows) @ axes / 200)
    axes = axes @ turn
    c = controls(rows, noise, SIGMAS, reference.variance, axes, lam)
    for level, s in enumerate(SIGMAS):
        gain = lam / (lam + s**2)
        errors = [(((rows + sign * s * noise) @ axes * gain) @ axes.T - rows).square().sum(1) for sign in (1, -1)]
        mean = reference.variance - lam.sum() + ((1 - gain) ** 2 * lam + s**2 * gain**2).sum()
        torch.testing.assert_close(c[level, :, 1], (errors[0] + errors[1]) / 2 - mean, rtol=1e-9, atol=1e-9)
    without_noise = controls(rows, torch.zeros_like(noise), SIGMAS, reference.variance, axes, lam).mean(1)
    gain = lam / (lam + SIGMAS[:, None] ** 2)
    torch.testing.assert_close(without_noise[:, 0], torch.zeros(4).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(without_noise[:, 1], -((SIGMAS[:, None] * gain) ** 2).sum(1), atol=1e-9, rtol=1e-9)


def test_the_axes_are_the_principal_ones():
    x = normal(300, 12) * 2.0 ** -torch.arange(12)
    axes = ReferenceSet(x, None, False, "cpu", 100).near_principal_axes(4, 0)
    covariance = torch.cov(x.T, correction=0)
    lam, turn = torch.linalg.eigh(axes.T @ covariance @ axes)
    exact, vectors = torch.linalg.eigh(covariance)
    torch.testing.assert_close(lam, exact[-4:], rtol=1e-2, atol=0)
    torch.testing.assert_close(axes.T @ axes, torch.eye(4).double())
    assert ((axes @ turn) * vectors[:, -4:]).sum(0).abs().min() > 0.99


def test_the_regression_leaves_one_out():
    c, y = normal(1, 20, 2), normal(1, 20, seed=1)
    found = regressed(y, c)
    for m in range(20):
        others = [i for i in range(20) if i != m]
        design = torch.cat([torch.ones(19, 1), c[0, others]], 1)
        beta = torch.linalg.lstsq(design, y[0, others]).solution
        assert found[0, m] == pytest.approx((y[0, m] - c[0, m] @ beta[1:]).item(), rel=1e-9)


def test_the_regression_has_no_bias_at_few_draws():
    """y = c²: the slope fitted on all draws is correlated with their c."""
    c = torch.distributions.Exponential(torch.ones(1)).expand([40_000, 8, 1])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        c = c.sample().double() - 1
    y = c.square().squeeze(-1)
    means = regressed(y, c).mean(1)
    assert abs(means.mean() - 1) < 3 * means.std() / 200


@pytest.mark.parametrize("sigma", [0.06, 0.19, 0.4, 1.0, 4.0])
def test_the_error_bars_hold(sigma):
    """Over 300 replications: the share of |z| < 1.96 within 3 standard errors of .95, and no bias.

    At the smallest levels 40 and 100 of the 200 draws are confused.
    """
    x = normal(12, 2, seed=3)
    exact = optimal_loss(x, [sigma], draws=100_000, seed=999)
    z = torch.cat(
        [(c.value - exact.value) / c.stderr for s in range(300) for c in [optimal_loss(x, [sigma], draws=200, seed=s)]]
    )
    assert abs((z.abs() < 1.96).double().mean() - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 300)
    assert abs(z.mean()) < 3 / math.sqrt(300) + 0.05
    assert exact.how == ("pairs",)


def test_a_known_label_lowers_it_to_the_mean_over_classes():
    x, labels = normal(90, 4), torch.arange(90) % 2 + (torch.arange(90) % 5 == 0)
    known = optimal_loss(x, SIGMAS, draws=4000, labels=labels)
    unknown = optimal_loss(x, SIGMAS, draws=4000)
    classes = [(labels == c).sum() / 90 for c in range(3)]
    each = [optimal_loss(x[labels == c], SIGMAS, draws=4000, seed=c + 1) for c in range(3)]
    mean = sum(share * curve.value for share, curve in zip(classes, each, strict=True))
    error = sum((share * curve.stderr) ** 2 for share, curve in zip(classes, each, strict=True))
    assert ((known.value - mean).abs() < 3 * (error + known.stderr**2).sqrt()).all()
    assert (known.value < unknown.value).all()


def test_flips_are_the_set_with_its_mirror_images():
    x = normal(20, 2, 3, 4)
    labels = torch.arange(20) % 3
    doubled = torch.cat([x, x.flip(-1)])
    for own, both in ((None, None), (labels, labels.repeat(2))):
        flips = optimal_loss(x, [0.5, 2.0], draws=50, flips=True, labels=own, chunk=9)
        plain = optimal_loss(doubled, [0.5, 2.0], draws=50, labels=both)
        torch.testing.assert_close(flips.value, plain.value, rtol=1e-12, atol=0)
        assert flips.made["points"] == 40


def test_bytes_are_read_as_images_and_left_as_they_are():
    u = torch.randint(256, (30, 1, 4, 4), generator=generator(0), dtype=torch.uint8)
    before = u.clone()
    bytes_, floats = optimal_loss(u, [0.5, 3.0], draws=64), optimal_loss(u / 127.5 - 1, [0.5, 3.0], draws=64)
    torch.testing.assert_close(bytes_.value, floats.value, rtol=1e-6, atol=0)
    x = normal(20, 3)
    kept = x.clone()
    optimal_loss(x, [1.0], draws=8)
    assert torch.equal(u, before)
    assert torch.equal(x, kept)


def test_near_duplicates_far_from_the_origin_in_single_precision():
    """Twins .004 apart at ||x||² = 700: the matrix product alone has d = 1.6e-5 wrong by 2e-4, a logit by 25."""
    x = normal(200, 768)
    x[100:] = x[:100] + 0.004 * torch.nn.functional.normalize(normal(100, 768, seed=1), dim=1)
    x = x.float()
    noise = normal(64, 768, seed=2).float()
    inv = torch.tensor([1 / 0.002], dtype=torch.float64)
    found = PairSums.zeros(1, 64, x.device)
    found.add(x, draws_of(x[:64], noise), inv, torch.arange(64))
    d = (x.double()[:64, None] - x.double()).square().sum(2)
    e = ((x.double() - x.double()[:64, None]) * noise.double()[:, None]).sum(2)
    w = [(sign * e / 0.002 - d / (2 * 0.002**2)).softmax(1) for sign in (1, -1)]
    expected = sum((each * d).sum(1) / 2 for each in w) / 2
    torch.testing.assert_close(found.values()[0], expected, rtol=2e-3, atol=0)
    crude = x.square().sum(1) + x[:64].square().sum(1)[:, None] - 2 * x[:64] @ x.T
    assert (crude - d).abs().max() > 1e-5  # of the order of d itself
    curve = optimal_loss(x, [0.002], draws=64)
    assert curve.how == ("pairs",)


def test_distances_are_exact_for_the_source_and_its_twins():
    x = normal(30, 50).float()
    x[7] = x[3]
    d, e, twins = draws_of(x[[3, 5]], normal(2, 50, seed=1).float()).distances(x)
    assert d[0, 3] == d[0, 7] == d[1, 5] == e[0, 3] == e[0, 7] == e[1, 5] == 0
    assert twins.tolist() == [2, 1]


def test_pairs_that_are_dropped_change_nothing():
    d, e = normal(40, 30).square() * 50, 20 * normal(40, 30, seed=1)
    d[:, 0] = e[:, 0] = 0
    inv = torch.logspace(-2, 3, 12, dtype=torch.float64)
    kernels, weighted = level_sums(d, e, inv)
    for level, i in enumerate(inv):
        for sign, factor in enumerate((1, -1)):
            k = torch.exp(factor * i * e - i**2 * d / 2)
            torch.testing.assert_close(kernels[sign, level], k.sum(1), rtol=1e-12, atol=0)
            torch.testing.assert_close(weighted[sign, level], (k * d).sum(1), rtol=1e-12, atol=1e-20)


def test_draws_of_one_class_see_that_class_alone():
    x, labels = normal(30, 3), torch.arange(30) % 3
    reference = ReferenceSet(x, labels, False, "cpu", 4)
    positions = torch.tensor([0, 9, 10, 29])
    assert reference.group_of(positions).tolist() == [0, 0, 1, 2]
    rows = reference.rows(torch.arange(30))
    inv, axes = torch.tensor([1e-3], dtype=torch.float64), normal(3, 2, seed=1)
    sums, within = pair_sums(reference, positions, normal(4, 3), inv, axes, Work(None, {}))
    torch.testing.assert_close(within, axes.T @ (rows.T @ rows) @ axes / 30)
    torch.testing.assert_close(sums.kernels[:, 0], torch.full((2, 4), 10.0).double(), rtol=1e-2, atol=0)
    torch.testing.assert_close(rows[:10] + x[::3].mean(0), x[::3])


def test_the_corrected_subset_of_the_whole_set_is_the_full_estimator():
    x = normal(25, 2)
    full, _ = subset_optimal_loss(x, SIGMAS, "AB", draws=50)
    whole, _ = subset_optimal_loss(x, SIGMAS, "cDOL", subset=25, correction=1.0, draws=50)
    torch.testing.assert_close(whole, full, rtol=1e-12, atol=0)


def test_the_subset_estimators_are_biased_as_they_should_be():
    x = normal(60, 2)
    truth = optimal_loss(x, [0.6], draws=20_000)
    ab, dol, snis = (subset_optimal_loss(x, [0.6], name, subset=6, draws=3000) for name in ("AB", "DOL", "SNIS"))
    assert abs(ab[0] - truth.value) < 3 * (ab[1] ** 2 + truth.stderr**2).sqrt()
    assert dol[0] + 5 * dol[1] < truth.value
    plain = subset_optimal_loss(x, [0.6], "cDOL", subset=6, correction=1.0, draws=3000)
    assert torch.equal(plain[0], dol[0])
    corrected = subset_optimal_loss(x, [0.6], "cDOL", subset=6, draws=3000)
    assert corrected[0] > dol[0] + 5 * dol[1]
    assert abs(snis[0] - truth.value) > 5 * snis[1]


def curve(**other):
    sigmas = torch.logspace(-1, 1, 9, dtype=torch.float64)
    given = {
        "sigmas": sigmas,
        "value": sigmas**2 / (1 + sigmas**2),
        "stderr": sigmas / 100,
        "how": ("bound", *["pairs"] * 8),
        "confused": torch.arange(9),
        "made": {"dim": 2, "variance": 1.0, "seed": 0},
    }
    return OptimalLossCurve(**{**given, **other})


def test_between_the_levels_it_is_close_and_rises_even_where_the_estimate_does_not():
    points = torch.logspace(-1, 1, 401, dtype=torch.float64)
    exact = points**2 / (1 + points**2)
    assert (curve().at(points) / exact - 1).abs().max() < 5e-3
    dips = curve().value.clone()
    dips[4] = dips[3] * 0.9
    dips[7] = dips[8] * 1.1
    assert (curve(value=dips).at(points).diff() >= -1e-15).all()
    torch.testing.assert_close(curve().at(curve().sigmas), curve().value, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("prediction_type", "ratio"),
    [
        ("sample", lambda s: 1),
        ("epsilon", lambda s: s**-2),
        ("v_prediction", lambda s: 1 + s**-2),
        ("flow_prediction", lambda s: (1 + 1 / s) ** 2),
        ("edm", lambda s: s**-2 + 1 / 0.5**2),
    ],
)
def test_every_target_and_both_reductions(prediction_type, ratio):
    c = curve()
    expected = c.value * ratio(c.sigmas)
    torch.testing.assert_close(c.at(c.sigmas, prediction_type, sigma_data=0.5), expected)
    torch.testing.assert_close(c.at(c.sigmas, prediction_type, "mean", sigma_data=0.5), expected / 2)


def test_bins_hold_the_mean_over_log_snr():
    edges = torch.tensor([-4.0, -1.0, 0.0, 2.0])
    points = [torch.linspace(low, high, 20_001, dtype=torch.float64) for low, high in pairwise(edges.tolist())]
    expected = [torch.trapezoid(curve().at((-x / 2).exp(), "epsilon"), x) / (x[-1] - x[0]) for x in points]
    torch.testing.assert_close(curve().bin_means(edges, "epsilon", "sum"), torch.stack(expected), rtol=1e-5, atol=0)
    assert curve().area() == pytest.approx(0.5 * math.log((1 + 0.1**-2) / (1 + 10**-2)) + 0.005, rel=2e-3)


def test_the_file_gives_the_curve_back(tmp_path):
    x = normal(20, 3)
    made = optimal_loss(x, [0.02, 1.0], draws=64)
    made.save(tmp_path / "curve.safetensors")
    back = OptimalLossCurve.load(tmp_path / "curve.safetensors")
    for name in ("sigmas", "value", "stderr", "confused"):
        assert torch.equal(getattr(back, name), getattr(made, name))
    assert (back.how, back.made) == (made.how, made.made)
    assert list(tmp_path.iterdir()) == [tmp_path / "curve.safetensors"]
    assert {"data", "points", "dim", "variance", "draws", "seed", "version"} <= set(made.made)
    assert json.loads(json.dumps(made.made)) == made.made
    other = x.clone()
    other[0, 0] += 1e-12
    assert optimal_loss(other, [1.0], draws=8).made["data"] != made.made["data"]


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match="not the file of an OptimalLossCurve"):
        OptimalLossCurve.load(path)
    for wrong, message in (
        ({"value": torch.full((9,), math.nan)}, "`value` is not of 9 finite"),
        ({"sigmas": torch.ones(9)}, "`sigmas` do not increase"),
        ({"how": ("guess",) * 9}, r"`how` has \['guess'\]"),
    ):
        curve(**wrong).save(path)
        with pytest.raises(ValueError, match=message):
            OptimalLossCurve.load(path)
    with pytest.raises(FileNotFoundError):
        OptimalLossCurve.load(tmp_path / "missing")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigmas": [1.0, 0.0]}, "`sigmas` must be positive"),
        ({"sigmas": []}, "`sigmas` must be positive"),
        ({"draws": 7}, "`draws` must be at least 8, got 7"),
        ({"chunk": 0}, "`chunk` must be at least 1, got 0"),
        ({"small_noise": "guess"}, r"Unknown `small_noise` 'guess'; choose one of \['importance', 'bound'\]"),
        ({"labels": torch.zeros(3)}, r"`labels` must be \(10,\), one per point, got \(3,\)"),
        ({"flips": True}, r"`flips` needs `data` \(N, C, H, W\), got \(10, 2\)"),
        ({"data": torch.zeros(1, 2)}, r"`data` must be \(N, ...\) with N >= 2, got \(1, 2\)"),
        ({"data": torch.full((10, 2), math.nan)}, "`data` holds values that are not finite"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    given = {"data": normal(10, 2), "sigmas": [1.0], **arguments}
    with pytest.raises(ValueError, match=message):
        optimal_loss(given.pop("data"), given.pop("sigmas"), **given)


def test_data_of_integers_are_refused():
    with pytest.raises(TypeError, match=r"`data` must be floating or uint8, got torch\.int64"):
        optimal_loss(torch.zeros(10, 2, dtype=torch.int64), [1.0])


def test_levels_outside_the_curve_and_unknown_reductions_are_named():
    with pytest.raises(ValueError, match=r"`sigmas` must lie in \[0\.1, 10\]"):
        curve().at(torch.tensor([20.0]))
    with pytest.raises(ValueError, match="Unknown `reduction` 'max'"):
        curve().at(torch.tensor([1.0]), reduction="max")
    with pytest.raises(ValueError, match="Unknown `estimator` 'best'"):
        subset_optimal_loss(normal(5, 2), [1.0], "best")
    with pytest.raises(ValueError, match=r"`subset` must be in \[2, 5\], got None"):
        subset_optimal_loss(normal(5, 2), [1.0], "SNIS")


@pytest.mark.slow
def test_compiled_it_is_the_same():
    x = normal(300, 5).float()
    eager, compiled = (optimal_loss(x, SIGMAS, draws=64, compile=flag) for flag in (False, True))
    torch.testing.assert_close(compiled.value, eager.value, rtol=1e-5, atol=0)


def test_logits_are_right_wherever_a_pair_counts():
    """At s² = d / 160, the smallest level at which a pair at d counts, in single precision at ||x||² = 700."""
    x = normal(1, 768) + torch.logspace(-3, 1, 200)[:, None] * torch.nn.functional.normalize(normal(200, 768, seed=1))
    x = torch.cat([normal(1, 768), x]).float()
    d, _, _ = draws_of(x[:1]).distances(x)
    exact = (x.double() - x[0].double()).square().sum(1)[1:]
    assert ((d[0, 1:] - exact).abs() * 80 / exact).max() < 4e-3


def test_twins_are_not_confusion():
    x = normal(10, 3).repeat(2, 1)
    made = optimal_loss(x, [1e-3], draws=16)
    assert made.confused.tolist() == [0]


def test_interpolation_does_not_overshoot_a_step():
    steps = torch.tensor([1, 1.001, 1.002, 1e6, 1.001e6, 1.002e6, 1e9, 1e9, 1e9], dtype=torch.float64)
    values = curve(value=steps).at(torch.logspace(-1, 1, 2001, dtype=torch.float64))
    assert (values.diff() >= -1e-12 * values[1:]).all()
