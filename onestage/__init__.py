"""RetinaNet, FCOS and SSDlite of torchvision: detectors of one stage."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a foreign `common` is named by zsqdet.py, which comes later
    from common.checkpoints.read import WeightsFile

EXTRA = "resnet"  # of pyproject.toml: the packages that this family needs
SUPPORTED = "a state_dict of torchvision's RetinaNet, FCOS or SSDlite (names like head.classification_head...)"
CENTRES, SSD = "head.regression_head.bbox_ctrness.weight", "head.classification_head.module_list.0.1.weight"

SSD300 = "backbone.scale_weight"  # loading it says why not


def recognise(file: "WeightsFile") -> dict[str, Any] | None:
    """The settings that go with a file of this family, torchvision's own; None for any other file."""
    small, names = SSD in file.state, {SSD, SSD300, "head.classification_head.cls_logits.weight"}
    if file.family != "onestage" and not names & file.state.keys():
        return None
    resizing = {"resize": "shorter_side", "image_size": 800, "longest_side": 1333, "batch_size": 4}
    thresholds = {"confidence": 0.05, "iou": 0.5, "max_detections": 300}
    if CENTRES in file.state:
        thresholds = {"confidence": 0.2, "iou": 0.6, "max_detections": 100}
    elif small:
        resizing = {"resize": "stretch", "image_size": 320, "batch_size": 16}
        thresholds = {"confidence": 0.001, "iou": 0.55, "max_detections": 300}
    batch = {"batch_size": 16 if small else 8}
    return {
        "synthesis": {"image_size": 320 if small else 640} | batch,
        "quantization": {"letterbox_padding": False, "calibration_batch_size": batch["batch_size"]},
        "training": batch,
        "evaluation": resizing | thresholds,
    }
