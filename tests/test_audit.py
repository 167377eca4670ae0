"""What the audit finds in losses of every kind, that it finds nothing where nothing is, and that it leaves no trace."""

import copy
import json
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import NoHostSync
from diffusers import DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from snrweights.integrations.audit import Audit, DoubleWeightingError
from snrweights.integrations.audit_report import density_of
from torch import nn

import snrweights
from snrweights import as_schedule, attach

B = 8
BACKWARD = torch.autograd.backward


class Model(nn.Conv2d):
    """Takes the timestep of a diffusers model and does not need it."""

    def __init__(self, out_channels=3):
        super().__init__(3, out_channels, 3, padding=1)

    def forward(self, sample, timestep):
        return super().forward(sample)


def second_argument(sample, timestep):
    return timestep


def per_sample(a, b):
    return (a - b).square().mean((1, 2, 3))


def epsilon(weight=None, perturbation=0.0, scheduler=None):
    """A DDPM step: (scheduler, function from the model to the loss)."""
    scheduler = scheduler or DDPMScheduler()

    def step(model, generator):
        x0, noise = images(generator), torch.randn(B, 3, 8, 8, generator=generator)
        t = torch.randint(0, 1000, (B,), generator=generator)
        disturbed = noise + perturbation * torch.randn(noise.shape, generator=generator)
        prediction = model(scheduler.add_noise(x0, disturbed, t), t)
        return reduce(per_sample(prediction[:, :3], noise), weight, scheduler, t)

    return scheduler, step


def velocity(weight=None):
    scheduler = DDPMScheduler(prediction_type="v_prediction")

    def step(model, generator):
        x0, noise = images(generator), torch.randn(B, 3, 8, 8, generator=generator)
        t = torch.randint(0, 1000, (B,), generator=generator)
        prediction = model(scheduler.add_noise(x0, noise, t), t)
        return reduce(per_sample(prediction, scheduler.get_velocity(x0, noise, t)), weight, scheduler, t)

    return scheduler, step


def flow(loss):
    scheduler = FlowMatchEulerDiscreteScheduler()

    def step(model, generator):
        x0, noise = images(generator), torch.randn(B, 3, 8, 8, generator=generator)
        s = torch.rand(B, generator=generator).clamp(0.02, 0.98)
        sigma = s.view(-1, 1, 1, 1)
        x = (1 - sigma) * x0 + sigma * noise
        return loss(model(x, 1000 * s), x, x0, noise, sigma)

    return scheduler, step


def images(generator):
    return torch.randn(B, 3, 8, 8, generator=generator).mul(0.5)


def snr_of(scheduler, t):
    table = scheduler.alphas_cumprod[t]
    return table / (1 - table)


def reduce(errors, weight, scheduler, t):
    return errors.mean() if weight is None else (weight(snr_of(scheduler, t)) * errors).mean()


def run(scheduler, step, steps=6, model=None, **options):
    """Train for some steps with a method that does nothing; return the audit's report."""
    model = model or Model()
    generator = torch.Generator().manual_seed(0)
    with attach(model, scheduler, None, timestep=second_argument, audit=steps, **options) as handle:
        for _ in range(steps + 1):
            step(model, generator).backward()
        assert torch.autograd.backward is BACKWARD
        return handle.audit


def min_snr_a(snr):
    return snr.clamp(max=5) / (snr + 1)


def min_snr_b(snr):
    return snr.clamp(max=5) / snr + 1


def min_snr_c(snr):
    return (snr + 1).clamp(max=5) / (snr + 1)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (epsilon(lambda snr: snr.clamp(max=5) / snr), "min_snr(gamma=5)"),
        (epsilon(lambda snr: snr.clamp(max=2.7) / snr), "min_snr(gamma=2.7)"),
        (velocity(min_snr_a), "min_snr(gamma=5)"),
        (velocity(min_snr_b), "diffusers_min_snr_v_plus_one(gamma=5)"),
        (velocity(min_snr_c), "pixart_min_snr_v(gamma=5)"),
        (epsilon(lambda snr: snr.rsqrt()), "debiased"),
        (epsilon(lambda snr: (1 + snr) / snr), "the plain MSE of v_prediction"),
        (epsilon(lambda snr: 3 / (1 / (1 + snr) + 0.2) / (1 + snr)), "smoothed_kl(tau=0.2) times 3"),
    ],
    ids=["min_snr", "gamma 2.7", "A", "B", "C", "debiased", "as v", "smoothed_kl"],
)
def test_the_weight_of_a_script_is_recognised(case, name):
    report = run(*case)
    assert report.is_mse
    assert not report.constant
    assert name in report.known_as
    assert report.target_as_expected is True


