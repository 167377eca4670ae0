"""Other projects' weights: reproduced on purpose by `parity`, and by our own weightings where they are the same."""

import pytest
import torch
from cases import golden, numbers
from diffusers import DDPMScheduler

from snrweights import CosineSchedule, get_weighting, loss_weight
from snrweights.weightings import parity

GOLDEN = golden("peers")
GAMMA = GOLDEN["gamma"]
SNR = "snr (diffusers compute_snr)"
MIN_SNR_V = (
    "min_snr v: /(snr+1) diffusers t2i, dreambooth; kohya; OneTrainer; lucidrains; official vmin_snr "
    "(before snr==0 patch)"
)
SEVEN_DIGITS = 1e-6  # the golden numbers are float32, printed to seven digits

# variant, its hyperparameters, the rows it reproduces
VARIANTS = [
    (
        "diffusers_min_snr_epsilon",
        {"gamma": GAMMA},
        ["min_snr eps: diffusers t2i / kohya / lucidrains", "kohya apply_snr_weight eps"],
    ),
    ("diffusers_min_snr_v", {"gamma": GAMMA}, [MIN_SNR_V, "kohya apply_snr_weight v"]),
    (
        "diffusers_min_snr_v_plus_one",
        {"gamma": GAMMA},
        ["min_snr v: base+1 (diffusers dreambooth_lora_sdxl, advanced; invoke-training)"],
    ),
    ("pixart_min_snr_v", {"gamma": GAMMA}, ["min_snr v: min(snr+1,g)/(snr+1) (diffusers pixart)"]),
    ("official_vmin_snr", {"gamma": GAMMA}, ["official vmin_snr after patch (weight=1 where snr==0)"]),
    ("any_target_min_snr", {"gamma": GAMMA}, ["ai-toolkit min_snr (no v branch)"]),
    ("kohya_debiased_epsilon", {}, ["kohya debiased eps", "OneTrainer debiased eps"]),
    ("kohya_debiased_v", {}, ["kohya debiased v"]),
    ("onetrainer_debiased_v", {}, ["OneTrainer debiased v"]),
    ("kohya_scale_v_like_epsilon", {}, ["kohya scale_v_like_eps"]),
    ("kohya_add_v_like_loss", {"factor": 0.1}, ["kohya add_v_pred_like_loss 0.1 (eps)"]),
    ("official_p2", {"k": 1.0, "gamma": 1.0}, ["P2-weighting official k=1 g=1", "OneTrainer P2 g=1 eps"]),
    ("onetrainer_p2_v", {"gamma": 1.0}, ["OneTrainer P2 g=1 v"]),
    ("simpletuner_soft_min_snr", {}, ["SimpleTuner compute_snr(use_soft_min=True) [dead code]"]),
]


def by_snr(weighting, snr, prediction_type="epsilon", sigma_data=0.5):
    """The weight of a weighting at SNR values, zero and infinity included."""
    curve = weighting.over_log_snr(CosineSchedule(sigma_data=sigma_data), prediction_type=prediction_type)
    return curve(snr.log())


def assert_row(actual, row):
    torch.testing.assert_close(actual, numbers(row), rtol=SEVEN_DIGITS, atol=0, equal_nan=True)


# parity variants ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["plain", "ztsnr"])
@pytest.mark.parametrize(("name", "hp", "keys"), VARIANTS, ids=[variant[0] for variant in VARIANTS])
def test_a_variant_equals_its_project(name, hp, keys, table):
    rows = GOLDEN[table]
    for key in keys:
        assert_row(by_snr(parity.get(name, **hp), numbers(rows[SNR])), rows[key])


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize(("name", "hp", "keys"), VARIANTS, ids=[variant[0] for variant in VARIANTS])
def test_a_variant_through_a_scheduler(name, hp, keys, zero_snr):
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=zero_snr
    )
    row = GOLDEN["ztsnr" if zero_snr else "plain"][keys[0]]
    actual = loss_weight(torch.tensor(GOLDEN["timesteps"]), scheduler, parity.get(name, **hp)).double()
    # t = 0: 1 - alphas_cumprod = 8.5e-4 in float32; t = 998 after rescaling: alphas_cumprod is a square of 4.4e-4,
    # the difference of float32 numbers near 0.07
    relative = torch.full((10,), 3e-5, dtype=torch.float64)
    relative[-2] = 2e-4
    expected = numbers(row)
    assert torch.equal(actual.isnan(), expected.isnan())
    close = (actual - expected).abs() <= relative * expected
    assert (close | expected.isnan() | (actual == expected)).all(), (actual, expected)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
@pytest.mark.parametrize("name", ["soft_min_snr", "snr"])
def test_k_diffusion_variants(name, sigma_data):
    rows = GOLDEN["sigma_space"]
    snr = numbers(rows["sigma"]) ** -2
    key = f"k-diffusion {name.replace('_', '-')} sd={sigma_data} (on F-loss)"
    assert_row(by_snr(parity.get(f"kdiffusion_{name}", sigma_data=sigma_data), snr), rows[key])


def test_stable_cascade_variant():
    rows = GOLDEN["gdf"]
    variant = parity.get("stable_cascade_min_snr_plus_one", gamma=GAMMA)
    assert_row(by_snr(variant, numbers(rows["logSNR"]).exp()), rows["MinSNRPlusOneLossWeight"])


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap"])
def test_sd3_schemes_on_a_raw_velocity_and_on_x0(scheme):
    rows = GOLDEN["flow"]
    sigma = numbers(rows["sigma"])
    snr = ((1 - sigma) / sigma) ** 2
    variant = parity.get(f"diffusers_sd3_{scheme}_on_velocity")
    assert_row(by_snr(variant, snr, "flow_prediction"), rows[scheme])
    assert_row(by_snr(get_weighting(f"sd3_{scheme}"), snr, "sample"), rows[scheme])


