"""Every scheduler class of the installed diffusers: read as it noises, or refused with the reason."""

import inspect
import math
import re

import diffusers
import pytest
import torch
from diffusers import schedulers
from noising import AFTER_SET_TIMESTEPS, ARGUMENTS, assert_reads_as_it_noises, log_snr_by_noising, make, timesteps

from snrweights import CosineSchedule, DiscreteSchedule, EDMSchedule, FlowSchedule, as_schedule
from snrweights.schedulers import REFUSED

# diffusers hands torch tensors to numpy functions in some constructors
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

NAMES = sorted(name for name in {*dir(schedulers), *dir(diffusers)} if name.endswith("Scheduler"))

SUPPORTED = set(NAMES) & set(
    re.findall(
        r"\w+",
        """
        CogVideoXDDIMScheduler CogVideoXDPMScheduler CosineDPMSolverMultistepScheduler DDIMParallelScheduler
        DDIMScheduler DDPMParallelScheduler DDPMScheduler DDPMWuerstchenScheduler DEISMultistepScheduler
        DPMSolverMultistepInverseScheduler DPMSolverMultistepScheduler DPMSolverSDEScheduler
        DPMSolverSinglestepScheduler EDMDPMSolverMultistepScheduler EDMEulerScheduler EulerAncestralDiscreteScheduler
        EulerDiscreteScheduler FlowMatchEulerDiscreteScheduler FlowMatchHeunDiscreteScheduler FlowMatchLCMScheduler
        HeunDiscreteScheduler KDPM2AncestralDiscreteScheduler KDPM2DiscreteScheduler LCMScheduler
        LMSDiscreteScheduler MiniMaxH3Scheduler PNDMScheduler RFD4ProteinaScheduler SASolverScheduler
        ScoreSdeVeScheduler TCDScheduler UnCLIPScheduler UniPCMultistepScheduler
        """,
    )
)


def takes(option):
    return sorted(n for n in SUPPORTED if option in inspect.signature(getattr(schedulers, n).__init__).parameters)


# every class ----------------------------------------------------------------------------------------------------------


def test_every_class_is_either_read_or_refused():
    assert not SUPPORTED & set(REFUSED)
    unknown = set(NAMES) - SUPPORTED - set(REFUSED)
    assert not unknown, f"diffusers {diffusers.__version__} has classes that are neither read nor refused: {unknown}"


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
def test_log_snr_is_what_noising_does(name):
    scheduler = make(name)
    if name in AFTER_SET_TIMESTEPS:
        scheduler.set_timesteps(20)
    assert_reads_as_it_noises(scheduler)


@pytest.mark.parametrize("name", [name for name in NAMES if name in REFUSED])
def test_a_refusal_names_the_class_and_the_reason(name):
    with pytest.raises(TypeError, match=f"^{name} has no training schedule: ") as raised:
        as_schedule(make(name))
    assert str(raised.value).endswith(f": {REFUSED[name]}.")
    assert len(REFUSED[name]) > 20


@pytest.mark.parametrize("name", NAMES)
def test_a_subclass_behaves_as_its_parent(name):
    parent, child = make(name), type(f"My{name}", (getattr(schedulers, name),), {})(**ARGUMENTS.get(name, {}))
    if name in REFUSED or name in AFTER_SET_TIMESTEPS:
        with pytest.raises(TypeError, match=f"^{name}") as refusal:
            as_schedule(parent)
        with pytest.raises(TypeError, match=re.escape(str(refusal.value).replace(name, f"My{name}", 1))):
            as_schedule(child)
        return
    expected, actual = as_schedule(parent), as_schedule(child)
    assert type(actual) is type(expected)
    assert actual.prediction_type == expected.prediction_type
    assert torch.equal(actual.log_snr(actual.grid()), expected.log_snr(expected.grid()))


