"""Schedules against diffusers' tables and against their own formulas."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from snrweights import CosineSchedule, DiscreteSchedule, EDMSchedule, FlowSchedule, as_schedule
from snrweights.schedules import exact_dtype

NAMES = ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"]
INF = math.inf


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def assert_equal_up_to(actual, expected, relative):
    torch.testing.assert_close(actual, expected, rtol=relative, atol=0)


# discrete tables ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_train_timesteps": 50, "beta_start": 0.002, "beta_end": 0.1}])
@pytest.mark.parametrize("name", NAMES)
def test_a_named_table_is_that_of_diffusers(name, options):
    ours = DiscreteSchedule.from_name(name, **options).alphas_cumprod
    theirs = DDPMScheduler(beta_schedule=name, **options).alphas_cumprod
    assert ours.dtype == torch.float64
    assert_equal_up_to(ours, theirs.double(), 2e-5)  # 1000 float32 products, each rounded by 6e-8


@pytest.mark.parametrize("name", NAMES)
def test_the_zero_snr_rescale_is_that_of_diffusers(name):
    ours = DiscreteSchedule.from_name(name, rescale_betas_zero_snr=True)
    theirs = DDPMScheduler(beta_schedule=name, rescale_betas_zero_snr=True).alphas_cumprod
    torch.testing.assert_close(ours.alphas_cumprod, theirs.double(), rtol=2e-5, atol=2e-8)
    assert ours.alphas_cumprod[-1] == 0
    assert ours.log_snr_table[-1] == -INF
    assert_equal_up_to(ours.alphas_cumprod[0], DiscreteSchedule.from_name(name).alphas_cumprod[0], 1e-12)


def test_any_trained_betas():
    betas = torch.rand(20, generator=torch.Generator().manual_seed(0)) * 0.5
    theirs = DDPMScheduler(num_train_timesteps=20, trained_betas=betas.tolist()).alphas_cumprod
    assert_equal_up_to(DiscreteSchedule.from_betas(betas).alphas_cumprod, theirs.double(), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bare_tensor_is_a_table(dtype):
    table = torch.tensor([0.9, 0.5, 0.2], dtype=dtype)
    schedule = as_schedule(table)
    expected = [math.log(a / (1 - a)) for a in table.tolist()]
    assert_equal_up_to(schedule.log_snr(torch.arange(3)), f64(*expected), 1e-14)


def test_infinite_log_snr_is_exact_at_both_ends():
    schedule = DiscreteSchedule(f64(1.0, 0.5, 0.0))
    assert schedule.log_snr(torch.arange(3)).tolist() == [INF, 0.0, -INF]


def test_a_float_timestep_interpolates_log_snr():
    schedule = DiscreteSchedule(f64(0.9, 0.5, 0.2, 0.0))
    table = schedule.log_snr_table
    between = schedule.log_snr(f64(0.0, 0.25, 1.5, 2.0))
    assert_equal_up_to(between, torch.stack((table[0], 0.75 * table[0], table[2] / 2, table[2])), 1e-14)
    assert schedule.log_snr(f64(2.5, 3.0)).tolist() == [-INF, -INF]  # half-way to infinity is infinity


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32])
def test_log_snr_keeps_the_shape_in_float64(shape, dtype):
    log_snr = DiscreteSchedule.from_name("linear").log_snr(torch.full(shape, 500, dtype=dtype))
    assert log_snr.shape == shape
    assert log_snr.dtype == torch.float64


def test_the_grid_of_a_table_is_every_timestep():
    assert DiscreteSchedule(f64(0.9, 0.5, 0.2)).grid().tolist() == [0, 1, 2]


# continuous schedules -------------------------------------------------------------------------------------------------

T = f64(0.01, 0.3, 0.5, 0.99)


@pytest.mark.parametrize("resolution", [64, 256])
def test_cosine(resolution):
    expected = -2 * torch.log(torch.tan(math.pi * T / 2)) + 2 * math.log(64 / resolution)
    torch.testing.assert_close(CosineSchedule(resolution).log_snr(T), expected, rtol=1e-13, atol=1e-13)
    assert CosineSchedule(resolution).log_snr(f64(0, 1)).tolist() == [INF, -INF]


def test_the_cosine_shift_keeps_the_snr_of_the_resolution_averaged_image():
    # averaging 4 x 4 pixels divides the noise variance by 16: SNR at 256 is that at 64 over 16
    difference = CosineSchedule(64).log_snr(T) - CosineSchedule(256).log_snr(T)
    assert_equal_up_to(difference, torch.full_like(T, math.log(16)), 1e-12)


def test_flow():
    for steps in (1, 1000):
        actual = FlowSchedule(num_train_timesteps=steps).log_snr(T * steps)
        torch.testing.assert_close(actual, 2 * torch.log((1 - T) / T), rtol=1e-13, atol=1e-13)
    assert FlowSchedule().log_snr(f64(0, 1)).tolist() == [INF, -INF]


def test_an_integer_flow_timestep_is_no_index():
    schedule = FlowSchedule(num_train_timesteps=1000)
    assert torch.equal(schedule.log_snr(torch.tensor([250])), schedule.log_snr(f64(250)))


def test_reversed_flow_has_the_data_at_one():
    assert torch.equal(FlowSchedule(reversed=True).log_snr(T), -FlowSchedule().log_snr(T))
    assert FlowSchedule(reversed=True).grid()[[0, -1]].tolist() == [1, 0]


def test_the_flow_shift_moves_draws_and_not_the_meaning_of_t():
    assert torch.equal(FlowSchedule(shift=3).log_snr(T), FlowSchedule().log_snr(T))


def test_edm():
    sigma = f64(0.002, 1.0, 80.0)
    expected = -2 * torch.log(sigma)
    assert torch.equal(EDMSchedule().log_snr(sigma), expected)
    torch.testing.assert_close(EDMSchedule(timestep="c_noise").log_snr(0.25 * torch.log(sigma)), expected)


@pytest.mark.parametrize(
    ("schedule", "first", "last"),
    [
        (CosineSchedule(t_min=0.1, t_max=0.9), 0.1, 0.9),
        (FlowSchedule(num_train_timesteps=1000, s_min=0.01), 10, 1000),
        (EDMSchedule(), 0.002, 80),
        (EDMSchedule(timestep="c_noise"), 0.25 * math.log(0.002), 0.25 * math.log(80)),
    ],
)
def test_a_grid_runs_from_clean_to_noisy_and_is_legal(schedule, first, last):
    grid = schedule.grid()
    torch.testing.assert_close(grid[[0, -1]], f64(first, last), rtol=1e-12, atol=0)
    assert (schedule.log_snr(grid).diff() < 0).all()
    schedule.check(grid[1:-1])


def test_a_device_without_float64_works_in_float32():
    assert exact_dtype(torch.device("mps")) == torch.float32
    assert exact_dtype(torch.device("cpu")) == exact_dtype(torch.device("cuda")) == torch.float64


def test_a_users_own_class_is_a_schedule():
    class Polynomial:
        prediction_type, sigma_data, coords = "epsilon", None, "vp"

        def log_snr(self, t):
            return -20 * (t.double() - 0.5) ** 3

        def check(self, t):
            CosineSchedule().check(t)

        def grid(self):
            return torch.linspace(0, 1, 11)

    schedule = Polynomial()
    assert as_schedule(schedule) is schedule


# bad input ------------------------------------------------------------------------------------------------------------

BAD_ARGUMENTS = [
    (
        lambda: DiscreteSchedule([0.9, 0.5]),
        TypeError,
        "`alphas_cumprod` must be a float32 or float64 tensor, got list.",
    ),
    (lambda: as_schedule(f64(0.9, 0.5).half()), TypeError, "float32 or float64 tensor, got torch.float16."),
    (lambda: as_schedule(torch.tensor([1, 0])), TypeError, "float32 or float64 tensor, got torch.int64."),
    (lambda: as_schedule(f64(0.9)), ValueError, "`alphas_cumprod` must have shape (T,) with T >= 2, got (1,)."),
    (lambda: as_schedule(torch.ones(2, 2)), ValueError, "must have shape (T,) with T >= 2, got (2, 2)."),
    (lambda: as_schedule(f64(1.5, 0.5)), ValueError, "`alphas_cumprod` must lie in [0, 1], got 0.5 to 1.5."),
    (lambda: as_schedule(f64(0.5, -0.5)), ValueError, "`alphas_cumprod` must lie in [0, 1], got -0.5 to 0.5."),
    (lambda: as_schedule(f64(0.5, math.nan)), ValueError, "`alphas_cumprod` must lie in [0, 1], got nan"),
    (lambda: as_schedule(f64(0.9, 0.2, 0.3)), ValueError, "must not increase, but t=2 is above t=1; is it reversed?"),
    (
        lambda: as_schedule("quadratic"),
        ValueError,
        "Unknown schedule 'quadratic'; choose one of ['linear', 'scaled_linear'",
    ),
    (lambda: DiscreteSchedule.from_name("x"), ValueError, f"Unknown schedule 'x'; choose one of {NAMES}."),
    (lambda: CosineSchedule(resolution=0), ValueError, "`CosineSchedule(resolution=...)` must be > 0, got 0."),
    (lambda: CosineSchedule(t_min=0.9, t_max=0.5), ValueError, "`CosineSchedule(t_min=...)` must be in [0, t_max)"),
    (lambda: CosineSchedule(t_max=1.5), ValueError, "`CosineSchedule(t_max=...)` must be"),
    (lambda: FlowSchedule(shift=-1), ValueError, "`FlowSchedule(shift=...)` must be > 0, got -1."),
    (
        lambda: FlowSchedule(num_train_timesteps=0),
        ValueError,
        "`FlowSchedule(num_train_timesteps=...)` must be > 0, got 0.",
    ),
    (lambda: FlowSchedule(s_min=1), ValueError, "`FlowSchedule(s_min=...)` must be in [0, 1), got 1."),
    (lambda: EDMSchedule(sigma_data=-1), ValueError, "`EDMSchedule(sigma_data=...)` must be > 0, got -1."),
    (
        lambda: EDMSchedule(sigma_min=90),
        ValueError,
        "`EDMSchedule(sigma_min=...)` must be > 0 and below sigma_max, got 90.",
    ),
    (
        lambda: EDMSchedule(timestep="t"),
        ValueError,
        "`EDMSchedule(timestep=...)` must be 'sigma' or 'c_noise', got 't'.",
    ),
    (lambda: as_schedule(7), TypeError, "Cannot read a noise schedule from int; give a diffusers scheduler"),
]


@pytest.mark.parametrize(("build", "kind", "message"), BAD_ARGUMENTS)
def test_a_bad_argument_is_named_with_its_value_and_the_choices(build, kind, message):
    with pytest.raises(kind) as raised:
        build()
    assert message in str(raised.value)


BAD_TIMESTEPS = [
    ("linear", [-1, 1000, -0.5, 999.5, math.nan], IndexError, "`t` must lie in [0, 999], got"),
    ("cosine", [-0.1, 1.1, math.nan], ValueError, "`t` must lie in [0, 1], got"),
    ("flow", [-0.1, 1.1, math.nan], ValueError, "`t` must lie in [0, 1], got"),
    ("edm", [0.0, -1.0, INF, math.nan], ValueError, "`t` must lie in (0, "),
]


@pytest.mark.parametrize(("name", "bad", "kind", "message"), BAD_TIMESTEPS)
def test_a_timestep_outside_the_schedule_is_named(name, bad, kind, message):
    schedule = as_schedule(name)
    for value in bad:
        t = torch.tensor([0.5, value])
        with pytest.raises(kind) as raised:
            schedule.check(t)
        assert str(raised.value).startswith(message)
        assert str(raised.value).endswith(f"got {t[1].item()}.")


def test_the_clean_end_of_a_flow_with_s_min_is_outside():
    with pytest.raises(ValueError, match=r"\(0, 1\], got 0.0"):
        FlowSchedule(s_min=0.01).check(f64(0.0))
    with pytest.raises(ValueError, match=r"\[0, 1\), got 1.0"):
        FlowSchedule(s_min=0.01, reversed=True).check(f64(1.0))


def test_between_timesteps_at_infinite_log_snr():
    schedule = DiscreteSchedule(torch.tensor([1.0, 0.9, 0.5, 0.0, 0.0], dtype=torch.float64))
    found = schedule.log_snr(torch.tensor([0, 0.5, 1.5, 2.5, 3.5, 4]))
    assert found.tolist() == [math.inf, math.inf, pytest.approx(math.log(9) / 2), -math.inf, -math.inf, -math.inf]


@pytest.mark.parametrize("t", [-0.5, 999.5, math.nan])
def test_a_float_outside_the_table_has_no_log_snr(t):
    """``check`` says so where it costs no wait for a device."""
    assert as_schedule("linear").log_snr(torch.tensor([t])).isnan()
