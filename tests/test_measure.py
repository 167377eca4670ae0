"""The data's mean variance against numpy, whatever the batches."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from snrweights import data_variance

DATA = 3 + 2 * torch.randn(3000, 2, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 1.0, 5.0])


def test_it_is_the_mean_variance_of_numpy():
    assert data_variance(DATA) == pytest.approx(DATA.double().numpy().var(0).mean(), rel=1e-14)
    assert data_variance(DATA[:, 0, 0]) == pytest.approx(DATA[:, 0, 0].double().numpy().var(), rel=1e-14)


@pytest.mark.parametrize("sizes", [[3000], [1, 2999], [1000, 1999, 1], [0, 1500, 0, 1500], [1] * 50 + [2950]])
def test_batches_may_be_cut_anywhere(sizes):
    assert data_variance(DATA.split(sizes)) == pytest.approx(data_variance(DATA), rel=1e-13)
    assert data_variance(iter(DATA.split(sizes))) == pytest.approx(data_variance(DATA), rel=1e-13)


def test_it_is_the_trace_of_the_covariance_over_the_dimension():
    flat = DATA.flatten(1).double().numpy()
    assert data_variance(DATA) == pytest.approx(np.trace(np.cov(flat.T, bias=True)) / flat.shape[1], rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.int64])
def test_any_dtype_is_read_exactly(dtype):
    data = torch.tensor([[0, 100], [200, 200], [250, 0]], dtype=dtype)
    assert data_variance(data) == pytest.approx(data.double().numpy().var(0).mean(), rel=1e-14)


def test_a_large_mean_does_not_drown_the_variance():
    data = torch.tensor([1e8, 1e8 + 1, 1e8 + 2], dtype=torch.float64)
    assert data_variance(data) == pytest.approx(2 / 3, rel=1e-14)
    assert data_variance(data.split(1)) == pytest.approx(2 / 3, rel=1e-14)


class Largest(TorchDispatchMode):
    """Notes the elements of the largest float64 tensor made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            self.elements = max(self.elements, result.numel())
        return result


def test_a_tensor_is_not_copied_whole():
    with Largest() as largest:
        data_variance(DATA)
    assert 0 < largest.elements < DATA.numel() / 2


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (torch.ones(1, 3), ValueError, "`data` must have two samples at least, got 1."),
        ([], ValueError, "`data` must have two samples at least, got 0."),
        (torch.ones(5, 3), ValueError, "`data` must be finite and vary, but its mean variance is 0.0."),
        (torch.tensor([1.0, math.nan]), ValueError, "`data` must be finite and vary, but its mean variance is nan."),
        (torch.tensor([1.0, math.inf]), ValueError, "`data` must be finite and vary, but its mean variance is nan."),
        ([torch.ones(2, 3), torch.ones(2, 4)], ValueError, "Batches of `data` differ in shape: (3,) and (4,)."),
        ([(torch.ones(2, 3), 1)], TypeError, "`data` must be a tensor or give tensors, got tuple."),
    ],
)
def test_bad_data_is_refused(data, kind, message):
    with pytest.raises(kind) as raised:
        data_variance(data)
    assert str(raised.value) == message
