"""torchvision's one-stage detectors, recognised by the names and shapes in a checkpoint and built without weights."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.rpn import AnchorGenerator

from common.checkpoints.rcnn_architecture import MICRO_RETINANET
from common.detection.torchvision_parts import OLD_NAMES, fix_size, micro_backbone, renamed
from common.runtime.errors import UserError
from onestage import CENTRES, SSD, SSD300

SCORES = "head.classification_head.cls_logits.weight"
SSD_ANCHORS, RETINA_ANCHORS = 6, 9  # at a place
OLD_CONVOLUTIONS = {  # of a RetinaNet before torchvision 0.14
    rf"(head\.(?:classification|regression)_head\.conv)\.{2 * i}\.(weight|bias)": rf"\1.{i}.0.\2" for i in range(4)
}


def build_module(architecture: Mapping[str, Any]) -> nn.Module:
    """The module in eval mode with random weights; `architecture` fulfils `OneStageArchitecture`."""
    name, outputs = architecture["model"], architecture["outputs"]
    if name == MICRO_RETINANET:
        sizes = tuple((side, side * 2 ** (1 / 3), side * 2 ** (2 / 3)) for side in (12, 24, 48, 96, 160))
        anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
        return fix_size(RetinaNet(micro_backbone(), outputs, anchor_generator=anchors), architecture)
    module = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=outputs)
    return fix_size(module, architecture)


def recognise(state: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state under the names of today, and the architecture: which model, how many outputs, kind of BatchNorm.

    Raises:
        UserError: none of them.
    """
    if SSD300 in state:
        raise UserError(
            f"{where}: an SSD300 of torchvision, which has no BatchNorm, and images are made from the statistics of "
            "BatchNorm; give an SSDlite, a RetinaNet or an FCOS"
        )
    state = renamed(state, OLD_NAMES, where)
    frozen = not any(key.endswith("num_batches_tracked") for key in state)
    if SSD in state:
        name, outputs = "ssdlite320_mobilenet_v3_large", len(state[SSD]) // SSD_ANCHORS
    elif CENTRES in state and SCORES in state:
        name, outputs = "fcos_resnet50_fpn", len(state[SCORES])
    elif SCORES in state:
        newer = "head.classification_head.conv.0.1.weight" in state
        name, outputs = "retinanet_resnet50_fpn" + "_v2" * newer, len(state[SCORES]) // RETINA_ANCHORS
        state = renamed(state, OLD_CONVOLUTIONS, where)
    else:
        raise UserError(f"{where}: no RetinaNet, FCOS or SSDlite of torchvision; onestage needs a state_dict of one")
    return dict(state), {"model": name, "outputs": outputs, "frozen_batch_norm": frozen}
