"""Distances of uint8 points in whole numbers, and near pairs in every precision, against brute force."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from snrweights.optimal import exact, optimal_loss
from snrweights.optimal.controls import controls
from snrweights.optimal.draws import PairSums, pair_sums
from snrweights.optimal.exact import FLOAT32, INT8, PixelDraws, fastest, on_grid
from snrweights.optimal.pairs import FloatDraws, draws_of
from snrweights.optimal.reference import ReferenceSet
from snrweights.optimal.work import Work
from snrweights.seeds import generator

ARITHMETICS = pytest.mark.parametrize("arithmetic", [INT8, FLOAT32], ids=["int8", "float32"])
SIGMAS = torch.tensor([0.3, 0.6, 1.0, 3.0], dtype=torch.float64)
INV = SIGMAS.reciprocal().flip(0)


def pixels(*shape, seed=0):
    return torch.randint(256, shape, generator=generator(seed), dtype=torch.uint8)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def scaled(u):
    return u.double() / 127.5 - 1


def same_numbers(draws, noise, sources, rows):
    """Compare with sums in int64, scaled and rounded to float32 once."""
    difference = rows.long() - sources.long()[:, None]
    d, e, zeros = draws.distances(rows)
    whole = difference.square().sum(2)
    assert torch.equal(d, (whole.double() / 127.5**2).float())
    assert torch.equal(zeros, (whole == 0).sum(1))
    along = (difference * on_grid(noise).long()[:, None]).sum(2)
    assert torch.equal(e, (along.double() * 2**-11 / 127.5).float())


@ARITHMETICS
@pytest.mark.parametrize(
    ("count", "points", "dim"),
    [(1, 1, 1), (3, 5, 7), (16, 17, 64), (9, 40, 1025), (2, 3, 3001), (1, 2, 131_075), (1, 2, 140_001)],
)
def test_distances_and_products_are_those_in_whole_numbers(arithmetic, count, points, dim):
    rows, noise = pixels(points, dim), normal(count, dim, seed=1)
    sources = torch.cat([rows, pixels(count, dim, seed=2)])[:count]
    same_numbers(PixelDraws(sources, noise, arithmetic), noise, sources, rows)


@ARITHMETICS
@pytest.mark.parametrize("dim", [1024, 1031, 131_080])
def test_the_largest_numbers_there_are_stay_exact(arithmetic, dim):
    """All products of one sign, then odd sums: black against white, and noise at the end of its range."""
    black, white = torch.zeros(1, dim, dtype=torch.uint8), torch.full((1, dim), 255, dtype=torch.uint8)
    odd = white.clone()
    odd[:, ::3] -= 1
    rows = torch.cat([black, white, odd])
    for noise in (torch.full((3, dim), 50.0), torch.full((3, dim), -50.0), normal(3, dim) * 3):
        same_numbers(PixelDraws(rows, noise, arithmetic), noise, rows, rows)


@pytest.mark.parametrize("shape", [(1, 1), (17, 8), (24, 9), (33, 16)])
def test_factors_of_int8_have_the_shapes_that_cuda_asks_for(shape):
    z = pixels(*shape, seed=1).view(torch.int8)
    padded = INT8.prepared(z)
    assert len(padded) > 16
    assert not any(size % 8 for size in padded.shape)
    assert torch.equal(padded[: shape[0], : shape[1]], z)
    assert padded.long().abs().sum() == z.long().abs().sum()
    assert not any(
        size % 8 for size in INT8.prepared(torch.zeros(24, INT8.columns + 1)).split(INT8.columns, 1)[0].shape
    )


def test_without_noise_there_are_distances_alone():
    rows = pixels(6, 10)
    d, e, zeros = draws_of(rows[:2]).distances(rows)
    assert torch.equal(d, draws_of(rows[:2], normal(2, 10)).distances(rows)[0])
    assert e.shape == (0, 6)
    assert zeros.tolist() == [1, 1]


def test_the_faster_arithmetic_is_taken(monkeypatch):
    seconds = {INT8: 1.0, FLOAT32: 2.0}
    monkeypatch.setattr(exact, "_seconds", seconds.get)
    assert fastest.__wrapped__("cpu") is INT8
    seconds[INT8] = 3.0
    assert fastest.__wrapped__("cpu") is FLOAT32
    assert fastest.__wrapped__("cuda") is INT8
    assert fastest.__wrapped__("mps") is FLOAT32


def test_noise_on_the_grid_has_the_moments_of_a_gaussian():
    noise = normal(400_000, seed=3)
    steps = on_grid(noise)
    rounded = steps.double() / 2**11
    error = rounded - noise
    assert error.abs().max() <= 2**-12
    assert error.mean().abs() < 4 * 2**-11 / (12 * len(noise)) ** 0.5
    assert (error * noise).mean().abs() < 4 * 2**-11 / (12 * len(noise)) ** 0.5
    assert error.square().mean() == pytest.approx(2**-22 / 12, rel=0.01)
    assert torch.equal(on_grid(rounded), steps)
    assert on_grid(torch.tensor([-9.0, 9.0])).tolist() == [-(2**14) + 1, 2**14 - 1]


def test_rounding_the_noise_moves_no_control():
    """The mean over the draws, which is known to be zero, changes by less than a hundredth of its standard error."""
    u = pixels(300, 12)
    reference = ReferenceSet(u, None, False, "cpu", 128)
    axes = reference.near_principal_axes(6, 0)
    g, noise = torch.randint(300, (4000,), generator=generator(4)), normal(4000, 12, seed=5)
    rows = reference.rows(g).double()
    lam = (reference.rows(torch.arange(300)).double() @ axes).square().mean(0)
    before, after = (
        controls(rows, eps, SIGMAS, reference.variance, axes, lam) for eps in (noise, on_grid(noise) / 2.0**11)
    )
    error = before.std(1) / 4000**0.5
    assert ((after.mean(1) - before.mean(1)).abs() < 0.01 * error).all()
    assert (after.mean(1).abs() < 4 * error).all()


def planted():
    """Images in [-1, 1] of 768 pixels: and 30 of them again, 20 with one pixel a step brighter."""
    u = pixels(200, 768).clamp(max=254)
    near = u[:30].clone()
    near[:20, 5] += 1
    return torch.cat([u, near])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_near_duplicates_and_twins_at_small_noise(dtype):
    """At sigma .002 pairs .0078 apart have logits of 8; products in single precision alone have them wrong by 50."""
    u = planted()
    x = scaled(u) - scaled(u).mean(0)
    points = u if dtype == torch.uint8 else x.float()
    noise = on_grid(normal(30, 768, seed=1)).double() / 2**11
    inv = torch.tensor([1 / 0.02, 1 / 0.002], dtype=torch.float64)
    found, expected = (PairSums.zeros(2, 30, u.device) for _ in range(2))
    found.add(points, draws_of(points[:30], noise.to(x if dtype == torch.uint8 else points)), inv, torch.arange(30))
    expected.add(x, FloatDraws(x[:30], noise), inv, torch.arange(30))
    d, e = (x - x[:30, None]).square().sum(2), ((x - x[:30, None]) * noise[:, None]).sum(2)
    for level, here in enumerate(inv):
        kernels = [(sign * here * e - here**2 * d / 2).exp() for sign in (1, -1)]
        by_definition = torch.stack([(k * d).sum(1) / k.sum(1) for k in kernels]).mean(0) / 2
        torch.testing.assert_close(expected.values()[level], by_definition, rtol=1e-9, atol=1e-12)
    tolerance = 1e-5 if dtype == torch.uint8 else 3e-3  # the second look keeps logits within 1e-3
    torch.testing.assert_close(found.values(), expected.values(), rtol=tolerance, atol=1e-12)
    assert found.twins.tolist() == [1] * 20 + [2] * 10
    assert torch.equal(found.confused(), expected.confused())
    naive = -(
        (x.float() @ x[:30].float().T).T * -2 + x.float().square().sum(1) + x[:30].float().square().sum(1)[:, None]
    )
    assert ((naive.double() + d).abs().max() / (2 * 0.002**2)) > 10  # what the test is about


BACKENDS = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


class Precisions(TorchFunctionMode):
    """What products of float32 may be rounded to, at each product."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function in (torch.Tensor.matmul, torch.Tensor.__matmul__):
            self.seen += [torch.get_float32_matmul_precision(), *(backend.fp32_precision for backend in BACKENDS)]
        return function(*arguments, **(options or {}))


