"""RetinaNet, FCOS and SSDlite: torchvision's one-stage detectors behind the Detector protocol."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from common.checkpoints.download import fetch
from common.checkpoints.rcnn_architecture import ONE_STAGE, OneStageArchitecture
from common.checkpoints.read import load_own, read_published
from common.checkpoints.state_dict import load_state
from common.checkpoints.strict_json import checked
from common.detection.torchvision_parts import (
    OUTPUTS,
    OneImage,
    Outputs,
    batch_norms,
    class_names,
    detections_of,
    official_files,
    own_flags,
    with_epsilon,
)
from common.detection.types import Detections, HeadOutput, HeadTerm, LayerPolicy, Role, StatisticsLayer, Targets
from common.runtime.environment import temporarily
from common.runtime.errors import UserError
from onestage.models import build_module, recognise

FAMILY = "onestage"


@dataclass
class OneStageDetector:
    """A checkpoint of torchvision's one-stage detectors. Modules are torchvision's own classes."""

    class_names: tuple[str, ...]
    architecture: Mapping[str, Any]
    state: Mapping[str, Tensor] | None = None
    stride: int = 32
    export_outputs: ClassVar[Mapping[str, Mapping[int, str]]] = OUTPUTS

    def build(self) -> nn.Module:
        """A new module in eval mode, float32 on the CPU.

        Raises:
            UserError: the weights do not fit the architecture.
        """
        module = build_module(self.architecture)
        if self.state is not None:
            what = f"torchvision's {self.architecture['model']}, and other backbones and anchors cannot be rebuilt"
            load_state(module, self.state, "weights", what)
        return module

    def head_output(
        self, module: nn.Module, images: Tensor, targets: Sequence[Targets] | None = None, proposals: object = None
    ) -> HeadOutput:
        """Terms: `classes` [B, N, outputs], with softmax (SSDlite) [B, N, 1, outputs], `boxes` [B, N, 4] and, of FCOS,
        `centerness` [B, N, 1]. Losses: torchvision's own."""
        model: Any = module
        with own_flags(model):
            batch = torch.stack([model.transform.normalize(image) for image in images])
            levels = list(model.backbone(batch).values())
            found = model.head(levels)
            anchors = model.anchor_generator(ImageList(batch, [batch.shape[-2:]] * len(batch)), levels)
        counts = [
            n * level.shape[2] * level.shape[3]
            for n, level in zip(model.anchor_generator.num_anchors_per_location(), levels, strict=True)
        ]
        rows = torch.cat(list(found.values()), 2).split(counts, 1)
        maps = tuple(
            row.reshape(len(row), *level.shape[2:], -1).permute(0, 3, 1, 2)
            for row, level in zip(rows, levels, strict=True)
        )
        wanted = [] if targets is None else Outputs(self.architecture["outputs"], images.device).targets(targets)
        each = [_losses(model, found, anchors, counts, i, target) for i, target in enumerate(wanted)]
        losses = {name: torch.stack([one[name] for one in each]) for name in (each[0] if each else ())}
        return HeadOutput(_terms(found, softmax=_is_ssd(model)), maps, losses)

    @torch.no_grad()
    def detect(
        self, module: nn.Module, images: Tensor, confidence: float, iou: float, max_detections: int
    ) -> list[Detections]:
        """torchvision's own inference on images of the size they have, at these thresholds."""
        limits = {"score_thresh": confidence, "nms_thresh": iou, "detections_per_img": max_detections}
        with own_flags(module), temporarily(module, **limits):
            rows = module(list(images))
        return Outputs(self.architecture["outputs"], images.device).detections(rows)

    def export_module(self, module: nn.Module) -> nn.Module:
        """torchvision's own inference on one image, with the model's default limits."""
        return OneImage(module)

    def detections(
        self, outputs: Sequence[Tensor], confidence: float, iou: float, max_detections: int
    ) -> list[Detections]:
        classes = Outputs(self.architecture["outputs"], outputs[0].device).classes
        return detections_of(outputs, classes, confidence, iou, max_detections)

    def statistics_layers(self, module: nn.Module) -> list[StatisticsLayer]:
        """Every BatchNorm, those of SSDlite's head included; RetinaNet and FCOS have GroupNorm or none in theirs."""
        return batch_norms(module)

    def feature_layers(self, module: Any) -> list[str]:
        """The convolutions that give the FPN's levels; of SSDlite the blocks whose outputs are levels."""
        if _is_ssd(module):
            parts = {"features": module.backbone.features, "extra": module.backbone.extra}
            return [f"backbone.{name}.{i}" for name, blocks in parts.items() for i in range(len(blocks))]
        return [f"backbone.fpn.layer_blocks.{i}" for i in range(len(module.backbone.fpn.layer_blocks))]

    def quantization_policy(self, module: nn.Module) -> list[LayerPolicy]:
        layers = [n for n, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]
        return [LayerPolicy(name, *_role(name, first=i == 0)) for i, name in enumerate(layers)]


