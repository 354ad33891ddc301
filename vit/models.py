"""Mask R-CNN with a Swin Transformer from mmdet's own configurations, recognised by the shapes in a checkpoint."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vit import ops  # noqa: F401  (before mmdet: mmcv's operators)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what mmdet 3.3 imports is deprecated in several places
    import mmdet
    import mmdet.models
    from mmdet.registry import MODELS
    from mmengine.config import Config
    from mmengine.registry import DefaultScope

from common.errors import UserError

CONFIGS = Path(mmdet.__file__).parent / ".mim/configs"
CONFIG = "swin/mask-rcnn_swin-{}-p4-w7_fpn_{}ms-crop-3x_coco.py"
SMALL_DEPTH = 18  # blocks of Swin-S's third stage; Swin-T has 6
WINDOWS = {(2 * side - 1) ** 2: side for side in range(2, 33)}  # by the rows of the table of relative positions

RELEASE = "https://download.openmmlab.com/mmdetection/v2.0/swin"
# OpenMMLab puts the first eight digits of a file's SHA-256 into its name.
OFFICIAL = {
    f"{name}.pth": name.rpartition("-")[2]
    for name in (
        "mask_rcnn_swin-t-p4-w7_fpn_1x_coco_20210902_120937-9d6b7cfa",
        "mask_rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco_20210906_131725-bacf6f7b",
        "mask_rcnn_swin-t-p4-w7_fpn_fp16_ms-crop-3x_coco_20210908_165006-90a4008c",
        "mask_rcnn_swin-s-p4-w7_fpn_fp16_ms-crop-3x_coco_20210903_104808-b92c91f1",
    )
}
# A detector of 1.3 million parameters for drawn shapes and for tests; objects from 12 pixels on need smaller anchors.
MICRO: Mapping[str, Any] = {
    "backbone.embed_dims": 24,
    "backbone.depths": [2, 2, 2, 2],
    "backbone.num_heads": [1, 2, 4, 8],
    "backbone.mlp_ratio": 2,
    "neck.in_channels": [24, 48, 96, 192],
    "neck.out_channels": 48,
    "rpn_head.in_channels": 48,
    "rpn_head.feat_channels": 48,
    "rpn_head.anchor_generator.scales": [4],
    "roi_head.bbox_roi_extractor.out_channels": 48,
    "roi_head.bbox_roi_extractor.finest_scale": 28,
    "roi_head.bbox_head.in_channels": 48,
    "roi_head.bbox_head.fc_out_channels": 96,
    "roi_head.mask_roi_extractor.out_channels": 48,
    "roi_head.mask_roi_extractor.finest_scale": 28,
    "roi_head.mask_head.in_channels": 48,
    "roi_head.mask_head.conv_out_channels": 32,
    "roi_head.mask_head.num_convs": 2,
    "test_cfg.rpn.nms_pre": 300,
    "test_cfg.rpn.max_per_img": 300,
}


def build_module(architecture: Mapping[str, Any]) -> nn.Module:
    """The module in eval mode with random weights.

    Args:
        architecture: `config`, the path of one of mmdet's configurations below `CONFIGS`; `overrides`, values of its
            `model` by dotted name. Stochastic depth is left out whatever they say.

    Raises:
        UserError: mmdet has no such configuration or cannot build it.
    """
    path = CONFIGS / architecture["config"]
    if not path.is_file():
        raise UserError(f"weights: this mmdet has no configuration {architecture['config']!r}")
    config = Config.fromfile(path)
    overrides = {f"model.{name}": value for name, value in architecture["overrides"].items()}
    config.merge_from_dict(overrides | {"model.backbone.drop_path_rate": 0.0, "model.backbone.init_cfg": None})
    try:
        with DefaultScope.overwrite_default_scope("mmdet"):
            module = MODELS.build(config.model)
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"weights: mmdet cannot build {architecture['config']} with these overrides ({reason})"
        ) from error
    return module.float().eval()


def micro(classes: int) -> dict[str, Any]:
    """The architecture of the micro Swin."""
    return {"config": CONFIG.format("t", ""), "overrides": dict(MICRO) | _classes(classes)}


def recognise(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The architecture of mmdet's Mask R-CNN with a Swin that a state_dict belongs to; None for anything else."""
    patches, score = state.get("backbone.patch_embed.projection.weight"), state.get("roi_head.bbox_head.fc_cls.weight")
    table = "backbone.stages.{}.blocks.0.attn.w_msa.relative_position_bias_table"
    if patches is None or score is None or "roi_head.mask_head.conv_logits.weight" not in state:
        return None
    if any(table.format(i) not in state for i in range(4)):
        return None
    found = [re.match(r"backbone\.stages\.(\d)\.blocks\.(\d+)\.", name) for name in state]
    blocks = {(int(m[1]), int(m[2])) for m in found if m}
    depths = [sum(stage == i for stage, _ in blocks) for i in range(4)]
    width = len(patches)
    overrides = {
        "backbone.embed_dims": width,
        "backbone.depths": depths,
        "backbone.num_heads": [state[table.format(i)].shape[1] for i in range(4)],
        "backbone.window_size": WINDOWS.get(len(state[table.format(0)]), 7),
        "neck.in_channels": [width * 2**i for i in range(4)],
    }
    name = CONFIG.format("s", "amp-") if depths[2] == SMALL_DEPTH else CONFIG.format("t", "")
    return {"config": name, "overrides": overrides | _classes(len(score) - 1)}


def _classes(count: int) -> dict[str, int]:
    return {"roi_head.bbox_head.num_classes": count, "roi_head.mask_head.num_classes": count}
