"""mmcv's compiled operators on torchvision's kernels, where mmcv was installed without them (`mmcv-lite`).

There is no binary of mmcv for current versions of torch, and Mask R-CNN needs three of its operators only. Import this
file before `mmcv.ops` or `mmdet`. A real `mmcv._ext` wins.
"""

import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torchvision
from torch import Tensor

NAME = "mmcv._ext"
AVERAGE = 1  # mmcv's number for the pooling of a region by its mean


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes [n, 4] xyxy that are kept, best score first; sides are `x2 - x1 + offset` long."""
    far = boxes.new_tensor([0, 0, offset, offset])
    return torchvision.ops.nms(boxes + far, scores, iou_threshold)


def roi_align_forward(
    input: Tensor, rois: Tensor, output: Tensor, argmax_y: Tensor, argmax_x: Tensor, *, aligned_height: int,
    aligned_width: int, spatial_scale: float, sampling_ratio: int, pool_mode: int, aligned: bool,
) -> None:  # fmt: skip
    """Pools regions [R, 5] (image, xyxy) of maps [B, C, H, W] into `output` [R, C, height, width]."""
    _only_the_mean(pool_mode)
    size = aligned_height, aligned_width
    # Half precision is too coarse for the places of samples.
    x, regions = (t if t.dtype == torch.float64 else t.float() for t in (input, rois))
    pooled = torch.ops.torchvision.roi_align(x, regions.to(x), spatial_scale, *size, sampling_ratio, aligned)
    output.copy_(pooled)


def roi_align_backward(
    grad_output: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_input: Tensor, *, aligned_height: int,
    aligned_width: int, spatial_scale: float, sampling_ratio: int, pool_mode: int, aligned: bool,
) -> None:  # fmt: skip
    """The gradient of `roi_align_forward` for the maps, into `grad_input` [B, C, H, W]."""
    _only_the_mean(pool_mode)
    size = aligned_height, aligned_width
    gradient, regions = (t if t.dtype == torch.float64 else t.float() for t in (grad_output, rois))
    found = torch.ops.torchvision._roi_align_backward(
        gradient, regions.to(gradient), spatial_scale, *size, *grad_input.shape, sampling_ratio, aligned
    )
    grad_input.copy_(found)


def install() -> ModuleType:
    """The module that mmcv's operators come from: its own, or this stand-in under the same name."""
    if NAME in sys.modules:
        return sys.modules[NAME]
    if find_spec(NAME) is not None:
        return __import__(NAME, fromlist=["nms"])
    module = ModuleType(NAME, "Stand-in of zsqdet, on torchvision's kernels.")
    for function in (nms, roi_align_forward, roi_align_backward):
        setattr(module, function.__name__, function)
    module.__getattr__ = _missing  # type: ignore[method-assign]
    sys.modules[NAME] = module
    return module


def _missing(name: str) -> Any:
    """What stands for an operator that is not here; mmcv looks all of them up when it is imported."""
    if name.startswith("__"):
        raise AttributeError(name)

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise NotImplementedError(
            f"mmcv's operator {name} needs mmcv with its compiled operators; the installed mmcv-lite has none, and "
            "zsqdet stands in for nms and roi_align only"
        )

    return refuse


def _only_the_mean(pool_mode: int) -> None:
    if pool_mode != AVERAGE:
        raise NotImplementedError("roi_align with pool_mode='max' needs mmcv with its compiled operators")


install()