def test_the_measured_weight_is_the_weight():
    scheduler, step = epsilon(lambda snr: snr.clamp(max=5) / snr)
    report = run(scheduler, step)
    assert len(report.weight) == 6 * B
    snr = torch.tensor(report.log_snr).exp()
    torch.testing.assert_close(torch.tensor(report.weight), snr.clamp(max=5) / snr, rtol=1e-4, atol=0)
    assert min(report.weight) < 0.5 < max(report.weight)  # both sides of gamma were drawn


def test_a_weight_of_no_known_kind_is_said_to_be_one():
    report = run(*epsilon(lambda snr: 2 + torch.sin(3 * snr.log())))
    assert (report.is_mse, report.constant, report.known_as) == (True, False, [])
    assert "of its own kind" in str(report)


def test_the_snr_of_an_unconditional_sample_loss_is_found():
    scheduler = DDPMScheduler(prediction_type="sample")

    def step(model, generator):
        x0, noise = images(generator), torch.randn(B, 3, 8, 8, generator=generator)
        t = torch.randint(0, 1000, (B,), generator=generator)
        errors = (model(scheduler.add_noise(x0, noise, t), t) - x0).square()
        return (snr_of(scheduler, t).view(-1, 1, 1, 1) * errors).mean()

    report = run(scheduler, step)
    assert not report.constant
    assert report.known_as[0] == "the plain MSE of epsilon"
    assert report.target_as_expected is True


def sd3_preconditioned(out, x, x0, noise, sigma):
    return (x - sigma * out - x0).square().mean()


def test_sd3_preconditioning_is_the_plain_mse_of_the_sample():
    report = run(*flow(sd3_preconditioned))
    assert not report.constant
    assert report.known_as[0] == "the plain MSE of sample"
    assert report.target_as_expected is True
    # said to be that, nothing is weighted twice
    scheduler, step = flow(sd3_preconditioned)
    model, generator = Model(), torch.Generator().manual_seed(0)
    with attach(model, scheduler, "min_snr", prediction_type="sample", timestep=second_argument) as handle:
        for _ in range(4):
            step(model, generator).backward()
        assert handle.audit.constant


@pytest.mark.parametrize(
    ("weight", "name"),
    [
        (lambda s: s**-2.0, "diffusers_sd3_sigma_sqrt_on_velocity"),
        (lambda s: 2 / (torch.pi * (1 - 2 * s + 2 * s**2)), "diffusers_sd3_cosmap_on_velocity"),
    ],
)
def test_sd3_weights_on_the_velocity_are_told_apart(weight, name):
    report = run(*flow(lambda out, x, x0, noise, s: (weight(s) * (out - noise + x0).square()).mean()))
    assert name in report.known_as


def edm_style(weight):
    """The F network of a preconditioned x0 loss, with 0.25 ln sigma as its timestep."""
    scheduler = EDMEulerScheduler()
    data = scheduler.config.sigma_data

    def step(model, generator):
        x0, noise = images(generator), torch.randn(B, 3, 8, 8, generator=generator)
        log_sigma = torch.randn(B, generator=generator) * 1.2 - 1.2
        sigma = log_sigma.exp().view(-1, 1, 1, 1)
        x = x0 + sigma * noise
        root = (sigma**2 + data**2).sqrt()
        denoised = data**2 / root**2 * x + sigma * data / root * model(x / root, 0.25 * log_sigma)
        return (weight(sigma, data) * (denoised - x0).square()).mean()

    return scheduler, step


def test_edm_weights_are_told_from_their_absence():
    proper = run(*edm_style(lambda s, data: (s**2 + data**2) / (s * data) ** 2))
    assert proper.constant
    assert proper.target_as_expected is True
    plain = run(*edm_style(lambda s, data: torch.ones_like(s)))
    assert plain.known_as[0] == "the plain MSE of sample"
    inverse = run(*edm_style(lambda s, data: s**-2))
    assert inverse.known_as[0] == "the plain MSE of epsilon"


