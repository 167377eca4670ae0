"""Fréchet distance of two sets of images in features named by the configuration; FID is that in Inception's alone."""

import datasets  # noqa: F401  (evaluate looks for this line)
from snrweights.integrations.distances import frechet_distance
from snrweights.integrations.features import DISTANCE_NAMES
from snrweights.integrations.metrics.base import ImageDistance
from torch import Tensor


class FrechetDistance(ImageDistance):
    """Biased by the number of images: compare at equal counts, beside the distance of real images to real ones."""

    description = __doc__
    citation = "Heusel et al. 2017, GANs Trained by a Two Time-Scale Update Rule, arXiv 1706.08500"

    def _compute(self, predictions: Tensor, references: Tensor, **options: int) -> dict[str, float]:
        return {DISTANCE_NAMES[self.config_name][0]: frechet_distance(predictions, references, **options)}
