"""ALSR: against a transcription of its Algorithm 1, and what was found about it, stated as tests."""

import math

import numpy as np
import pytest
import torch
from cases import SCHEDULES, NoHostSync
from safetensors.torch import load, save
from scipy.special import erfc
from snrweights.integrations import launch

import snrweights
from snrweights import BoundWeighting, EDMSchedule, get_weighting, objective, process
from snrweights.cli import main as command
from snrweights.densities import Cauchy, log_normal_sigma, sample
from snrweights.losses import loss_weight, per_sample_mse, weighted_loss

EDM = EDMSchedule(sigma_data=0.5)
ALPHA, P_STD = 0.05, 1.2
FORMS = ["cauchy", "gaussian", "loss_zscore"]
MEASURED = [(form, center) for form in FORMS for center in ("batch", "ema")]
FLOAT64 = {"prediction_type": "edm", "dtype": torch.float64}


def bind(schedule=EDM, normalize=None, clamp_max=None, **hp):
    return get_weighting("alsr", **hp).bind(schedule, normalize=normalize, clamp_max=clamp_max, **FLOAT64)


def sigmas(n, seed=0):
    return torch.exp(-sample(log_normal_sigma(), (n,), torch.Generator().manual_seed(seed)) / 2)


def losses(n, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1


# Algorithm 1 ----------------------------------------------------------------------------------------------------------

SD = 0.5
BUMPS = {"cauchy": lambda d: 1 / (1 + ALPHA * d**2), "gaussian": lambda d: np.exp(-ALPHA * d**2)}


def algorithm_1(theta, x0, noise, normal, bump):
    """The paper's loss in numpy, complex theta allowed: its lines in its order."""
    s = np.exp(-1.2 + P_STD * normal)[:, None]
    weight = (s**2 + SD**2) / (s * SD) ** 2
    x = x0 + s * noise
    c_skip, c_out, c_in = SD**2 / (s**2 + SD**2), s * SD / np.sqrt(s**2 + SD**2), 1 / np.sqrt(s**2 + SD**2)
    denoised = c_skip * x + c_out * (theta[0] * np.tanh(theta[1] * c_in * x) + theta[2] * np.log(s) / 4)
    z = np.log(SD**2 / s**2)
    return np.mean(weight * bump(z - np.mean(z)) * (denoised - x0) ** 2)


@pytest.mark.parametrize("form", BUMPS)
def test_loss_and_gradient_are_those_of_algorithm_1(form):
    draw = np.random.default_rng(0)
    x0, noise, normal = 0.5 * draw.normal(size=(32, 3)), draw.normal(size=(32, 3)), draw.normal(size=32)
    theta = np.array([0.7, 1.3, -0.4])
    steps = 1e-30j * np.eye(3)  # derivatives by complex steps are exact to rounding
    expected = [algorithm_1(theta + step, x0, noise, normal, BUMPS[form]).imag / 1e-30 for step in steps]

    parameters = torch.tensor(theta, requires_grad=True)
    t = torch.exp(-1.2 + P_STD * torch.tensor(normal))
    log_snr = EDM.log_snr(t)
    images, eps = torch.tensor(x0), torch.tensor(noise)
    x = process.add_noise(images, eps, log_snr, "ve")
    x_in = x / (t**2 + SD**2).sqrt()[:, None]
    network = parameters[0] * torch.tanh(parameters[1] * x_in) + parameters[2] * t.log()[:, None] / 4
    errors = per_sample_mse(network, process.target("edm", images, eps, log_snr, SD))
    loss = (bind(form=form, center="batch")(t, errors.detach()) * errors).mean()
    loss.backward()
    assert loss.item() == pytest.approx(algorithm_1(theta, x0, noise, normal, BUMPS[form]), rel=1e-10)
    assert parameters.grad.tolist() == pytest.approx(expected, rel=1e-10)


def test_loss_zscore_compares_the_edm_weighted_losses_of_the_batch():
    t, loss = sigmas(64), losses(64)
    edm = (t**2 + SD**2) / (t * SD) ** 2  # on x0
    weighted = (edm * loss).numpy()
    score = (weighted - weighted.mean()) / weighted.std()
    expected = edm * torch.tensor(np.maximum(1 + 5 * score, 0))
    bound = get_weighting("alsr", form="loss_zscore", alpha=5.0, center="batch").bind(
        EDM, prediction_type="sample", dtype=torch.float64
    )
    actual = bound(t, loss)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
    assert (actual == 0).any()  # none below


@pytest.mark.parametrize(("form", "center"), MEASURED)
def test_weights_are_detached(form, center):
    loss = losses(8).requires_grad_()
    assert not bind(form=form, center=center)(sigmas(8), loss).requires_grad


# what was found -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_with_one_sample_it_is_edm(form):
    edm = get_weighting("edm").bind(EDM, prediction_type="sample", dtype=torch.float64)
    alsr = get_weighting("alsr", form=form, center="batch").bind(EDM, prediction_type="sample", dtype=torch.float64)
    for t in (torch.tensor([0.01]), torch.tensor([50.0]), torch.tensor(0.3)):
        assert torch.equal(alsr(t, torch.full_like(t, 7.0)), edm(t))


@pytest.mark.parametrize("center", ["batch", "ema"])
def test_equal_losses_are_not_weighted(center):
    t = torch.full((5,), 0.3)
    assert bind(form="loss_zscore", center=center)(t, torch.full((5,), 0.1)).tolist() == pytest.approx([1] * 5)


def narrowed(alpha=ALPHA, p_std=P_STD):
    """P_std' of the EDM loss that the Gaussian form amounts to, and the loss scale."""
    return p_std / math.sqrt(1 + 8 * alpha * p_std**2), 1 / math.sqrt(1 + 8 * alpha * p_std**2)


def test_the_figures_of_the_guide():
    p_std, scale = narrowed()
    assert (round(p_std, 3), round(scale, 3)) == (0.956, 0.797)
    t = sigmas(128 * 4000).reshape(4000, 128)
    mu = (2 * math.log(SD) - 2 * t.log()).mean(1)
    assert mu.mean().item() == pytest.approx(1.0137, abs=0.015)
    assert mu.std().item() == pytest.approx(0.2121, abs=0.01)
    assert get_weighting("alsr").over_log_snr(EDM, prediction_type="edm").weighting.mu == pytest.approx(
        2.4 - 2 * math.log(2)
    )


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1])
@pytest.mark.parametrize("p_std", [0.6, 1.2, 2.0])
def test_the_scale_of_the_loss(alpha, p_std):
    options = {"prediction_type": "edm", "density": log_normal_sigma(-1.2, p_std), "alpha": alpha}
    gaussian = objective(EDM, "alsr", form="gaussian", **options).mean_weight
    assert gaussian == pytest.approx(narrowed(alpha, p_std)[1], rel=1e-9)
    c = alpha * (2 * p_std) ** 2
    exact = math.sqrt(math.pi / (2 * c)) * math.exp(1 / (2 * c)) * erfc(1 / math.sqrt(2 * c))
    assert objective(EDM, "alsr", **options).mean_weight == pytest.approx(exact, rel=1e-9)
    if (alpha, p_std) == (ALPHA, P_STD):
        assert (round(gaussian, 3), round(exact, 3)) == (0.797, 0.827)


