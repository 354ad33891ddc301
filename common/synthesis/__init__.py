"""Stage one: images out of a detector."""

from common.synthesis.imageset import ImageSet
from common.synthesis.synthesize import synthesize

__all__ = ["ImageSet", "synthesize"]