# options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(AFTER_SET_TIMESTEPS))
def test_before_set_timesteps_a_solver_that_noises_backwards_is_refused(name):
    with pytest.raises(TypeError, match=rf"^{name}.add_noise before set_timesteps\(\).*DDPMScheduler.from_config"):
        as_schedule(make(name))


@pytest.mark.parametrize("name", takes("rescale_betas_zero_snr"))
def test_zero_terminal_snr(name):
    scheduler = make(name, rescale_betas_zero_snr=True)
    if name in AFTER_SET_TIMESTEPS:
        scheduler.set_timesteps(20)
    assert_reads_as_it_noises(scheduler)


def test_zero_terminal_snr_is_exact():
    assert as_schedule(make("DDPMScheduler", rescale_betas_zero_snr=True)).log_snr(torch.tensor(999)) == -math.inf


FLOW_SIGMAS = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}


@pytest.mark.parametrize("name", [name for name in takes("use_flow_sigmas") if name != "SASolverScheduler"])
def test_flow_sigmas(name):
    scheduler = make(name, **FLOW_SIGMAS)
    with pytest.raises(TypeError, match=rf"^{name}.add_noise before set_timesteps\(\)"):
        as_schedule(scheduler)
    scheduler.set_timesteps(20)
    schedule = as_schedule(scheduler)
    assert isinstance(schedule, FlowSchedule)
    assert (schedule.shift, schedule.prediction_type) == (3.0, "flow_prediction")
    for t in scheduler.timesteps:
        sigma = 1 / (1 + math.exp(log_snr_by_noising(scheduler, t) / 2))
        assert t.item() / 1000 == pytest.approx(sigma, abs=1e-3)  # the timestep is sigma * 1000, cut to an integer
        assert schedule.log_snr(t).item() == pytest.approx(2 * math.log((1000 - t.item()) / t.item()))


def test_sasolver_noises_by_its_table_whatever_its_flow_sigmas_say_and_is_refused():
    scheduler = make("SASolverScheduler", **FLOW_SIGMAS)
    scheduler.set_timesteps(20)
    plain = make("SASolverScheduler")
    t = scheduler.timesteps[3]
    assert log_snr_by_noising(scheduler, t) == log_snr_by_noising(plain, t)
    with pytest.raises(TypeError, match=r"SASolverScheduler.*use_flow_sigmas"):
        as_schedule(scheduler)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler"])
def test_fractional_timesteps_after_set_timesteps(name):
    scheduler = make(name)
    scheduler.set_timesteps(20)
    schedule = as_schedule(scheduler)
    assert (scheduler.timesteps.frac() > 0).any()
    for t in scheduler.timesteps:  # diffusers interpolates sigma, we log-SNR: apart by curvature over one step
        assert schedule.log_snr(t).item() == pytest.approx(log_snr_by_noising(scheduler, t), abs=2e-3)


def test_continuous_euler_passes_a_quarter_of_log_sigma():
    scheduler = make("EulerDiscreteScheduler", timestep_type="continuous", prediction_type="v_prediction")
    schedule = as_schedule(scheduler)
    assert isinstance(schedule, EDMSchedule)
    assert (schedule.prediction_type, schedule.timestep) == ("v_prediction", "c_noise")
    assert_reads_as_it_noises(scheduler)
    scheduler.set_timesteps(20)
    assert_reads_as_it_noises(scheduler)


def test_continuous_euler_without_v_prediction_keeps_indices():
    # diffusers reads timestep_type="continuous" together with v_prediction only
    scheduler = make("EulerDiscreteScheduler", timestep_type="continuous", prediction_type="epsilon")
    assert isinstance(as_schedule(scheduler), DiscreteSchedule)
    assert_reads_as_it_noises(scheduler)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "LCMScheduler"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_prediction_type_of_the_config_is_carried(name, prediction_type):
    assert as_schedule(make(name, prediction_type=prediction_type)).prediction_type == prediction_type


