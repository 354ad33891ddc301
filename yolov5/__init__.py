"""The original YOLOv5 (anchors, objectness) from its official checkpoints, wrapped as a detector of zsqdet."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a foreign `common` is named by zsqdet.py, which comes later
    from common.checkpoints.read import WeightsFile

# Here, before any file of the folder imports Ultralytics, which reads both once:
os.environ.setdefault("YOLO_AUTOINSTALL", "false")  # it must not install packages by itself
os.environ["ULTRALYTICS_SAFE_LOAD"] = "1"  # nor evaluate texts, a second wall behind the schema of architectures

EXTRA = "yolo"  # of pyproject.toml: the packages that this family needs
SUPPORTED = "YOLOv5 v6.0 to v7.0 (.pt as training wrote it)"
CLASSES = ("models.yolo.Model", "models.yolo.DetectionModel")  # v6.0 and v6.1; v6.2 and v7.0


def recognise(file: "WeightsFile") -> dict[str, Any] | None:
    """The settings that go with a file of this family, evaluated as val.py does; None for any other file."""
    if file.family != "yolov5" and not file.is_network(CLASSES):
        return None
    size = file.image_size or 640
    evaluation = {"image_size": size, "iou": 0.6, "interpolation": "area"}
    return {"synthesis": {"image_size": size}, "evaluation": evaluation}
