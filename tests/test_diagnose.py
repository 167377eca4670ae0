"""How far a model is from the optimal loss: on denoisers whose gap is known."""

import json
import math

import pytest
import torch
from cases import gaussian_curve

from snrweights.diagnose import ModelGap, diagnose
from snrweights.optimal import OptimalLossCurve, optimal_loss

LEVELS = torch.tensor([-4.0, -2.0, 0.0, 2.0, 4.0], dtype=torch.float64)
CORNERS = torch.cartesian_prod(*[torch.tensor([-0.5, 0.5], dtype=torch.float64)] * 4).reshape(16, 1, 2, 2)
CORNERS_CURVE = optimal_loss(CORNERS, (-LEVELS / 2).exp(), draws=20_000)
IMAGES = torch.randint(0, 256, (60, 1, 3, 3), generator=torch.Generator().manual_seed(0)).byte()
CLASSES = torch.arange(60) % 3
MIRRORED = torch.cat([IMAGES, IMAGES.flip(-1)])


def curve_of(data, **options):
    return optimal_loss(data, (-LEVELS / 2).exp(), draws=8192, **options)


def of_corners(x, log_snr, index):
    """The posterior mean of the corners, coordinate by coordinate."""
    del index
    return 0.5 * torch.tanh(0.5 * x * log_snr.exp()[:, None, None, None])


def ideal_of(points, labels=None, told=None):
    """The posterior mean over points; with labels, over those of the point's own (``told`` by its number)."""
    points = points.double() / 127.5 - 1 if points.dtype == torch.uint8 else points.double()

    def denoise(x, log_snr, index):
        distance = (x.double().flatten(1)[:, None] - points.flatten(1)).square().sum(-1)
        logits = -distance * log_snr.double().exp()[:, None] / 2
        if labels is not None:
            logits = logits.masked_fill(labels != told[index][:, None], -math.inf)
        return (logits.softmax(1) @ points.flatten(1)).view_as(x).to(x)

    return denoise


def test_the_ideal_denoiser_has_no_gap_and_the_loss_of_the_curve():
    found = diagnose(of_corners, CORNERS, LEVELS, CORNERS_CURVE, draws=2000)
    assert (found.gap < 1e-20).all()
    error = (found.loss_stderr**2 + found.optimum_stderr**2).sqrt()
    assert ((found.loss - found.optimum).abs() < 4 * error + 1e-12).all()
    assert found.warnings() == []
    assert found.same_data


def test_a_known_error_is_a_known_gap():
    def worse(x, log_snr, index):
        return of_corners(x, log_snr, index) + 0.1 * log_snr.sigmoid()[:, None, None, None].sqrt()

    found = diagnose(worse, CORNERS, LEVELS, CORNERS_CURVE, draws=2000)
    torch.testing.assert_close(found.gap, 0.01 * LEVELS.sigmoid(), rtol=1e-9, atol=0)
    assert ((found.loss - found.optimum - found.gap).abs() < 4 * found.loss_stderr + 4 * found.optimum_stderr).all()
    assert found.warnings() == []
    expected = torch.trapezoid(0.01 * LEVELS.sigmoid() * LEVELS.exp(), LEVELS) * 4 / 2
    assert found.nats()[0] == pytest.approx(expected.item(), rel=1e-9)


def test_losses_are_more_precise_than_without_controls_and_their_errors_hold():
    off = []
    for seed in range(60):
        found = diagnose(of_corners, CORNERS, LEVELS[1:4], CORNERS_CURVE, draws=64, seed=seed)
        off.append((found.loss - found.optimum) / (found.loss_stderr**2 + found.optimum_stderr**2).sqrt())
    inside = (torch.stack(off).abs() < 1.96).double().mean(0)
    assert (inside > 0.95 - 4 * (0.95 * 0.05 / 60) ** 0.5).all()