def load(weights: Path, given: Mapping[str, Any] | None = None) -> OneStageDetector:
    """Loads a state_dict of one of torchvision's models (.pth), or safetensors with its architecture.

    An official file that is missing is fetched when online, and its SHA-256 compared with the part in its name.

    Args:
        weights: the file.
        given: of `common.config.schema.DetectorConfig` the epsilon of frozen BatchNorms; not for safetensors.

    Raises:
        UserError: missing, damaged or unsafe file, or another model.
    """
    if not weights.exists():
        fetch(weights, *official_files([get_model_weights(name) for name in ONE_STAGE]))
    if other := set(given or ()) - {"frozen_epsilon"}:
        raise UserError(f"detector: found {', '.join(sorted(other))}; {FAMILY} takes frozen_epsilon alone")
    if weights.suffix == ".safetensors":
        if given:
            raise UserError(f"detector: found settings, but {weights} says itself what it is; leave them out")
        state, architecture = load_own(weights, FAMILY)
    else:
        found, arguments = read_published(weights)
        state, architecture = recognise(found, str(weights))
        architecture = with_epsilon(architecture, given, weights, state, arguments, architecture["model"])
    detector = from_architecture(architecture)
    detector.state = state
    detector.build()  # a state that does not fit is found before any work
    return detector


def from_architecture(architecture: Mapping[str, Any]) -> OneStageDetector:
    """The detector that `OneStageDetector.architecture` describes, without weights.

    Raises:
        UserError: an architecture that is not allowed.
    """
    where = f"weights: the architecture of this {FAMILY}"
    found = checked(OneStageArchitecture, architecture, where).model_dump(exclude_unset=True)
    return OneStageDetector(class_names(found, where), found)


def _is_ssd(module: Any) -> bool:
    return not hasattr(module.backbone, "fpn")


def _terms(found: Mapping[str, Tensor], *, softmax: bool) -> dict[str, HeadTerm]:
    logits = found["cls_logits"]
    if softmax:
        confidence = 1 - logits.detach().float().softmax(-1)[..., 0]
        classes = HeadTerm(logits[:, :, None], "softmax", confidence)
    else:
        confidence = logits.detach().float().sigmoid().amax(-1)
        if "bbox_ctrness" in found:
            confidence = (confidence * found["bbox_ctrness"].detach().float().sigmoid()[..., 0]).sqrt()
        classes = HeadTerm(logits, "sigmoid", confidence)
    terms = {"classes": classes, "boxes": HeadTerm(found["bbox_regression"], "offset", confidence)}
    if "bbox_ctrness" in found:
        terms["centerness"] = HeadTerm(found["bbox_ctrness"], "sigmoid", confidence)
    return terms


def _losses(
    model: Any, found: Mapping[str, Tensor], anchors: Sequence[Tensor], counts: list[int], i: int, target: Targets
) -> dict[str, Tensor]:
    """torchvision's losses of image `i` by itself, scalars; SSDlite's are 0 without objects."""
    rows = {name: values[i : i + 1].float() for name, values in found.items()}
    wanted = [{"boxes": target.boxes, "labels": target.labels}]
    if "bbox_ctrness" in found:
        return model.compute_loss(wanted, rows, [anchors[i]], counts)
    if not _is_ssd(model):
        return model.compute_loss(wanted, rows, [anchors[i]])
    matched = torch.full((len(anchors[i]),), -1, device=anchors[i].device)
    if len(target.boxes):
        matched = model.proposal_matcher(box_iou(target.boxes, anchors[i]))
    return model.compute_loss(wanted, rows, [anchors[i]], [matched])


def _role(name: str, *, first: bool) -> tuple[Role, str]:
    if first:
        return "first", "sees the image"
    if name.endswith((".cls_logits", ".bbox_reg", ".bbox_ctrness")) or (".module_list." in name and name[-2:] == ".1"):
        return "output", "final predictions"
    if name.startswith("head."):
        return "head", "head, before its last convolution"
    if name.startswith(("backbone.body.layer1.", *(f"backbone.features.0.{i}." for i in (1, 2, 3)))):
        return "early", "stride 4: few weights, largest maps"
    return "body", "backbone or FPN"
