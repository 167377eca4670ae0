"""Loss weights over the noise level for diffusion training.

>>> import torch
>>> import snrweights
>>> snrweights.loss_weight(torch.tensor([10, 500]), "linear", "min_snr", prediction_type="epsilon", gamma=5)
tensor([0.0110, 1.0000])
"""

from typing import TYPE_CHECKING, Any

from snrweights import masked, optimal, weightings  # weightings registers them
from snrweights.doctor import Diagnosis, doctor
from snrweights.findings import Finding
from snrweights.importance import ImportanceSampler
from snrweights.losses import loss_weight, per_sample_mse, weighted_loss
from snrweights.measure import data_variance
from snrweights.objective import Objective, objective
from snrweights.samplers import Draw, TimestepSampler
from snrweights.schedulers import as_schedule
from snrweights.schedules import CosineSchedule, DiscreteSchedule, EDMSchedule, FlowSchedule
from snrweights.tracking import LossVarianceTracker
from snrweights.uncertainty import LearnedUncertainty
from snrweights.version import __version__
from snrweights.weightings.base import (
    Weighting,
    get_weighting,
    hyper,
    list_weightings,
    register_weighting,
)
from snrweights.weightings.bound import BoundWeighting
from snrweights.weightings.clipped import Match, match

if TYPE_CHECKING:
    from snrweights.integrations.diffusers import attach

__all__ = [
    "BoundWeighting",
    "CosineSchedule",
    "Diagnosis",
    "DiscreteSchedule",
    "Draw",
    "EDMSchedule",
    "Finding",
    "FlowSchedule",
    "ImportanceSampler",
    "LearnedUncertainty",
    "LossVarianceTracker",
    "Match",
    "Objective",
    "TimestepSampler",
    "Weighting",
    "__version__",
    "as_schedule",
    "attach",
    "data_variance",
    "doctor",
    "get_weighting",
    "hyper",
    "list_weightings",
    "loss_weight",
    "masked",
    "match",
    "objective",
    "optimal",
    "per_sample_mse",
    "register_weighting",
    "weighted_loss",
    "weightings",
]


def __getattr__(name: str) -> Any:
    if name == "attach":
        from snrweights.integrations.diffusers import attach

        return attach
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
