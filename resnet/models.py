"""torchvision's two-stage detectors, recognised by the names and shapes in a checkpoint and built without weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator, RPNHead
from torchvision.ops import MultiScaleRoIAlign

from common.checkpoints.rcnn_architecture import GENERIC, MICRO, MOBILE, MODELS
from common.detection.torchvision_parts import fix_size, micro_backbone, official_model
from common.runtime.errors import SettingNeededError, UserError
from resnet.backbones import LEVELS, TimmBackbone, as_built, timm_body

ANCHORS, RATIOS = ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,)), (0.5, 1.0, 2.0)  # torchvision's defaults


def build_module(architecture: Mapping[str, Any]) -> nn.Module:
    """The module in eval mode with random weights; `architecture` fulfils `TorchvisionArchitecture`."""
    name, outputs = architecture["model"], architecture["outputs"]
    if name == MICRO:
        module = _micro(outputs)
    elif name in GENERIC:
        backbone = TimmBackbone(architecture["backbone"], architecture["levels"], architecture["channels"])
        kind = MaskRCNN if name == "maskrcnn" else detection.FasterRCNN
        anchors = _anchors(architecture["anchor_sizes"], architecture.get("aspect_ratios"))
        module = kind(backbone, outputs, rpn_anchor_generator=anchors)
    else:
        module = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=outputs)
        if "anchor_sizes" in architecture or "aspect_ratios" in architecture:
            _give_anchors(module, architecture)
    return fix_size(module, architecture)


def recognise(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Which of MODELS a state_dict belongs to, its number of outputs (background included) and its kind of BatchNorm.

    A BatchNorm without `num_batches_tracked` was frozen. Returns None for anything else.
    """
    score = state.get("roi_heads.box_predictor.cls_score.weight")
    if score is None:
        return None
    kind = "maskrcnn" if "roi_heads.mask_predictor.mask_fcn_logits.weight" in state else "fasterrcnn"
    if "backbone.body.0.0.weight" in state:
        name = f"{kind}_mobilenet_v3_large_320_fpn"  # or the model of 800 pixels, which `which_mobile` tells
    else:
        name = f"{kind}_resnet50_fpn" + ("_v2" if "backbone.fpn.inner_blocks.0.1.weight" in state else "")
    if name not in MODELS:
        return None
    frozen = not any(key.endswith("num_batches_tracked") for key in state)
    return {"model": name, "outputs": len(score), "frozen_batch_norm": frozen}


def which_mobile(weights: Path, given: str | None, trained_as: object) -> str:
    """Which of MOBILE a file is, whose tensors are the same: as `detector.model` or its training say, else by its sum.

    Raises:
        UserError: said nowhere.
    """
    known = trained_as if isinstance(trained_as, str) else official_model(weights, MOBILE)
    if given and known in MOBILE and known != given:
        raise UserError(f"detector.model: found {given}, but {weights} is a {known}; leave it out")
    if found := given or known:
        return found if found in MOBILE else MOBILE[0]  # another one is refused by `with_epsilon`
    raise SettingNeededError(
        f"{weights}: the tensors of {' and of '.join(MOBILE)}; set detector.model to what it was trained as"
    )


def given_backbone(state: Mapping[str, Tensor], given: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State and architecture of torchvision's heads on a backbone that the configuration names.

    Raises:
        UserError: no such state_dict, no such backbone, or anchors that it needs and has not.
    """
    score = state.get("roi_heads.box_predictor.cls_score.weight")
    if score is None:
        raise UserError("detector.backbone: the file holds no Mask R-CNN or Faster R-CNN of torchvision; leave it out")
    name = str(given["backbone"]).partition(".")[0]  # a tag of timm names weights, and these are in the file
    info: Any = timm_body(name, list(given["levels"]) if "levels" in given else None)
    count = len(info.feature_info.info)
    levels = list(given.get("levels", range(max(count - LEVELS, 0), count)))
    if "anchor_sizes" not in given and len(levels) != LEVELS:
        raise UserError(
            f"detector.anchor_sizes: not set, and there is no usual one for {len(levels)} levels; give them"
        )
    state = as_built(state, name, levels)
    kind = "maskrcnn" if "roi_heads.mask_predictor.mask_fcn_logits.weight" in state else "fasterrcnn"
    pyramid = state.get("backbone.fpn.layer_blocks.0.0.weight", score)
    frozen = not any(key.endswith("num_batches_tracked") for key in state)
    found = {"model": kind, "outputs": len(score), "frozen_batch_norm": frozen, "backbone": name, "levels": levels}
    sizes = [list(row) for row in given.get("anchor_sizes", ANCHORS)]
    return state, found | {"channels": len(pyramid), "anchor_sizes": sizes}


def _anchors(sizes: Sequence[Sequence[float]], ratios: Sequence[float] | None) -> AnchorGenerator:
    return AnchorGenerator(tuple(map(tuple, sizes)), (tuple(ratios or RATIOS),) * len(sizes))


def _give_anchors(module: Any, architecture: Mapping[str, Any]) -> None:
    """Other anchors than the model's own, and a head of the RPN for as many of them."""
    rpn = module.rpn
    sizes = architecture.get("anchor_sizes", rpn.anchor_generator.sizes)
    if (count := len(rpn.anchor_generator.sizes)) != len(sizes):
        raise UserError(f"detector.anchor_sizes: found {len(sizes)} rows; this detector has {count} levels")
    rpn.anchor_generator = _anchors(sizes, architecture.get("aspect_ratios"))
    counts = rpn.anchor_generator.num_anchors_per_location()
    rpn.head = RPNHead(module.backbone.out_channels, counts[0], len(rpn.head.conv))


def _micro(outputs: int, width: int = 48) -> MaskRCNN:
    """A Mask R-CNN of 1.2 million parameters from the same parts, for drawn shapes and for tests."""
    backbone = micro_backbone(width)
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
