"""Stage one: synthesizes calibration and training images from the detector alone."""

from common.synthesis.imageset import ImageSet
from common.synthesis.stage import synthesize

__all__ = ["ImageSet", "synthesize"]
