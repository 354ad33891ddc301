"""torchvision's two-stage detectors, recognised by the names and shapes in a checkpoint and built without weights."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.models.resnet import BasicBlock
from torchvision.ops import MultiScaleRoIAlign

from common.checkpoints.rcnn_architecture import MICRO, MODELS

FROZEN_EPSILON = 1e-12  # torchvision's frozen BatchNorms have 0, which torch's batch_norm does not accept
VOC = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


class FixedSize(GeneralizedRCNNTransform):
    """torchvision's normalisation, without its resizing: here a batch has the size it is to be detected at.

    Masks stay as grids over their boxes, to be pasted where the boxes are in the end.
    """

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:  # fmt: skip
        """Returns both as they are."""
        return image, target

    def postprocess(self, result: list[dict[str, Tensor]], *sizes: object) -> list[dict[str, Tensor]]:
        """Returns the detections as they are."""
        return result


def build_module(architecture: Mapping[str, Any]) -> nn.Module:
    """The module in eval mode with random weights; `architecture` fulfils `TorchvisionArchitecture`."""
    name, outputs = architecture["model"], architecture["outputs"]
    if name == MICRO:
        module = _micro(outputs)
    else:
        module = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=outputs)
    old = module.transform
    module.transform = FixedSize(0, 0, old.image_mean, old.image_std)
    if architecture["frozen_batch_norm"]:
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eps = FROZEN_EPSILON
    return module.float().eval()


def recognise(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Which of MODELS a state_dict belongs to, its number of outputs (background included) and its kind of BatchNorm.

    A BatchNorm without `num_batches_tracked` was frozen. The official files with frozen ones, and what was trained from
    them, use an epsilon of 0 (torchvision, `overwrite_eps`). Returns None for anything else.
    """
    score = state.get("roi_heads.box_predictor.cls_score.weight")
    if score is None:
        return None
    kind = "maskrcnn" if "roi_heads.mask_predictor.mask_fcn_logits.weight" in state else "fasterrcnn"
    if "backbone.body.0.0.weight" in state:
        name = f"{kind}_mobilenet_v3_large_320_fpn"
    else:
        name = f"{kind}_resnet50_fpn" + ("_v2" if "backbone.fpn.inner_blocks.0.1.weight" in state else "")
    if name not in MODELS:
        return None
    frozen = not any(key.endswith("num_batches_tracked") for key in state)
    return {"model": name, "outputs": len(score), "frozen_batch_norm": frozen}


def class_indices(outputs: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names of the classes of a head, and the output of each: COCO's 80 classes for 91 outputs, whose ids have holes,
    Pascal VOC's for 21, and otherwise numbered ones. Output 0 is the background."""
    if outputs == 91:
        names = detection.MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
        kept = [i for i, name in enumerate(names) if i and name != "N/A"]
        return tuple(names[i] for i in kept), tuple(kept)
    names = VOC if outputs == 21 else [f"class {i}" for i in range(1, outputs)]
    return tuple(names), tuple(range(1, outputs))


def _micro(outputs: int, channels: Sequence[int] = (16, 32, 64, 128), width: int = 48) -> MaskRCNN:
    """A Mask R-CNN of 1.2 million parameters from the same parts, for drawn shapes and for tests."""
    parts: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(3, channels[0], 3, stride=2, padding=1, bias=False)),
        ("bn1", nn.BatchNorm2d(channels[0])),
        ("relu", nn.ReLU(inplace=True)),
    ]
    incoming = channels[0]
    for i, outgoing in enumerate(channels, 1):
        skip = nn.Sequential(nn.Conv2d(incoming, outgoing, 1, stride=2, bias=False), nn.BatchNorm2d(outgoing))
        blocks = [BasicBlock(incoming, outgoing, 2, skip), *[BasicBlock(outgoing, outgoing)] * (i > 2)]
        parts.append((f"layer{i}", nn.Sequential(*blocks)))
        incoming = outgoing
    body = nn.Sequential(OrderedDict(parts))
    levels = {f"layer{i}": str(i - 1) for i in range(1, 5)}
    backbone = BackboneWithFPN(body, levels, list(channels), width)
    anchors = AnchorGenerator(((12,), (24,), (48,), (96,), (160,)), ((0.5, 1.0, 2.0),) * 5)
    return MaskRCNN(
        backbone,
        None,
        rpn_anchor_generator=anchors,
        rpn_pre_nms_top_n_train=400,
        rpn_pre_nms_top_n_test=400,
        rpn_post_nms_top_n_train=200,
        rpn_post_nms_top_n_test=300,
        box_batch_size_per_image=64,
        box_roi_pool=MultiScaleRoIAlign(list("0123"), 7, 1),
        box_head=TwoMLPHead(width * 7 * 7, 128),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(128, outputs),
        mask_roi_pool=MultiScaleRoIAlign(list("0123"), 14, 1),
        mask_head=MaskRCNNHeads(width, (width, width), 1),
        mask_predictor=MaskRCNNPredictor(width, width, outputs),
    )