def test_the_input_scale_of_euler_is_seen_through():
    scheduler = EulerDiscreteScheduler()

    def step(model, generator):
        x0, noise = images(generator), torch.randn(B, 3, 8, 8, generator=generator)
        t = torch.randint(0, 1000, (B,), generator=generator)
        sigma = ((1 - scheduler.alphas_cumprod[t]) / scheduler.alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1)
        x = x0 + sigma * noise
        out = model(x / (sigma**2 + 1).sqrt(), t)
        return ((x - sigma * out - x0).square() / sigma**2).mean()  # an x0 loss that is a plain one of epsilon

    report = run(scheduler, step)
    assert report.constant
    assert report.target_as_expected is True


def halves(model, generator):
    """Prior preservation at weight 0.5."""
    scheduler = DDPMScheduler()
    x0, noise = images(generator), torch.randn(B, 3, 8, 8, generator=generator)
    t = torch.randint(0, 1000, (B,), generator=generator)
    prediction = model(scheduler.add_noise(x0, noise, t), t)
    (ours, prior), (a, b) = prediction.chunk(2), noise.chunk(2)
    return F.mse_loss(ours, a) + 0.5 * F.mse_loss(prior, b)


def test_no_wolf_is_cried():
    plain = run(*epsilon())
    assert (plain.is_mse, plain.constant, plain.target_as_expected) == (True, True, True)
    perturbed = run(*epsilon(perturbation=0.1))
    assert (perturbed.is_mse, perturbed.constant, perturbed.target_as_expected) == (True, True, True)
    prior = run(DDPMScheduler(), halves)
    assert (prior.is_mse, prior.constant, prior.target_as_expected) == (True, True, True)
    assert {round(weight, 3) for weight in prior.weight} == {2.0, 1.0}
    variance = run(*epsilon(), model=Model(out_channels=6))
    assert (variance.is_mse, variance.constant, variance.target_as_expected) == (True, True, True)


def dream(model, generator):
    """The target is moved by a prediction of the model itself."""
    scheduler = DDPMScheduler()
    x0, noise = images(generator), torch.randn(B, 3, 8, 8, generator=generator)
    t = torch.randint(0, 1000, (B,), generator=generator)
    x = scheduler.add_noise(x0, noise, t)
    with torch.no_grad():
        moved = 0.5 * (noise - model(x, t))
    return F.mse_loss(model(x + (1 - scheduler.alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1) * moved, t), noise + moved)


def test_dream_has_a_plain_mse_on_a_target_of_its_own():
    report = run(DDPMScheduler(), dream)
    assert (report.is_mse, report.constant) == (True, True)
    model = Model()
    with attach(model, DDPMScheduler(), "min_snr", timestep=second_argument):
        for seed in range(9):
            dream(model, torch.Generator().manual_seed(seed)).backward()


def test_a_wrong_target_is_told():
    scheduler = DDPMScheduler()  # states epsilon

    def step(model, generator):
        x0, noise = images(generator), torch.randn(B, 3, 8, 8, generator=generator)
        t = torch.randint(0, 1000, (B,), generator=generator)
        return F.mse_loss(model(scheduler.add_noise(x0, noise, t), t), x0)

    report = run(scheduler, step)
    assert report.constant
    assert report.target_as_expected is False