@pytest.fixture
def kept_precision():
    yield
    torch.set_float32_matmul_precision("highest")
    for backend in BACKENDS:
        backend.fp32_precision = "none"


@pytest.mark.parametrize("by_backend", [False, True])
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_distances_of_floats_never_come_from_tf32(precision, by_backend, kept_precision):
    if by_backend:
        BACKENDS[0].fp32_precision = "ieee" if precision == "highest" else "tf32"
    else:
        torch.set_float32_matmul_precision(precision)
    before = [backend.fp32_precision for backend in BACKENDS]
    with Precisions() as precisions:
        draws_of(normal(3, 4).float(), normal(3, 4).float()).distances(normal(5, 4).float())
    assert precisions.seen == ["highest", "ieee", "ieee"]
    assert [backend.fp32_precision for backend in BACKENDS] == before
    if not by_backend:
        assert torch.get_float32_matmul_precision() == precision


@ARITHMETICS
@pytest.mark.parametrize("labelled", [False, True])
def test_the_curve_is_that_of_float64_with_the_same_noise(arithmetic, labelled, monkeypatch):
    monkeypatch.setattr(exact, "fastest", lambda kind: arithmetic)
    u = pixels(60, 3, 2, 4) // 64 * 40
    labels = torch.arange(60) % 3 if labelled else None
    positions = torch.arange(0, 120, 2)
    noise = on_grid(normal(60, 24, seed=2)).double() / 2**11
    of_pixels, of_floats = (ReferenceSet(x, labels, True, "cpu", 17) for x in (u, scaled(u)))
    axes = torch.eye(24, 3, dtype=torch.float64)
    found, _ = pair_sums(of_pixels, positions, noise.float(), INV, axes, Work(None, {}))
    expected, _ = pair_sums(of_floats, positions, noise, INV, axes, Work(None, {}))
    torch.testing.assert_close(found.values().mean(1), expected.values().mean(1), rtol=1e-6, atol=0)
    assert expected.confused()[-2] > 3
    assert torch.equal(found.twins, expected.twins)
    assert torch.equal(found.confused(), expected.confused())


