"""A one-level, anchor-free detector: three convolutions with BatchNorm and one output convolution, stride 8."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms

from common.detection.types import Detections, HeadOutput, HeadTerm, LayerPolicy, StatisticsLayer, Targets


class Block(nn.Module):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(self.conv(x)))


class ToyModule(nn.Module):
    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(3, width), Block(width, width), Block(width, width))
        self.output = nn.Conv2d(width, num_classes + 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.blocks(x))  # [B, classes + 4, H/8, W/8]


class Decoded(nn.Module):
    """Images to `output0` [B, 4 + classes, N], xyxy."""

    def __init__(self, detector: "ToyDetector", module: nn.Module) -> None:
        super().__init__()
        self.detector, self.module = detector, module

    def forward(self, images: Tensor) -> Tensor:
        maps = self.module(images)
        rows = maps.flatten(2).transpose(1, 2)
        boxes = self.detector._decode(rows[..., -4:], maps.shape[-1])
        return torch.cat([boxes, rows[..., :-4].sigmoid()], -1).transpose(1, 2)


@dataclass
class ToyDetector:
    class_names: tuple[str, ...] = ("circle", "square")
    width: int = 8
    seed: int = 0
    stride: int = 8
    export_outputs: ClassVar[dict[str, dict[int, str]]] = {"output0": {0: "batch", 2: "anchors"}}

    @property
    def architecture(self) -> Mapping[str, Any]:
        return {"class_names": list(self.class_names), "width": self.width}

    def build(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            module = ToyModule(len(self.class_names), self.width)
            for block in module.blocks:
                block.bn.running_mean.normal_(0, 0.1)
                block.bn.running_var.uniform_(0.5, 1.5)
                block.bn.weight.data.uniform_(0.5, 1.5)
                block.bn.bias.data.normal_(0, 0.2)
        return module.eval()

    def head_output(
        self, module: nn.Module, images: Tensor, targets: Sequence[Targets] | None = None, proposals: object = None
    ) -> HeadOutput:
        maps = module(images)
        rows = maps.flatten(2).transpose(1, 2)  # [B, N, classes + 4]
        logits, distances = rows[..., :-4], rows[..., -4:]
        confidence = logits.detach().sigmoid().amax(-1)
        terms = {"classes": HeadTerm(logits, "sigmoid", confidence), "boxes": HeadTerm(distances, "offset", confidence)}
        losses = {} if targets is None else self._losses(logits, distances, maps.shape[-1], targets)
        return HeadOutput(terms, (maps,), losses)

    def _losses(self, logits: Tensor, distances: Tensor, columns: int, targets: Sequence[Targets]) -> dict[str, Tensor]:
        boxes = self._decode(distances, columns)
        class_losses, box_losses = [], []
        for i, target in enumerate(targets):
            wanted = torch.zeros_like(logits[i])
            cell = ((target.boxes[:, :2] + target.boxes[:, 2:]) / 2 / self.stride).long()
            cell = (cell[:, 1] * columns + cell[:, 0]).clamp(0, len(wanted) - 1)
            wanted[cell, target.labels] = 1.0
            class_losses.append(F.binary_cross_entropy_with_logits(logits[i], wanted, reduction="sum"))
            box_losses.append(F.smooth_l1_loss(boxes[i, cell], target.boxes, reduction="sum") / self.stride)
        return {"class": torch.stack(class_losses), "box": torch.stack(box_losses)}

    def _decode(self, distances: Tensor, columns: int) -> Tensor:
        index = torch.arange(distances.shape[1], device=distances.device)
        centres = (torch.stack([index % columns, index // columns], -1) + 0.5) * self.stride
        reach = F.softplus(distances) * self.stride
        return torch.cat([centres - reach[..., :2], centres + reach[..., 2:]], -1)  # [B, N, 4] xyxy

    @torch.no_grad()
    def detect(
        self, module: nn.Module, images: Tensor, confidence: float, iou: float, max_detections: int
    ) -> list[Detections]:
        return self.detections([Decoded(self, module)(images)], confidence, iou, max_detections)

    def export_module(self, module: nn.Module) -> nn.Module:
        return Decoded(self, module)

    def detections(
        self, outputs: Sequence[Tensor], confidence: float, iou: float, max_detections: int
    ) -> list[Detections]:
        found = []
        for rows in outputs[0].transpose(1, 2):
            b, s = rows[:, :4], rows[:, 4:]
            row, label = (s > confidence).nonzero(as_tuple=True)
            kept = batched_nms(b[row], s[row, label], label, iou)[:max_detections]
            found.append(Detections(b[row[kept]], s[row[kept], label[kept]], label[kept]))
        return found

    def statistics_layers(self, module: nn.Module) -> list[StatisticsLayer]:
        return [StatisticsLayer(f"blocks.{i}.conv", f"blocks.{i}.bn") for i in range(3)]

    def feature_layers(self, module: nn.Module) -> list[str]:
        return [f"blocks.{i}" for i in range(3)]

    def quantization_policy(self, module: nn.Module) -> list[LayerPolicy]:
        return [
            LayerPolicy("blocks.0.conv", "first", "sees the image"),
            LayerPolicy("blocks.1.conv", "early", "largest maps"),
            LayerPolicy("blocks.2.conv", "body", "the rest"),
            LayerPolicy("output", "output", "final predictions"),
        ]


def load(weights: Path) -> ToyDetector:
    """The "checkpoint" of a toy is a seed: the file's text."""
    return ToyDetector(seed=int(weights.read_text()))


def from_architecture(architecture: Mapping[str, Any]) -> ToyDetector:
    return ToyDetector(tuple(architecture["class_names"]), architecture["width"])
