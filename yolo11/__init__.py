"""YOLO11 by Ultralytics, wrapped as a detector of zsqdet."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a foreign `common` is named by zsqdet.py, which comes later
    from common.checkpoints.read import WeightsFile

# Here, before any file of the folder imports Ultralytics, which reads both once:
os.environ.setdefault("YOLO_AUTOINSTALL", "false")  # it must not install packages by itself
os.environ["ULTRALYTICS_SAFE_LOAD"] = "1"  # nor evaluate texts, a second wall behind the schema of architectures

EXTRA = "yolo"  # of pyproject.toml: the packages that this family needs
SUPPORTED = "an Ultralytics detection or segmentation model, YOLOv3u to YOLO26 (.pt as training wrote it)"
TASKS = "ultralytics.nn.tasks."
WANTED = {f"{TASKS}DetectionModel", f"{TASKS}SegmentationModel"}
OTHERS = {  # what other models of Ultralytics find, which has no place here
    "PoseModel": "keypoints", "OBBModel": "oriented boxes", "ClassificationModel": "classes of whole images",
    "SemanticSegmentationModel": "classes of pixels", "DepthModel": "depth", "WorldModel": "classes given as texts",
    "YOLOEModel": "classes given as texts", "YOLOESegModel": "classes given as texts",
    "RTDETRDetectionModel": "boxes by a transformer decoder without BatchNorm",
}  # fmt: skip


def recognise(file: "WeightsFile") -> dict[str, Any] | None:
    """The settings that go with a file of this family; None for any other file.

    Raises:
        UserError: a model of Ultralytics that finds something else.
    """
    found = file.network.model_class if file.network else ""
    if found.startswith(TASKS) and (finds := OTHERS.get(found.removeprefix(TASKS))):
        from common.runtime.errors import UserError

        raise UserError(
            f"{file.path}: found a {found}, which finds {finds}; boxes and masks can be quantized: train or give a "
            "detection or segmentation model, such as yolo11n.pt or yolo11n-seg.pt"
        )
    if file.family != "yolo11" and not file.is_network(WANTED):
        return None
    size = file.image_size or 640
    return {"synthesis": {"image_size": size}, "evaluation": {"image_size": size}}