@pytest.mark.parametrize("form", ["cauchy", "gaussian"])
@pytest.mark.parametrize("center", ["fixed", "batch"])
def test_normalize_divides_by_the_scale_of_the_fixed_curve(form, center):
    t = sigmas(16)
    plain, normalized = (bind(form=form, center=center, normalize=normalize)(t) for normalize in (None, "mean"))
    scale = objective(EDM, "alsr", prediction_type="edm", form=form).mean_weight
    torch.testing.assert_close(normalized, plain / scale, rtol=1e-12, atol=0)


def test_the_gaussian_form_is_edm_under_a_narrower_density_pointwise():
    p_std, scale = narrowed()
    log_snr = torch.linspace(-12, 16, 401, dtype=torch.float64)
    curve = get_weighting("alsr", form="gaussian").over_log_snr(EDM, prediction_type="edm")
    weighted = (curve.log_weight(log_snr) + log_normal_sigma().log_prob(log_snr)).exp()
    plain = scale * log_normal_sigma(-1.2, p_std).log_prob(log_snr).exp()
    torch.testing.assert_close(weighted, plain, rtol=1e-12, atol=0)


def expected_gradient(p_std, curve):
    """Gradient of the loss of a small network, exact over sigma by a trapezoidal sum, over fixed data and noise."""
    normal = torch.linspace(-9, 9, 1801, dtype=torch.float64)
    mass = torch.exp(-normal.square() / 2) / math.sqrt(2 * math.pi) * (normal[1] - normal[0])
    t = torch.exp(-1.2 + p_std * normal)
    log_snr = EDM.log_snr(t)
    draw = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 7, 1, generator=draw, dtype=torch.float64)
    first, second = (torch.randn(2, 5, generator=draw, dtype=torch.float64).requires_grad_() for _ in range(2))
    for i in range(7):
        images, eps = x0[i].expand(len(t), 1), noise[i].expand(len(t), 1)
        x = process.add_noise(images, eps, log_snr, "ve") / (t**2 + SD**2).sqrt()[:, None]
        network = torch.tanh(torch.cat((x, t.log()[:, None] / 4), 1) @ first) @ second[0][:, None]
        errors = per_sample_mse(network, process.target("edm", images, eps, log_snr, SD))
        (mass * curve(log_snr) * errors).sum().backward()
    return torch.cat((first.grad.flatten(), second.grad[0]))


