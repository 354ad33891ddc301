"""Images as an experiment's evaluation shows them to a detector: letterboxed, or resized by the shorter side."""

from collections.abc import Sequence

from torch import Tensor

from common.config import EvaluationConfig
from common.evaluation.letterbox import Batch, Placement, make_batches, place
from common.evaluation.resize import equal_batches, scale_to


def plan_batches(sizes: Sequence[tuple[int, int]], config: EvaluationConfig, stride: int) -> list[Batch]:
    """Which images of the given (height, width) are detected on together, and at which size."""
    if config.resize == "shorter_side":
        return equal_batches(sizes, config.image_size, config.longest_side, config.batch_size)
    return make_batches(sizes, config.image_size, stride, config.batch_size, config.rectangular)


def view(image: Tensor, config: EvaluationConfig, batch: Batch) -> tuple[Tensor, Placement]:
    """A uint8 image [3, h, w] as float [3, H, W] in [0, 1] of its batch, and where it is in it."""
    if config.resize == "shorter_side":
        return scale_to(image, batch.height, batch.width)
    return place(image, config.image_size, batch.height, batch.width, config.shrink)
