"""Mask R-CNN and Faster R-CNN of torchvision."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a foreign `common` is named by zsqdet.py, which comes later
    from common.checkpoints.read import WeightsFile

EXTRA = "resnet"  # of pyproject.toml: the packages that this family needs
SUPPORTED = "a state_dict of torchvision's Mask R-CNN or Faster R-CNN (names like roi_heads.box_predictor...)"


def recognise(file: "WeightsFile") -> dict[str, Any] | None:
    """The settings that go with a file of this family, as configs/resnet has them; None for any other file."""
    if file.family != "resnet" and "roi_heads.box_predictor.cls_score.weight" not in file.state:
        return None
    if any(name.startswith("roi_heads.keypoint_") for name in file.state):
        from common.runtime.errors import UserError

        raise UserError(
            f"{file.path}: found a Keypoint R-CNN of torchvision; boxes and masks can be quantized: give a "
            "Faster R-CNN or a Mask R-CNN"
        )
    mobile = "backbone.body.0.0.weight" in file.state
    low = mobile and _detects_at_320_pixels(file)
    batch = {"batch_size": 16 if mobile else 8}
    resizing = {"resize": "shorter_side", "image_size": 320 if low else 800, "longest_side": 640 if low else 1333}
    thresholds = {"confidence": 0.05, "iou": 0.5, "max_detections": 100, "batch_size": 4}
    return {
        "synthesis": {"image_size": 320 if low else 640} | batch,
        "quantization": {"letterbox_padding": False, "calibration_batch_size": batch["batch_size"]},
        "training": batch,
        "evaluation": resizing | thresholds,
    }


def _detects_at_320_pixels(file: "WeightsFile") -> bool:
    """Whether a MobileNetV3 is that of low resolution, as far as the file or its sum say; loading asks otherwise."""
    from common.checkpoints.rcnn_architecture import MOBILE
    from common.detection.torchvision_parts import official_model

    return (file.model or official_model(file.path, MOBILE)) != MOBILE[1]