@ARITHMETICS
def test_both_arithmetics_give_the_same_bits(arithmetic, monkeypatch):
    u, labels, sigmas = pixels(80, 1, 2, 3), torch.arange(80) % 2, [0.02, 0.3, 1.0]
    plain = optimal_loss(u, sigmas, draws=64, labels=labels, flips=True)
    monkeypatch.setattr(exact, "fastest", lambda kind: arithmetic)
    other = optimal_loss(u, sigmas, draws=64, labels=labels, flips=True)
    assert plain.how == ("importance", "pairs", "pairs")
    assert torch.equal(other.value, plain.value)


def test_a_curve_of_pixels_agrees_with_that_of_their_floats():
    """Noise off the grid: the same draws but for 2^-12 of a standard deviation."""
    u = pixels(100, 1, 3, 3)
    of_pixels, of_floats = (optimal_loss(x, SIGMAS, draws=256, flips=True) for x in (u, scaled(u)))
    assert of_pixels.how == of_floats.how
    assert ((of_pixels.value - of_floats.value).abs() < 0.01 * of_floats.stderr).all()
    bounds = [optimal_loss(x, [0.2], draws=8, small_noise="bound") for x in (u, scaled(u))]
    assert bounds[0].how == ("bound",)
    torch.testing.assert_close(bounds[0].value, bounds[1].value, rtol=1e-6, atol=0)
