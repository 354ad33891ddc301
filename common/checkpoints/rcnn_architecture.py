"""The architectures of two-stage detectors: what may be said of torchvision's, by name, and of a Swin of mmdet's.

The latter is a change to one of mmdet's own configurations.

mmengine executes the file of a configuration, so there are two names and no paths; and overrides are numbers only, as a
text could name any registered class or a file to load.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from common.checkpoints.strict_json import Strict, distinct, short

CONFIGURATIONS = {  # below mmdet's folder of configurations
    "t": "swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py",
    "s": "swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py",
}
LARGEST = {  # value of each override that there may be; a Swin-L has 192 dimensions and 18 blocks
    **dict.fromkeys(("backbone.embed_dims", "roi_head.bbox_roi_extractor.finest_scale"), 192),
    **dict.fromkeys(("backbone.depths", "rpn_head.anchor_generator.scales"), 24),
    **dict.fromkeys(("backbone.num_heads", "backbone.window_size", "roi_head.mask_head.num_convs"), 48),
    **dict.fromkeys(("neck.in_channels", "roi_head.bbox_head.fc_out_channels"), 4096),
    **dict.fromkeys(("roi_head.bbox_head.num_classes", "roi_head.mask_head.num_classes"), 10_000),
    **dict.fromkeys((f"{part}_channels" for part in ("neck.out", "rpn_head.in", "rpn_head.feat")), 1024),
    **dict.fromkeys((f"roi_head.{part}_roi_extractor.out_channels" for part in ("bbox", "mask")), 1024),
    **dict.fromkeys(
        (f"roi_head.{part}_channels" for part in ("bbox_head.in", "mask_head.in", "mask_head.conv_out")), 1024
    ),
    **dict.fromkeys(("test_cfg.rpn.nms_pre", "test_cfg.rpn.max_per_img"), 10_000),
    **dict.fromkeys((f"train_cfg.{part}.sampler.num" for part in ("rpn", "rcnn")), 10**7),
    "backbone.mlp_ratio": 8,
    "roi_head.mask_roi_extractor.finest_scale": 192,
}


def _overrides(values: dict[str, int | list[int]]) -> dict[str, int | list[int]]:
    for name, value in values.items():
        numbers = value if isinstance(value, list) else [value]
        if name not in LARGEST or not 0 < len(numbers) <= 8 or not all(0 < n <= LARGEST[name] for n in numbers):
            raise ValueError(f"{short(name)} = {short(value)}; allowed are whole numbers up to {LARGEST.get(name, 0)}")
    return values


class MmdetArchitecture(Strict):
    """What `SwinDetector.architecture` may say."""

    config: Literal[*CONFIGURATIONS.values()]  # type: ignore[valid-type]
    overrides: Annotated[dict[str, int | list[int]], AfterValidator(_overrides)]
    names: Annotated[list[str], AfterValidator(distinct)] | None = None


# The same tensors; the second detects at 800 pixels and among 1000 proposals of a level in the place of 150.
MOBILE = ("fasterrcnn_mobilenet_v3_large_320_fpn", "fasterrcnn_mobilenet_v3_large_fpn")
MODELS = (
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    *MOBILE,
)
MICRO = "maskrcnn_micro"


GENERIC = ("maskrcnn", "fasterrcnn")  # torchvision's heads on a backbone of timm
Epsilon = Annotated[float, Field(ge=0, le=0.001)]
Size = Annotated[float, Field(gt=0, le=4096)]


class TorchvisionArchitecture(Strict):
    """What `ResNetDetector.architecture` may say."""

    model: Literal[(*MODELS, MICRO, *GENERIC)]  # type: ignore[valid-type]
    outputs: Annotated[int, Field(ge=2, le=10_000)]  # classes, and the background
    frozen_batch_norm: bool
    frozen_epsilon: Epsilon | None = None
    names: Annotated[list[str], Field(max_length=10_000)] | None = None
    backbone: Annotated[str, Field(pattern=r"^[a-z0-9_]+$", max_length=80)] | None = None  # a name of timm's registry
    levels: Annotated[list[Annotated[int, Field(ge=0, le=99)]], Field(min_length=1, max_length=6)] | None = None
    channels: Annotated[int, Field(ge=8, le=1024)] | None = None  # of the pyramid
    anchor_sizes: (
        Annotated[list[Annotated[list[Size], Field(min_length=1, max_length=8)]], Field(min_length=2, max_length=7)]
        | None
    ) = None  # pixels, of each level and of the pooled one after them
    aspect_ratios: Annotated[list[Size], Field(min_length=1, max_length=8)] | None = None  # height over width

    @model_validator(mode="after")
    def _whole(self) -> "TorchvisionArchitecture":
        told = [self.backbone, self.levels, self.channels, self.anchor_sizes]
        if (self.model in GENERIC) != (self.backbone is not None) or (self.backbone and None in told):
            raise ValueError("backbone, levels, channels and anchor_sizes belong to a backbone of timm, all of them")
        if self.levels and self.anchor_sizes and len(self.anchor_sizes) != len(self.levels) + 1:
            raise ValueError(f"{len(self.anchor_sizes)} rows of anchor_sizes; here are {len(self.levels) + 1} levels")
        if self.levels and sorted(set(self.levels)) != self.levels:
            raise ValueError("levels rise, the finest first")
        return self


ONE_STAGE = (
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "fcos_resnet50_fpn",
    "ssdlite320_mobilenet_v3_large",
)
MICRO_RETINANET = "retinanet_micro"


class OneStageArchitecture(Strict):
    """What `OneStageDetector.architecture` may say."""

    model: Literal[(*ONE_STAGE, MICRO_RETINANET)]  # type: ignore[valid-type]
    outputs: Annotated[int, Field(ge=2, le=10_000)]  # classes, and the background
    frozen_batch_norm: bool
    frozen_epsilon: Epsilon | None = None
    names: Annotated[list[str], Field(max_length=10_000), AfterValidator(distinct)] | None = None
