"""The optimal loss against what is known exactly: small sets in closed form, the area law, bounds."""

import math

import pytest
import torch
from sklearn.datasets import load_digits

from snrweights.optimal import optimal_loss
from snrweights.optimal.reference import ReferenceSet
from snrweights.optimal.small_noise import pair_bound
from snrweights.optimal.work import Work
from snrweights.seeds import generator

# J of two points at distance 1, by numerical integration
TWO = {
    0.1: 2.232050107230354e-07,
    0.2: 4.737961718335191e-03,
    0.3: 3.557432549967447e-02,
    0.5: 1.123998773016683e-01,
    1.0: 1.989864335916250e-01,
    2.0: 2.352635061148522e-01,
}
# J per coordinate of the corners of a cube, +-1
CUBE = {
    0.4: 1.89518468733408e-02,
    0.5: 6.85974087907388e-02,
    1.0: 4.49599509206673e-01,
    2.0: 7.95945734366500e-01,
    5.0: 9.61503101010746e-01,
}
THREE = {0.2: 3.159236358918724e-03, 0.5: 1.209245416710371e-01, 1.0: 5.272045256915118e-01, 2.0: 1.104674377477907}
# of digits / 8 - 1, with the standard error of the table relative to the value
DIGITS = {
    0.1: (1.7767e-07, 0.0015),
    0.3: (7.947e-03, 0.0018),
    0.5: (0.3222, 0.0022),
    1.0: (4.7960, 0.00057),
    2.0: (13.0656, 0.00013),
    4.0: (17.1583, 0.00006),
    10.0: (18.50692, 0.00001),
}


def digits(dtype=torch.float64):
    return torch.tensor(load_digits().data, dtype=dtype) / 8 - 1


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def rotated(x, seed=0):
    """Rotate and shift rows."""
    return x @ torch.linalg.qr(normal(x.shape[1], x.shape[1], seed=seed))[0] + 5 * normal(x.shape[1], seed=seed + 1)


def corners(k):
    return torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * k)


def z_scores(curve, oracle, relative=0.0):
    expected = torch.tensor(oracle, dtype=torch.float64)
    return (curve.value - expected) / (curve.stderr**2 + (relative * expected) ** 2).sqrt()


@pytest.mark.parametrize("dim", [1, 7])
def test_two_points(dim):
    direction = torch.nn.functional.normalize(normal(dim, seed=3), dim=0)
    x = torch.stack([-0.5 * direction, 0.5 * direction]) + 1
    curve = optimal_loss(x, list(TWO), draws=20_000, seed=dim)
    assert curve.how == ("importance",) + ("pairs",) * 5
    assert z_scores(curve, list(TWO.values())).abs().max() < 3
    assert (curve.stderr / curve.value)[1:].max() < 0.05
    assert (curve.stderr / curve.value)[0] < 0.02


def test_importance_sampling_where_it_is_never_confused():
    r"""J2 = (r²/4) e^{-k²/8} E sech(k u / 2), k = 1 / .03: no draw would ever see the other point."""
    k, u = 1 / 0.03, torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    density = torch.exp(-(u**2) / 2) / math.sqrt(2 * math.pi)
    expected = 0.25 * math.exp(-(k**2) / 8) * torch.trapezoid(density / torch.cosh(k * u / 2), u)
    curve = optimal_loss(torch.tensor([[-0.5], [0.5]]), [0.03], draws=20_000)
    assert curve.how == ("importance",)
    assert abs(curve.value - expected) < 3 * curve.stderr < 0.06 * expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_corners_of_a_cube_rotated_and_shifted(dtype):
    k = 8
    curve = optimal_loss(rotated(corners(k)).to(dtype), list(CUBE), draws=4000, chunk=100)
    assert z_scores(curve, [k * value for value in CUBE.values()]).abs().max() < 3
    assert (curve.stderr / curve.value)[2:].max() < 0.01