@pytest.mark.parametrize(
    "loss",
    [
        lambda a, b: F.huber_loss(a, b, delta=0.1),
        lambda a, b: ((a - b).square() + 0.01).sqrt().mean(),
        F.l1_loss,
        lambda a, b: -F.logsigmoid(per_sample(a, b)[: B // 2] - per_sample(a, b)[B // 2 :]).mean(),
    ],
    ids=["huber", "pseudo-huber", "l1", "pairs"],
)
def test_what_is_not_an_mse_is_said_to_be_none(loss):
    scheduler = DDPMScheduler()

    def step(model, generator):
        x0, noise = images(generator), torch.randn(B, 3, 8, 8, generator=generator)
        t = torch.randint(0, 1000, (B,), generator=generator)
        return loss(model(scheduler.add_noise(x0, noise, t), t), noise)

    report = run(scheduler, step)
    assert not report.is_mse
    assert "not a weighted MSE" in str(report)
    model, generator = Model(), torch.Generator().manual_seed(0)
    with attach(model, scheduler, "min_snr", timestep=second_argument):  # and no reason to stop a training
        for _ in range(7):
            step(model, generator).backward()
        with pytest.warns(UserWarning, match=r"Could not look whether .*: it is not a mean squared error"):
            step(model, generator).backward()


def twice(on_double_weighting):
    scheduler, step = epsilon(lambda snr: snr.clamp(max=5) / snr)
    model, generator = Model(), torch.Generator().manual_seed(0)
    with attach(
        model, scheduler, "min_snr", timestep=second_argument, on_double_weighting=on_double_weighting
    ) as handle:
        for _ in range(10):
            step(model, generator).backward()
    assert torch.autograd.backward is BACKWARD
    return handle


def test_two_weights_on_one_loss_are_an_error_by_default():
    scheduler, step = epsilon(lambda snr: snr.clamp(max=5) / snr)
    model, generator = Model(), torch.Generator().manual_seed(0)
    with attach(model, scheduler, "min_snr", timestep=second_argument):
        losses = [step(model, generator) for _ in range(2)]
        with pytest.raises(DoubleWeightingError, match=r"weighted already: min_snr\(gamma=5\)"):
            sum(losses).backward()
        assert torch.autograd.backward is BACKWARD


def test_two_weights_warn_or_pass_where_that_is_asked_for():
    with pytest.warns(UserWarning, match="weighted already") as caught:
        twice("warn")
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert twice("ignore").audit is None
    with pytest.raises(ValueError, match=r"one of \('error', 'warn', 'ignore'\), got 'eror'"):
        attach(Model(), "linear", prediction_type="epsilon", timestep=second_argument, on_double_weighting="eror")


def test_gradients_and_random_numbers_are_those_without_an_audit():
    scheduler, step = epsilon()

    def gradients(**options):
        torch.manual_seed(0)
        model = Model()
        with attach(model, scheduler, "min_snr", timestep=second_argument, **options):
            for _ in range(3):
                step(model, torch.default_generator).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()]), torch.rand(1)

    with_audit, without = gradients(), gradients(on_double_weighting="ignore")
    assert torch.equal(with_audit[0], without[0])
    assert torch.equal(with_audit[1], without[1])


def test_tracking_goes_on_beside_the_audit_and_counts_each_sample_once():
    scheduler, step = epsilon()
    model, generator = Model(), torch.Generator().manual_seed(0)
    with attach(model, scheduler, "min_snr", timestep=second_argument, track=True) as handle:
        for _ in range(3):
            step(model, generator).backward()
    assert int(handle.tracker.compute().count.sum()) == 3 * B


def test_after_its_steps_the_audit_costs_nothing():
    scheduler, step = epsilon()
    model, generator = Model(), torch.Generator().manual_seed(0)
    with attach(model, scheduler, "min_snr", timestep=second_argument, audit=2) as handle:
        for _ in range(2):
            loss = step(model, generator)
            assert torch.autograd.backward is not BACKWARD
            loss.backward()
        assert torch.autograd.backward is BACKWARD
        assert not handle.auditing
        prediction = model(images(generator), torch.arange(B))
        with NoHostSync():
            prediction.square().mean().backward()
        assert handle.audit.steps == 2


def test_an_audit_that_sees_nothing_gives_up_and_says_so():
    scheduler, _ = epsilon()
    other = nn.Linear(1, 1)
    model = Model()
    with attach(model, scheduler, "min_snr", timestep=second_argument, audit=1):
        for _ in range(20):  # before the model's first call they do not count
            other(torch.ones(1, 1)).sum().backward()
        model(torch.ones(B, 3, 8, 8), torch.arange(B))
        for _ in range(7):
            other(torch.ones(1, 1)).sum().backward()
        with pytest.warns(UserWarning, match="Could not look whether Model's loss is weighted already"):
            other(torch.ones(1, 1)).sum().backward()
        assert torch.autograd.backward is BACKWARD