def test_a_linear_denoiser_of_gaussian_data_has_no_gap():
    """Fewer noise levels than ln N can tell points apart at: there the set is as good as its distribution."""
    data = torch.randn(4000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    data = (data - data.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky((data - data.mean(0)).T @ data / 4000)).T
    levels = torch.tensor([-4.0, -2.0, 0.0], dtype=torch.float64)
    found = diagnose(
        lambda x, log_snr, index: x * log_snr.sigmoid()[:, None], data, levels, gaussian_curve(1.0, dim=3), draws=512
    )
    assert (found.gap < 2e-3 * found.optimum).all()
    assert ((found.loss - found.optimum).abs() < 2e-3 * found.optimum).all()


def test_bytes_flips_and_labels():
    curve = curve_of(IMAGES, flips=True)
    assert diagnose(ideal_of(MIRRORED), IMAGES, LEVELS, curve, flips=True).warnings() == []
    curve = curve_of(IMAGES, labels=CLASSES)
    told = diagnose(ideal_of(IMAGES, CLASSES, CLASSES), IMAGES, LEVELS, curve, labels=CLASSES)
    assert told.warnings() == []
    assert (told.gap < 1e-9).all()  # of single precision


@pytest.mark.parametrize("labels", [None, torch.arange(80) % 4])
def test_images_far_from_each_other_raise_no_alarm_where_nothing_is_confused(labels):
    data = torch.randint(0, 256, (80, 3, 8, 8), generator=torch.Generator().manual_seed(2)).byte()
    levels = torch.linspace(-8, 8, 9)
    curve = optimal_loss(data, (-levels / 2).exp(), draws=1024, labels=labels)
    assert curve.value[0] < 1e-170 * curve.value[-1]  # its square is nothing
    found = diagnose(lambda x, log_snr, index: x / 2, data, levels, curve, labels=labels)
    assert found.warnings() == []


def test_a_coarse_curve_raises_no_alarm():
    coarse = optimal_loss(IMAGES, torch.logspace(-2, 2, 20), draws=8192)
    levels = torch.linspace(-6, 6, 25)
    fine = optimal_loss(IMAGES, (-levels / 2).exp(), draws=8192)
    off = (coarse.at((-levels / 2).exp()) / fine.at((-levels / 2).exp()) - 1).abs()
    assert off.max() > 0.003
    assert diagnose(ideal_of(IMAGES), IMAGES, levels, coarse, draws=512).warnings() == []


@pytest.mark.parametrize(
    ("denoise", "data", "curve"),
    [
        (ideal_of(IMAGES), IMAGES, curve_of(MIRRORED)),  # the curve is of more
        (ideal_of(IMAGES, CLASSES, CLASSES), IMAGES, curve_of(IMAGES)),  # the model knows more
        (ideal_of(IMAGES[:20]), IMAGES[:20], curve_of(IMAGES)),  # another split
        (ideal_of(IMAGES / 255), (IMAGES / 255), curve_of(IMAGES)),  # another scale
    ],
    ids=["flips", "labels", "split", "scale"],
)
def test_a_model_below_the_optimum_is_said_and_what_to_check(denoise, data, curve):
    found = diagnose(denoise, data, LEVELS, curve, draws=1024)
    assert found.below.any()
    first, *_, last = found.warnings()
    assert "is below the optimum: no denoiser of these data can be, at" in first
    assert "Something does not match." in last
    assert all(word in last for word in ("split", "scale", "mirror images", "labels", "sigma_data"))
    assert ("other data than these" in last) == (not found.same_data)


def test_the_draws_are_those_of_the_seed():
    seen = []

    def remember(x, log_snr, index):
        seen.append(x)
        return 0 * x

    options = {"draws": 32, "batch_size": 20}
    first, again, other = (diagnose(remember, CORNERS, LEVELS, CORNERS_CURVE, seed=s, **options) for s in (1, 1, 2))
    assert torch.equal(first.loss, again.loss)
    assert not torch.equal(first.loss, other.loss)
    assert max(len(x) for x in seen) == 20
    plus, minus = torch.cat(seen[:2]), torch.cat(seen[2:4])
    assert torch.allclose((plus + minus) / 2, ((plus + minus) / 2).sign() / 2)  # corners, and opposite noise


def known(**other):
    level = torch.tensor([-2.0, 0.0, 2.0], dtype=torch.float64)
    few, one = torch.full((3,), 1e-3).double(), torch.ones(3).double()
    distances = 2 + 1e-3 * torch.tensor([[-1.0, 1.0]]).double().expand(3, 2)  # two draws: 2 ± 0.001
    values = {"loss": 3 * one, "optimum": one, "distances": distances, "unexplained": 0 * one}
    errors = {"loss_stderr": few, "optimum_stderr": 0 * one, "unexplained_stderr": few}
    facts = {"name": "m", "log_snr": level, "dim": 4, "sigma_data": 0.5, "same_data": True}
    return ModelGap(**{**facts, **values, **errors, **other})


def test_units_shares_and_the_middle():
    gap = known()
    assert [row["loss"] for row in gap.rows("sample")] == [3, 3, 3]
    assert gap.rows("epsilon")[2]["loss"] == pytest.approx(3 * math.exp(2))
    assert gap.rows("edm")[1]["gap"] == pytest.approx(2 * 5)
    weights = torch.tensor([math.exp(-2), 2, math.exp(2)])
    torch.testing.assert_close(gap.share(), (weights / weights.sum()).double())
    assert gap.middle() == (0.0, 2.0)
    whole = 4 / 2 * float(weights.sum())
    assert gap.nats() == pytest.approx((2 * whole, 1e-3 * whole))
    opposite = known(distances=2 + torch.tensor([[-1.0, 1.0], [0.0, 0.0], [1.0, -1.0]]).double() * 1e-3)
    assert opposite.nats()[1] == pytest.approx(1e-3 * 4 / 2 * (math.exp(2) - math.exp(-2)))  # draws are paired


def test_the_tolerance_is_of_all_levels_together():
    z = 3.5879  # of 1 - 0.001 / (2 x 3)
    for deviation, flagged in ((0.99 * z, False), (1.01 * z, True)):
        off = torch.tensor([0.0, 1.0, 0.0]).double() * deviation * 1e-3
        assert known(loss=torch.ones(3).double() - off).below.tolist() == [False, flagged, False]
        assert known(unexplained=-off).mismatched.tolist() == [False, flagged, False]


def test_the_table_and_the_json_say_the_same():
    gap = known(loss=torch.tensor([3.0, 0.5, 3.0]).double())
    table, facts = gap.table("sample"), json.loads(gap.to_json("sample"))
    assert "| 0.00 | 1 | 0.5 ± 0.001 (below) | 1 ± 0 | 2 ± 0.001 |" in table
    assert facts["levels"][1]["below"] is True
    assert f"In all {facts['gap_nats']:.3g}" in table
    assert facts["warnings"][0] in gap.warnings()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 31}, "`draws` must be at least 32, got 31"),
        ({"log_snr": torch.tensor([-9.0, 0.0])}, "`log_snr` must lie within -4.00 to 4.00, where the curve is"),
        ({"log_snr": torch.tensor([1.0, 1.0])}, "`log_snr` must be at least two different, finite noise levels"),
        ({"log_snr": torch.tensor([1.0, math.nan])}, "`log_snr` must be at least two different, finite noise levels"),
        ({"denoise": lambda x, log_snr, index: x[:, :, :1]}, r"must return the shape of x, \(256, 1, 2, 2\), got"),
        ({"denoise": lambda x, log_snr, index: x / 0}, "not finite at log-SNR -4.00"),
    ],
)
def test_what_cannot_be_diagnosed_is_named(options, message):
    arguments = {"denoise": of_corners, "data": CORNERS, "log_snr": LEVELS, "curve": CORNERS_CURVE, **options}
    with pytest.raises(ValueError, match=message):
        diagnose(**arguments)


def test_a_bound_may_be_above_the_loss():
    bound = OptimalLossCurve(
        CORNERS_CURVE.sigmas,
        3 * CORNERS_CURVE.value,
        torch.zeros(5).double(),
        ("bound",) * 5,
        CORNERS_CURVE.confused,
        CORNERS_CURVE.made,
    )
    assert not diagnose(of_corners, CORNERS, LEVELS, bound).below.any()