def test_three_points_at_unequal_distances():
    curve = optimal_loss(torch.tensor([[-1.0], [0.0], [2.0]], dtype=torch.float64), list(THREE), draws=20_000, seed=5)
    assert z_scores(curve, list(THREE.values())).abs().max() < 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_digits(dtype):
    curve = optimal_loss(digits(dtype), list(DIGITS), draws=2000)
    value, relative = torch.tensor(list(DIGITS.values()), dtype=torch.float64).T
    assert z_scores(curve, value.tolist(), relative).abs().max() < 3
    assert curve.how == ("importance",) * 2 + ("pairs",) * 5
    assert (curve.stderr / curve.value)[3:].max() < 0.01


SETS = {
    "digits": lambda: digits(),
    "random": lambda: normal(300, 3, seed=8),
    "heavy": lambda: normal(200, 2, seed=9) ** 3,
}


@pytest.mark.parametrize("name", SETS)
def test_the_area_under_the_curve_is_the_logarithm_of_the_number_of_points(name):
    x = SETS[name]()
    smallest = torch.pdist(x).min() / 12
    sigmas = torch.logspace(math.log10(smallest), math.log10(20 * x.std() * x.shape[1] ** 0.5), 48, dtype=torch.float64)
    curve = optimal_loss(x, sigmas, draws=2000)
    assert curve.area() == pytest.approx(math.log(len(x)), abs=0.1)


def test_with_duplicates_it_is_the_entropy_of_the_multiplicities():
    counts = torch.tensor([1, 2, 5, 12])
    x = (3 * normal(4, 5, seed=4)).repeat_interleave(counts, 0)
    p = counts / counts.sum()
    curve = optimal_loss(x, torch.logspace(-1, 2.3, 40, dtype=torch.float64), draws=4000)
    assert curve.area() == pytest.approx(-(p * p.log()).sum().item(), abs=0.03)


def test_it_is_under_both_bounds_and_rises():
    x = normal(400, 6, seed=2) * torch.tensor([3, 1, 1, 0.5, 0.2, 0.1])
    sigmas = torch.logspace(-1.5, 1.3, 24, dtype=torch.float64)
    curve = optimal_loss(x, sigmas, draws=1000)
    lam = torch.linalg.eigvalsh(torch.cov(x.T, correction=0))
    linear = (lam * sigmas[:, None] ** 2 / (lam + sigmas[:, None] ** 2)).sum(1)
    bound = torch.cdist(x, x).square()[None] * torch.exp(-torch.cdist(x, x).square() / (8 * sigmas**2)[:, None, None])
    assert (curve.value < linear + 3 * curve.stderr).all()
    assert (curve.value < bound.sum((1, 2)) / (4 * len(x)) + 3 * curve.stderr).all()
    assert (curve.value.diff() > -3 * curve.stderr[1:]).all()
    assert curve.value[-1] > 0.95 * lam.sum() > 0.95 * curve.value[-1]


@pytest.mark.parametrize("labels", [None, torch.arange(50) % 3])
def test_the_bound_is_that_of_all_pairs(labels):
    x = normal(50, 4)
    sigmas = torch.tensor([0.1, 0.4], dtype=torch.float64)
    bound = pair_bound(ReferenceSet(x, labels, False, "cpu", 7), sigmas, Work(None, {}))
    d = torch.cdist(x, x).square()
    same = torch.ones(50, 50) if labels is None else (labels[:, None] == labels).double()
    expected = (same * d * torch.exp(-d / (8 * sigmas**2)[:, None, None])).sum((1, 2)) / 200
    torch.testing.assert_close(bound.value, expected, rtol=1e-9, atol=0)
    curve = optimal_loss(x, sigmas, draws=8, labels=labels, small_noise="bound")
    assert curve.how == ("bound", "bound")
    torch.testing.assert_close(curve.value, expected, rtol=1e-9, atol=0)
    assert curve.stderr.tolist() == [0, 0]