def test_every_variant_has_a_golden():
    checked = {variant[0] for variant in VARIANTS} | {
        "diffusers_sd3_cosmap_on_velocity",
        "diffusers_sd3_sigma_sqrt_on_velocity",
        "kdiffusion_snr",
        "kdiffusion_soft_min_snr",
        "stable_cascade_min_snr_plus_one",
    }
    assert set(parity.names()) == checked


def test_the_forms_of_min_snr_for_v_differ_by_seven_within_one_repository():
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    t = torch.tensor(500)
    names = ["diffusers_min_snr_v", "diffusers_min_snr_v_plus_one", "pixart_min_snr_v"]
    weights = [loss_weight(t, scheduler, parity.get(name)).item() for name in names]
    assert weights == pytest.approx([0.276, 2.0, 1.0], abs=5e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("min_snr", {}), "Unknown weighting 'min_snr'; choose one of ['diffusers_min_snr_epsilon', "),
        (("official_p2", {"g": 1}), "Weighting 'official_p2' has no hyperparameter 'g'; it takes ['k', 'gamma']."),
    ],
)
def test_an_unknown_variant_lists_the_choices(arguments, message):
    with pytest.raises(ValueError, match=r"choose one of|it takes") as raised:
        parity.get(arguments[0], **arguments[1])
    assert message in str(raised.value)


# our own weightings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["plain", "ztsnr"])
@pytest.mark.parametrize(
    ("name", "hp", "target", "key"),
    [
        ("min_snr", {"gamma": GAMMA}, "epsilon", "ai-toolkit min_snr (no v branch)"),
        ("min_snr", {"gamma": GAMMA}, "v_prediction", MIN_SNR_V),
        ("min_snr", {"gamma": GAMMA}, "sample", "min_snr x0: min(snr,g)"),
        ("p2", {}, "epsilon", "P2-weighting official k=1 g=1"),
        ("ddpm", {}, "sample", "consistency_models snr (sigma_data=.5)"),
        ("snr_plus_one", {}, "sample", "consistency_models snr+1 (sigma_data=.5)"),
        ("edm", {"sigma_data": 0.5}, "sample", "consistency_models karras (sigma_data=.5)"),
        ("truncated_snr", {}, "sample", "consistency_models truncated-snr (sigma_data=.5)"),
        ("native", {}, "sample", "consistency_models uniform (sigma_data=.5)"),
    ],
)
def test_our_weightings_over_snr(name, hp, target, key, table):
    rows = GOLDEN[table]
    assert_row(by_snr(get_weighting(name, **hp), numbers(rows[SNR]), target), rows[key])


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
@pytest.mark.parametrize(
    ("name", "target", "key"),
    [
        ("edm", "edm", "k-diffusion karras sd={} (on F-loss)"),
        ("edm", "sample", "EDM/EDM2/sgm EDMWeighting sd={} (on x0-loss)"),
        ("soft_min_snr", "edm", "k-diffusion soft-min-snr sd={} (on F-loss)"),
        ("ddpm", "edm", "k-diffusion snr sd={} (on F-loss)"),
    ],
)
def test_our_weightings_over_sigma(name, target, key, sigma_data):
    rows = GOLDEN["sigma_space"]
    hp = {"edm": {"sigma_data": sigma_data}, "soft_min_snr": {"gamma": sigma_data**-2}}.get(name, {})
    snr = numbers(rows["sigma"]) ** -2
    actual = by_snr(get_weighting(name, **hp), snr, target, sigma_data)
    assert_row(actual, rows[key.format(sigma_data)])


def test_our_weightings_over_sigma_without_sigma_data():
    rows = GOLDEN["sigma_space"]
    snr = numbers(rows["sigma"]) ** -2
    assert_row(by_snr(get_weighting("snr_plus_one"), snr, "sample"), rows["sgm VWeighting"])
    assert_row(by_snr(get_weighting("ddpm"), snr, "sample"), rows["sgm EpsWeighting"])


@pytest.mark.parametrize(
    ("name", "target", "row"),
    [
        ("ddpm", "sample", "SNRLossWeight"),
        ("p2", "epsilon", "P2LossWeight"),
        ("snr_plus_one", "sample", "SNRPlusOneLossWeight"),
        ("min_snr", "sample", "MinSNRLossWeight"),
        ("truncated_snr", "sample", "TruncatedSNRLossWeight"),
        ("debiased", "epsilon", "DebiasedLossWeight"),
        ("ddpm", "v_prediction", "SigmoidLossWeight"),
    ],
)
def test_our_weightings_over_log_snr(name, target, row):
    rows = GOLDEN["gdf"]
    assert_row(by_snr(get_weighting(name), numbers(rows["logSNR"]).exp(), target), rows[row])


def test_our_objectives_over_log_snr():
    rows = GOLDEN["gdf"]
    log_snr = numbers(rows["logSNR"])
    assert_row(get_weighting("iddpm").log_weight(log_snr).exp(), rows["SechLossWeight"])
    assert_row(get_weighting("sigmoid").log_weight(-log_snr).exp(), rows["SigmoidLossWeight"])  # gdf's is its mirror
