"""Mask R-CNN with a Swin Transformer from mmdet's own configurations, recognised by the shapes in a checkpoint."""

import inspect
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from vit import ops  # noqa: F401  (before mmdet: mmcv's operators)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what mmdet 3.3 imports is deprecated in several places
    import mmcv.ops
    import mmdet
    import mmdet.models
    from mmdet.models.backbones.swin import WindowMSA
    from mmdet.registry import MODELS, TASK_UTILS
    from mmengine.config import Config
    from mmengine.registry import DefaultScope

from common.checkpoints.rcnn_architecture import CONFIGURATIONS
from common.checkpoints.read import plain_text
from common.checkpoints.state_dict import building
from common.checkpoints.strict_json import NOTHING, assigned, differences
from common.detection.attention import AttentionMatmuls
from common.runtime.errors import UserError

CONFIGS = Path(mmdet.__file__).parent / ".mim/configs"
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

# Of a configuration beside the weights: what does not change what the network computes, or is a setting of evaluation.
WITHOUT_EFFECT = re.compile(
    r"\.(init_cfg|loss_\w+|\w*drop_(rate|path_rate)|with_cp|convert_weights|frozen_stages|pad_mask|batch_augments|_scope_)\b"
    r"|^(train_cfg|pretrained)\b|^test_cfg\.rcnn\.(score_thr|nms|max_per_img)\b|^data_preprocessor\.type$"
)
PIXELS = {"mean": "mean", "std": "std", "to_rgb": "bgr_to_rgb"}  # of mmdet 2's img_norm_cfg, and what they are now


class Attention(WindowMSA):
    """mmdet's attention within windows, with places to round the inputs of its two matrix products."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens [windows, tokens, C] to the same shape; `mask` [windows of an image, tokens, tokens] is added."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)[None]
        bias = bias if mask is None else bias + mask[:, None]
        return self.proj(self.matmuls(q * self.scale, k, v, bias).transpose(1, 2).flatten(2))


def build_module(architecture: Mapping[str, Any]) -> nn.Module:
    """The module in eval mode with random weights.

    Args:
        architecture: fulfils `Architecture`: one of mmdet's configurations, and values of its `model` by dotted name.
            Stochastic depth and dropout in attention are left out whatever they say.

    Raises:
        UserError: mmdet cannot build it.
    """
    config = _config(architecture)
    with building("weights: the architecture of this vit"), DefaultScope.overwrite_default_scope("mmdet"):
        module = MODELS.build(config.model)
    for part in module.modules():
        if isinstance(part, WindowMSA):
            part.__class__, part.matmuls = Attention, AttentionMatmuls()
    return module.float().eval()


def _config(architecture: Mapping[str, Any]) -> Config:
    config = Config.fromfile(CONFIGS / architecture["config"])
    overrides = {f"model.{name}": value for name, value in architecture["overrides"].items()}
    config.merge_from_dict(overrides | {"model.backbone.drop_path_rate": 0.0, "model.backbone.init_cfg": None})
    return config


def check_published(meta: Mapping[str, Any], architecture: Mapping[str, Any], where: str) -> None:
    """Compares the configuration that mmengine or mmdet 2 left beside the weights, a text, with what is built of them.

    Nothing of it is executed: constants, lists and dictionaries are read from its syntax tree, the rest is left out.

    Raises:
        UserError: a setting that is built otherwise.
    """
    texts = [meta[key] for key in ("cfg", "config") if meta.get(key) is not None and meta[key] != ""]
    if not texts:
        return
    try:
        said = assigned(texts[0] if isinstance(texts[0], str) else "")
    except ValueError as error:
        raise UserError(f"{where}: the configuration in its `meta` cannot be read ({error}); leave it out") from error
    built = _config(architecture).model.to_dict()
    rows = list(differences(said.get("model", {}), built, _default))
    pixels = said.get("img_norm_cfg")
    if isinstance(pixels, dict):
        own = {name: built["data_preprocessor"][other] for name, other in PIXELS.items()}
        rows += differences({k: pixels[k] for k in own if k in pixels}, own, _default, "img_norm_cfg")
    for name, value, wanted in [row for row in rows if not WITHOUT_EFFECT.search(row[0])]:
        raise UserError(
            f"{where}: its configuration has {plain_text(name)} {plain_text(str(value))}, where {wanted} is built; "
            "a network of other settings than mmdet's Swin configurations cannot be rebuilt"
        )


def _default(kind: object, setting: str) -> Any:
    """The default of a setting of one of mmdet's classes; NOTHING where it has none."""
    if not isinstance(kind, str):
        return NOTHING
    with DefaultScope.overwrite_default_scope("mmdet"):
        found = MODELS.get(kind) or TASK_UTILS.get(kind) or getattr(mmcv.ops, kind, None)
    for part in getattr(found, "__mro__", ()):
        parameter = inspect.signature(part.__init__).parameters.get(setting)
        if parameter is not None and parameter.default is not parameter.empty:
            return parameter.default
    return NOTHING


def normalised(model: Any, images: Tensor) -> Tensor:
    """Images as mmdet's preprocessor hands them over: RGB, less ImageNet's mean, over its deviation, and padded."""
    mean, deviation = (getattr(model.data_preprocessor, n).to(images).view(-1, 1, 1) for n in ("mean", "std"))
    (height, width), multiple = images.shape[-2:], model.data_preprocessor.pad_size_divisor
    return F.pad((images * 255 - mean) / deviation, (0, -width % multiple, 0, -height % multiple))


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
    name = CONFIGURATIONS["s" if depths[2] == SMALL_DEPTH else "t"]
    return {"config": name, "overrides": overrides | class_counts(len(score) - 1)}


def class_counts(count: int) -> dict[str, int]:
    """Overrides of an architecture for so many classes."""
    return {"roi_head.bbox_head.num_classes": count, "roi_head.mask_head.num_classes": count}
