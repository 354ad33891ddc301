"""The architecture of a two-stage detector of torchvision: one of these names, and what may be said beside it."""

from typing import Annotated, Literal

from pydantic import Field

from common.checkpoints.description import Strict

MODELS = (
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
)
MICRO = "maskrcnn_micro"


class TorchvisionArchitecture(Strict):
    """What `ResNetDetector.architecture` may say."""

    model: Literal[(*MODELS, MICRO)]  # type: ignore[valid-type]
    outputs: Annotated[int, Field(ge=2, le=10_000)]  # classes, and the background
    frozen_batch_norm: bool
    names: Annotated[list[str], Field(max_length=10_000)] | None = None
