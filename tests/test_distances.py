"""The Fréchet distance against its definition and closed forms."""

import numpy as np
import pytest
import scipy.linalg
import torch
from snrweights.integrations.distances import frechet_distance, kernel_distance


@pytest.mark.parametrize(("n", "d"), [(200, 5), (6, 20)])
def test_equals_the_definition_with_a_matrix_root(n, d):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, d)), rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + 1
    c1, c2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.sqrt(np.clip(np.linalg.eigvals(c1 @ c2).real, 0, None)).sum()  # tr (C1 C2)^1/2
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * root
    assert frechet_distance(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, rel=1e-6)
    if n > d:
        via_root = np.trace(scipy.linalg.sqrtm(c1 @ c2)).real
        assert root == pytest.approx(via_root, rel=1e-9)


def test_of_a_set_with_itself_is_zero_and_of_a_shift_its_square():
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert abs(frechet_distance(x, x)) < 1e-10
    assert frechet_distance(x, x + 3) == pytest.approx(9 * 8, rel=1e-12)
    assert frechet_distance(x, 2 * (x - x.mean(0)) + x.mean(0)) == pytest.approx(float(x.var(0).sum()), rel=1e-12)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(4, 2), r"got \(3, 2\) and \(4, 2\)"),
        (torch.zeros(1, 2), torch.zeros(1, 2), "n >= 2"),
        (torch.zeros(3, 2), torch.full((3, 2), torch.nan), "not finite"),
    ],
)
def test_bad_input(first, second, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(first, second)


def test_kernel_distance_is_unbiased_and_equals_the_double_sum():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 40, 5, generator=generator, dtype=torch.float64)
    n = 20  # half of them, in every subset
    value, error = kernel_distance(x, y, subsets=400)

    def kernel(a, b):
        return (float(a @ b) / 5 + 1) ** 3

    def mmd(x, y):
        within = sum(kernel(z[i], z[j]) for z in (x, y) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
        return within - 2 * sum(kernel(a, b) for a in x for b in y) / n**2

    stream = torch.Generator().manual_seed(0)
    picks = [z[torch.randperm(40, generator=stream)[:n]] for z in (x, y)]
    one = kernel_distance(x, y, subsets=2, seed=0)
    rest = [z[torch.randperm(40, generator=stream)[:n]] for z in (x, y)]
    assert one[0] == pytest.approx((mmd(*picks) + mmd(*rest)) / 2, rel=1e-10)
    assert abs(kernel_distance(x, y + 1, subsets=400)[0]) > 10 * error
    draws = torch.stack([torch.randn(2, 64, 5, generator=generator, dtype=torch.float64) for _ in range(200)])
    values = [kernel_distance(a, b, subsets=2)[0] for a, b in draws]
    mean, deviation = torch.tensor(values).mean(), torch.tensor(values).std() / 200**0.5
    assert abs(mean) < 4 * deviation  # same distribution: zero on average
    assert value != 0


def test_kernel_distance_needs_two_subsets():
    with pytest.raises(ValueError, match="`subsets` must be >= 2, got 1"):
        kernel_distance(torch.zeros(4, 2), torch.zeros(4, 2), subsets=1)
