"""Figures: what they draw, not how they look."""

import pytest
import torch

from snrweights import LossVarianceTracker, get_weighting, objective
from snrweights.plots import plot_loss_by_noise, plot_variance, plot_weights, save

EPSILON = {"prediction_type": "epsilon"}


def lines(ax):
    """Label -> (x, y) of the curves of an axis."""
    return {line.get_label(): torch.as_tensor(line.get_xydata().T.copy()) for line in ax.get_lines()}


def test_weights_are_drawn_at_mean_one_and_objectives_at_maximum_one():
    methods = {"clipped": get_weighting("min_snr", gamma=3.0), "smoothed_kl": get_weighting("smoothed_kl")}
    left, right = plot_weights("cosine", methods, **EPSILON).axes
    for label, weighting in methods.items():
        result = objective("cosine", weighting, **EPSILON)
        x, y = lines(right)[label]
        torch.testing.assert_close(torch.stack((x, y)), torch.stack((result.log_snr, result.w_kg)))
        x, drawn = lines(left)[label]
        weight = weighting.over_log_snr("cosine", **EPSILON)(x)
        torch.testing.assert_close(drawn / drawn[0], weight / weight[0])
        p = weighting.over_log_snr("cosine", **EPSILON).density.log_prob(x).exp()
        assert torch.trapezoid(p * drawn, x).item() == pytest.approx(1, abs=0.005)  # log-SNR is cut at the ends


def test_many_curves_can_be_told_apart():
    methods = ["ddpm", "min_snr", "soft_min_snr", "smoothed_kl", "p2", "debiased", "edm", "elbo"]
    left, _ = plot_weights("linear", methods, **EPSILON).axes
    assert len({(line.get_color(), line.get_linestyle()) for line in left.get_lines()}) == len(methods)
    assert [text.get_text() for text in left.get_legend().get_texts()] == methods


def test_the_loss_by_noise_is_that_of_the_tracker():
    tracker = LossVarianceTracker(bins=4, low=-4, high=4)
    tracker.update(torch.tensor([1.0, 3.0]).repeat(50), torch.full((100,), -3.0))
    tracker.update(torch.tensor([5.0]), torch.tensor([1.0]))
    left, right = plot_loss_by_noise(tracker.compute()).axes
    mean, deviation = lines(left).values()
    assert mean.tolist() == [[-3, 1], [2, 5]]
    assert deviation[1, 0] == 1
    assert deviation[1, 1].isnan()  # one sample has no deviation
    assert [bar.get_height() for bar in right.patches] == [100, 1]


def test_the_suffix_says_the_format(tmp_path):
    figure = plot_weights("linear", ["ddpm"], **EPSILON)
    save(figure, tmp_path / "weights.svg")
    assert "<svg" in (tmp_path / "weights.svg").read_text()
    with pytest.raises(ValueError, match=r"`path` '.*weights' must end in one of \[.*'png'"):
        save(figure, tmp_path / "weights")


def test_no_method_is_an_error():
    with pytest.raises(ValueError, match="`methods` is empty; give at least one"):
        plot_weights("linear", [], **EPSILON)


def test_the_variance_is_that_of_the_loss_and_of_the_weighted_loss():
    tracker = LossVarianceTracker(bins=4, low=-4, high=4, unit="epsilon")
    for centre, size in ((-1.0, 2.0), (3.0, 0.5)):
        tracker.update(size * torch.tensor([1.0, 3.0]).repeat(20), torch.full((40,), centre))
    tracker.update(torch.ones(3), torch.full((3,), 1.0))  # too few to have a variance
    curve = get_weighting("alsr").over_log_snr("edm", prediction_type="edm")
    left, right = plot_variance({"alsr": (tracker.compute(), curve)}).axes
    at = torch.tensor([-1.0, 3.0], dtype=torch.float64)
    variance = torch.tensor([4.0, 0.25]) * (at.exp() / (at.exp() + 4)) ** -2  # of F: R_F / R_eps = (SNR + 4) / SNR
    weight = 1 / (1 + 0.05 * (at - 2.4) ** 2)
    for ax, expected in ((left, variance), (right, variance * (weight / weight.mean()) ** 2)):
        x, y = lines(ax)["alsr"]
        assert x.tolist() == [-1, 3]
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match="`runs` is empty; give at least one"):
        plot_variance({})