def test_prediction_types_that_the_class_implies():
    for name in ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "MiniMaxH3Scheduler"):
        assert as_schedule(make(name)).prediction_type == "flow_prediction"
    edm = as_schedule(make("EDMEulerScheduler", sigma_data=0.7))
    assert (edm.prediction_type, edm.sigma_data, edm.timestep) == ("edm", 0.7, "c_noise")
    assert as_schedule(make("ScoreSdeVeScheduler")).prediction_type is None
    stable_audio = as_schedule(make("CosineDPMSolverMultistepScheduler"))
    assert isinstance(stable_audio, CosineSchedule)
    assert stable_audio.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("name", "coords"),
    [
        ("DDPMScheduler", "vp"),
        ("EulerDiscreteScheduler", "ve"),
        ("HeunDiscreteScheduler", "ve"),
        ("EDMEulerScheduler", "ve"),
        ("ScoreSdeVeScheduler", "ve"),
        ("FlowMatchEulerDiscreteScheduler", "flow"),
    ],
)
def test_coordinates_are_those_of_the_noising(name, coords):
    scheduler = make(name)
    assert as_schedule(scheduler).coords == coords
    t = timesteps(scheduler)[2].reshape(1)
    x0, noise = torch.eye(2, dtype=torch.float64).reshape(2, 1, 1, 2).unbind()
    noised = scheduler.add_noise if hasattr(scheduler, "add_noise") else lambda x, e, t: scheduler.scale_noise(x, t, e)
    alpha, sigma = noised(x0[None], noise[None], t).flatten().tolist()
    rule = {"vp": alpha**2 + sigma**2, "ve": alpha, "flow": alpha + sigma}[coords]
    assert rule == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_the_flow_shift_reaches_the_schedule(name):
    scheduler = make(name, shift=3.0)
    schedule = as_schedule(scheduler)
    assert schedule.shift == 3.0
    assert schedule.s_min * 1000 == pytest.approx(scheduler.timesteps.min().item(), rel=1e-5)
    assert_reads_as_it_noises(scheduler)


def test_a_dynamic_shift_is_for_sampling():
    assert as_schedule(make("FlowMatchEulerDiscreteScheduler", shift=3.0, use_dynamic_shifting=True)).shift == 1.0


# tables ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_table_is_rebuilt_from_betas(dtype):
    scheduler, original = make("DDPMScheduler"), make("DDPMScheduler")
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(dtype)
    assert torch.equal(as_schedule(scheduler).log_snr_table, as_schedule(original).log_snr_table)


@pytest.mark.parametrize("name", ["DDPMScheduler", "CogVideoXDDIMScheduler"])
def test_a_half_precision_table_that_betas_do_not_reproduce_is_refused(name):
    scheduler = make(name)
    if name == "DDPMScheduler":
        scheduler.betas = scheduler.betas * 1.1
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.half()
    with pytest.raises(TypeError, match=r"`alphas_cumprod` must be a float32 or float64 tensor, got torch\.float16"):
        as_schedule(scheduler)


def test_cogvideox_is_read_from_its_table_and_not_from_its_betas():
    scheduler = make("CogVideoXDDIMScheduler")
    from_betas = DiscreteSchedule.from_betas(scheduler.betas).log_snr_table
    table = as_schedule(scheduler).log_snr_table
    assert (table - from_betas).abs().max() > 0.5
    assert torch.equal(as_schedule(scheduler).alphas_cumprod, scheduler.alphas_cumprod.double())


def test_deprecated_attributes_of_a_scheduler_are_left_alone():
    class Warns(schedulers.DDPMScheduler):
        def __getattr__(self, name):  # diffusers warns where a config entry is read as an attribute
            assert name not in ("prediction_type", "sigma_data"), name
            return super().__getattr__(name)

    assert as_schedule(Warns()).prediction_type == "epsilon"


def test_an_object_without_a_schedule_is_refused():
    class Nothing:
        config = None

    with pytest.raises(TypeError, match="Cannot read a noise schedule from Nothing; give a diffusers scheduler"):
        as_schedule(Nothing())
