"""The optimal loss of a data set: what no denoiser can beat on its training set, at every noise level.

``optimal_loss`` gives the curve J(sigma) = E tr Cov(x0 | x0 + sigma eps) of the empirical distribution.

Source: Xu et al. 2025, arXiv 2506.13763.
"""

from snrweights.optimal.curve import OptimalLossCurve
from snrweights.optimal.estimator import optimal_loss
from snrweights.optimal.gap import GapByBin, floor_by_bin, gap_by_bin

__all__ = ["GapByBin", "OptimalLossCurve", "floor_by_bin", "gap_by_bin", "optimal_loss"]