def test_a_loss_that_cannot_be_differentiated_twice_is_not_read():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return gradient

    scheduler, _ = epsilon()
    model = Model()
    with attach(model, scheduler, "min_snr", timestep=second_argument, audit=1) as handle:
        with pytest.warns(UserWarning, match="Could not look"):
            Once.apply(model(torch.ones(B, 3, 8, 8), torch.arange(B))).square().mean().backward()
        assert "differentiate" in handle.audit.not_read[0]
        assert model.weight.grad.abs().sum() > 0


def test_a_hook_of_another_library_on_the_output_is_left_alone():
    scheduler, _ = epsilon()
    model, calls = Model(), []
    with attach(model, scheduler, "min_snr", timestep=second_argument, audit=1):
        out = model(torch.ones(B, 3, 8, 8), torch.arange(B))
        out.register_hook(lambda gradient: calls.append(1))
        with pytest.warns(UserWarning, match="hook of its own"):
            out.square().mean().backward()
    assert len(calls) == 1


def test_the_report_is_json_and_survives_copies_of_the_model():
    scheduler, step = epsilon(lambda snr: snr.clamp(max=5) / snr)
    model, generator = Model(), torch.Generator().manual_seed(0)
    handle = attach(model, scheduler, None, timestep=second_argument, audit=4)
    model(images(generator), torch.arange(B))  # an output that waits for its backward pass
    copy.deepcopy(model)
    pickle.loads(pickle.dumps(model))
    for _ in range(4):
        step(model, generator).backward()
    written = json.loads(json.dumps(handle.report().as_dict(), allow_nan=False))
    assert written["audit"]["known_as"][0] == "min_snr(gamma=5)"
    handle.detach()


def test_accumulation_and_two_forwards_before_one_backward():
    scheduler, step = epsilon()
    model, generator = Model(), torch.Generator().manual_seed(0)
    with attach(model, scheduler, "min_snr", timestep=second_argument, audit=2) as handle:
        ((step(model, generator) + step(model, generator)) / 4).backward()
        assert len(handle.audit.weight) == 2 * B
        assert handle.audit.weight[0] == pytest.approx(0.25, rel=1e-4)
        assert handle.audit.constant


@pytest.mark.parametrize("steps", [0, -1])
def test_an_audit_has_a_step_at_least(steps):
    with pytest.raises(ValueError, match="`audit` must be >= 1"):
        Audit(steps, 0, None)


def test_densities_are_told_apart():
    u = (torch.arange(400) + 0.5) / 400
    schedule = as_schedule("flow")
    assert density_of(schedule.log_snr(u), schedule) == "uniform over the schedule's timesteps"
    assert density_of(snrweights.densities.logit_normal().icdf(u), schedule) == "logit_normal"
    assert density_of(snrweights.densities.Mode().icdf(u), schedule) == "mode"
    assert density_of(torch.linspace(0, 0.1, 400), schedule) is None
    assert density_of(schedule.log_snr(u[::4]), schedule) is None  # too few to say
    linear = as_schedule("linear")
    assert density_of(linear.log_snr(torch.arange(0, 1000, 3)), linear) == "uniform over the schedule's timesteps"


def test_a_density_of_time_is_told_on_a_shifted_flow():
    u = (torch.arange(400) + 0.5) / 400
    schedule = snrweights.FlowSchedule(shift=3.0)
    assert density_of(snrweights.densities.logit_normal(shift=3.0).icdf(u), schedule) == "logit_normal"


def test_another_library_that_wraps_backward_meanwhile():
    """Its wrapper calls ours, which must not take it for the original."""
    scheduler, step = epsilon()
    plain, calls = torch.autograd.backward, []
    first, second = Model(), Model()
    handle = attach(first, scheduler, "min_snr", timestep=second_argument, audit=2)
    ours = torch.autograd.backward

    def theirs(*args, **kwargs):
        calls.append(1)
        ours(*args, **kwargs)

    torch.autograd.backward = theirs
    try:
        handle.detach()
        with attach(second, scheduler, "min_snr", timestep=second_argument, audit=2) as other:
            step(second, torch.Generator().manual_seed(0)).backward()
            assert len(other.audit.weight) == B
        assert calls == [1]
    finally:
        torch.autograd.backward = ours
    with attach(first, scheduler, "min_snr", timestep=second_argument, audit=2):
        pass
    assert torch.autograd.backward is plain