def test_the_gaussian_form_has_the_expected_gradient_of_edm_under_a_narrower_density():
    p_std, scale = narrowed()
    weighted = expected_gradient(P_STD, get_weighting("alsr", form="gaussian").over_log_snr(EDM, prediction_type="edm"))
    plain = expected_gradient(p_std, get_weighting("edm").over_log_snr(EDM, prediction_type="edm"))
    torch.testing.assert_close(weighted, scale * plain, rtol=1e-8, atol=0)
    wide = expected_gradient(P_STD, get_weighting("edm").over_log_snr(EDM, prediction_type="edm"))
    assert ((weighted / wide - weighted[0] / wide[0]).abs() > 1e-2).any()  # it is not the plain one, scaled


# curves and centres ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "center"), MEASURED)
def test_the_curve_is_that_of_a_batch_about_the_mean(form, center):
    log_snr = torch.linspace(-9, 9, 19, dtype=torch.float64)
    curve = get_weighting("alsr", form=form, center=center).over_log_snr(EDM, prediction_type="edm")
    fixed = torch.ones(19, dtype=torch.float64)
    if form != "loss_zscore":
        fixed = get_weighting("alsr", form=form).over_log_snr(EDM, prediction_type="edm")(log_snr)
    torch.testing.assert_close(curve(log_snr), fixed, rtol=1e-12, atol=0)


def test_a_fixed_centre_is_a_weight_of_the_timestep():
    bound = bind()
    assert type(bound) is BoundWeighting
    t = sigmas(9)
    assert torch.equal(bound(t), bound.curve(EDM.log_snr(t)))
    assert torch.equal(bound(t[:1], losses(1)), bound(t)[:1])
    assert torch.equal(loss_weight(t, EDM, "alsr", **FLOAT64), bound(t))


def test_the_centre_can_be_given():
    at = torch.exp(-(torch.tensor([3.0], dtype=torch.float64) - 2 * math.log(SD)) / 2)  # where z = 3
    assert bind(mu=3.0)(at).item() == pytest.approx(1, abs=1e-12)
    assert bind()(at).item() < 0.9


@pytest.mark.parametrize("center", ["fixed", "batch"])
def test_zero_terminal_snr_is_left_out_of_the_mean(center):
    zero = SCHEDULES["zero_snr"]
    weighting = get_weighting("alsr", center=center)
    t = zero.grid()
    bound = weighting.bind(zero, prediction_type="v_prediction", dtype=torch.float64)
    log_snr = zero.log_snr_table[:-1]
    d = log_snr - log_snr.mean()
    expected = (log_snr.exp() + 4) / (1 + ALPHA * d**2) / (1 + log_snr.exp())
    torch.testing.assert_close(bound(t)[:-1], expected, rtol=1e-10, atol=0)
    assert bound(t)[-1] == 0


