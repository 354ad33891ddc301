"""YOLO11 by Ultralytics, wrapped as a detector of zsqdet."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a foreign `common` is named by zsqdet.py, which comes later
    from common.checkpoints.read import WeightsFile

EXTRA = "yolo"  # of pyproject.toml: the packages that this family needs
SUPPORTED = "an Ultralytics detection model, YOLOv3u to YOLO26 (.pt as training wrote it)"
WANTED = "ultralytics.nn.tasks.DetectionModel"


def recognise(file: "WeightsFile") -> dict[str, Any] | None:
    """The settings that go with a file of this family; None for any other file."""
    if file.family != "yolo11" and not file.is_network({WANTED}):
        return None
    size = file.image_size or 640
    return {"synthesis": {"image_size": size}, "evaluation": {"image_size": size}}
