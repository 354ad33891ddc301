"""Mask R-CNN with a Swin Transformer, of mmdet."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a foreign `common` is named by zsqdet.py, which comes later
    from common.checkpoints.read import WeightsFile

EXTRA = "vit"  # of pyproject.toml: the packages that this family needs
SUPPORTED = "an mmdet checkpoint of Mask R-CNN with a Swin (names like backbone.stages..., roi_head.bbox_head...)"


def recognise(file: "WeightsFile") -> dict[str, Any] | None:
    """The settings that go with a file of this family, as configs/vit has them; None for any other file."""
    wanted = {"backbone.patch_embed.projection.weight", "roi_head.bbox_head.fc_cls.weight"}
    if file.family != "vit" and not wanted <= file.state.keys():
        return None
    resizing = {"resize": "shorter_side", "image_size": 800, "longest_side": 1333}
    return {
        "synthesis": {"image_size": 640, "batch_size": 8},
        "quantization": {"letterbox_padding": False, "calibration_batch_size": 8},
        "training": {"batch_size": 8},
        "evaluation": resizing | {"confidence": 0.05, "iou": 0.5, "max_detections": 100, "batch_size": 4},
    }
