"""Kernel distance (unbiased MMD²) of two sets of images in named features; KID is that in Inception's alone."""

import datasets  # noqa: F401  (evaluate looks for this line)
from snrweights.integrations.distances import kernel_distance
from snrweights.integrations.features import DISTANCE_NAMES
from snrweights.integrations.metrics.base import ImageDistance
from torch import Tensor


class KernelDistance(ImageDistance):
    """Mean over random subsets, with its standard error; can be negative near zero."""

    description = __doc__
    citation = "Binkowski et al. 2018, Demystifying MMD GANs, arXiv 1801.01401"

    def _compute(self, predictions: Tensor, references: Tensor, **options: int) -> dict[str, float]:
        name = DISTANCE_NAMES[self.config_name][1]
        value, error = kernel_distance(predictions, references, **options)
        return {name: value, f"{name}_standard_error": error}