def test_a_batch_of_pure_noise_has_the_fixed_centre():
    zero = SCHEDULES["zero_snr"]
    bound = get_weighting("alsr", center="batch").bind(zero, prediction_type="v_prediction")
    assert bound(torch.tensor([999, 999])).tolist() == [0, 0]


def test_clamp_max_bounds_the_weight_about_the_measured_centre():
    t = sigmas(50)
    edm = get_weighting("alsr", center="batch").bind(EDM, prediction_type="sample", clamp_max=9.0)
    assert edm(t).max() == 9


# batches over processes and steps -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "center"), MEASURED)
def test_two_processes_are_one_with_both_batches(form, center):
    t, loss = sigmas(12), losses(12)
    parts = list(zip(t.split(6), loss.split(6), strict=True))
    seen = []
    for part in parts:
        alone = bind(form=form, center=center)
        alone.reduce = lambda sums: seen.append(sums) or sums
        alone(*part)
    together = []
    for part in parts:
        shared = bind(form=form, center=center)
        shared.reduce = lambda sums: sum(seen)
        together.append(shared(*part))
    torch.testing.assert_close(torch.cat(together), bind(form=form, center=center)(t, loss), rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", ["cauchy", "gaussian"])
@pytest.mark.parametrize("center", ["batch", "ema"])
def test_announced_micro_batches_are_one_batch(form, center):
    whole, cut = bind(form=form, center=center), bind(form=form, center=center)
    naive = bind(form=form, center=center)
    for step in range(3):
        t = sigmas(12, seed=step)
        cut.center_on(t)
        expected = whole(t)
        torch.testing.assert_close(torch.cat([cut(part) for part in t.split(4)]), expected, rtol=1e-12, atol=0)
        assert not torch.allclose(torch.cat([naive(part) for part in t.split(4)]), expected, rtol=1e-3)


def test_losses_cannot_be_announced():
    t, loss = sigmas(8), losses(8)
    announced, plain = (bind(form="loss_zscore", center="ema") for _ in range(2))
    announced.center_on(t)
    assert torch.equal(announced(t, loss), plain(t, loss))


@pytest.mark.parametrize("form", FORMS)
def test_ema_is_a_mean_over_batches_that_fades(form):
    bound, weights, values = bind(form=form, center="ema", ema_decay=0.8), [], []
    for step in range(6):
        t, loss = sigmas(7, seed=step), losses(7, seed=step)
        weights.append(bound(t, loss))
        values.append((loss if form == "loss_zscore" else 2 * math.log(SD) - 2 * t.log()).numpy())
    fading = 0.8 ** np.arange(5, -1, -1)
    mean = (fading * [x.mean() for x in values]).sum() / fading.sum()
    d = values[-1] - mean
    std = np.sqrt((fading * [(x**2).mean() for x in values]).sum() / fading.sum() - mean**2)
    expected = 1 + ALPHA * d / std if form == "loss_zscore" else BUMPS[form](d)
    torch.testing.assert_close(weights[-1], torch.tensor(expected), rtol=1e-10, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_a_saved_state_goes_on_bit_equal(form):
    first = bind(form=form, center="ema")
    first(sigmas(5), losses(5))
    second = bind(form=form, center="ema")
    second.load_state_dict(load(save(first.state_dict())))
    after = [bound(sigmas(5, seed=1), losses(5, seed=1)) for bound in (first, second, bind(form=form, center="ema"))]
    assert torch.equal(after[0], after[1])
    assert not torch.equal(after[0], after[2])


def test_a_state_of_something_else_is_refused():
    with pytest.raises(ValueError, match=r"Not the state of BoundALSR\(ALSR.*it has \['moments'\], and not \['sums'\]"):
        bind(center="ema").load_state_dict({"moments": torch.zeros(3)})
    with pytest.raises(ValueError, match="Not the state of BoundALSR"):
        bind(center="ema").load_state_dict({"sums": torch.zeros(4)})
    plain = bind()
    assert plain.state_dict() == {}
    plain.load_state_dict({})
    with pytest.raises(ValueError, match=r"Not the state of BoundWeighting\(.*it has \['sums'\], and not \[\]"):
        plain.load_state_dict({"sums": torch.zeros(3)})


# the hot path ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "center"), MEASURED)
def test_it_does_not_wait_for_the_device_and_compiles_in_one_graph(form, center):
    t, loss = sigmas(6).float(), losses(6).float()
    eager, watched, traced, elsewhere = (bind(form=form, center=center) for _ in range(4))
    expected = [eager(t, loss), eager(t / 2, loss)]
    with NoHostSync():
        watched(t, loss)
    compiled = torch.compile(lambda t, loss: traced(t, loss), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close([compiled(t, loss), compiled(t / 2, loss)], expected, rtol=1e-6, atol=0)
    assert elsewhere(t.to("meta"), loss.to("meta")).device.type == "meta"


# what is refused ------------------------------------------------------------------------------------------------------


def test_a_fixed_mean_of_losses_is_refused():
    with pytest.raises(ValueError, match=r"form='loss_zscore'.*`center` must be 'batch' or 'ema', got 'fixed'"):
        get_weighting("alsr", form="loss_zscore")


@pytest.mark.parametrize(
    ("hp", "message"),
    [
        ({"alpha": 0}, r"`ALSR\(alpha=...\)` must be > 0, got 0"),
        ({"ema_decay": 1}, r"`ALSR\(ema_decay=...\)` must be < 1, got 1"),
        ({"ema_decay": 0}, r"`ALSR\(ema_decay=...\)` must be > 0, got 0"),
        ({"form": "lorentz"}, r"must be one of \['cauchy', 'gaussian', 'loss_zscore'\], got 'lorentz'"),
        ({"center": "median"}, r"must be one of \['fixed', 'batch', 'ema'\], got 'median'"),
    ],
)
def test_bad_values_are_refused(hp, message):
    with pytest.raises(ValueError, match=message):
        get_weighting("alsr", **hp)


def test_a_density_without_a_mean_is_refused():
    with pytest.raises(ValueError, match=r"log-SNR has no mean under Cauchy\(.*; give `mu=`, or another density"):
        get_weighting("alsr").bind(EDM, prediction_type="edm", density=Cauchy())
    with pytest.raises(ValueError, match="needs the density of the draws: call `bind` or `over_log_snr` first"):
        get_weighting("alsr").log_weight(torch.zeros(1))


@pytest.mark.parametrize("loss", [None, torch.ones(2)])
def test_losses_that_are_needed_are_asked_for(loss):
    with pytest.raises(ValueError, match=r"needs `loss`, one for each of `t`, shape \(3,\); got"):
        bind(form="loss_zscore", center="batch")(torch.ones(3), loss)


def test_a_batch_has_one_dimension():
    with pytest.raises(ValueError, match=r"`t` must have shape \(B,\) or \(\), got \(2, 2\)"):
        bind(center="batch")(torch.ones(2, 2))


@pytest.mark.parametrize("center", ["batch", "ema"])
def test_functions_of_the_timestep_alone_refuse_a_weight_of_the_batch(center, capsys):
    message = r"depend on the batch, not on the timestep alone: bind it, .*`bound\(t, loss\)`.* `center='fixed'`"
    t, x = torch.ones(2), torch.ones(2, 1)
    with pytest.raises(ValueError, match=message):
        loss_weight(t, EDM, "alsr", center=center, **FLOAT64)
    with pytest.raises(ValueError, match=message):
        weighted_loss(x, x, t, EDM, "alsr", center=center, prediction_type="edm")
    with pytest.raises(ValueError, match=message):
        snrweights.attach(torch.nn.Linear(1, 1), EDM, "alsr", center=center, timestep=lambda x: t)
    assert command(["launch", "--method", "alsr", "--set", f"center={center}", launch.__file__]) == 2
    assert "depend on the batch" in capsys.readouterr().err
