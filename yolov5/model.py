"""The YOLOv5 network: Ultralytics' blocks, which have the same parameter names, and the anchor head.

Facts from github.com/ultralytics/yolov5 (v6.0 to v7.0): models/yolo.py.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.modules import C3, SPP, SPPF, Bottleneck, Concat, Conv

from common.checkpoints.yolo_architecture import set_activation

BLOCKS: dict[str, type[nn.Module]] = {b.__name__: b for b in (Conv, C3, SPP, SPPF, Bottleneck)}
_WORDS = {"None": None, "True": True, "False": False}  # how the YAML files of YOLOv5 spell them


class AnchorHead(nn.Module):
    """A 1x1 convolution for each level; every cell predicts one box for each of its anchors.

    Args:
        num_classes: of the detector.
        anchors: for each level w, h, w, h ... in pixels, or their number where the weights bring them.
        channels: of each level's features.
    """

    anchors: Tensor

    def __init__(self, num_classes: int, anchors: Sequence[Sequence[float]] | int, channels: Sequence[int]) -> None:
        super().__init__()
        rows = [[1.0] * (2 * anchors)] * len(channels) if isinstance(anchors, int) else anchors
        self.register_buffer("anchors", torch.tensor(rows).float().view(len(rows), -1, 2))  # [L, A, 2], in strides
        # The names of YOLOv5's Detect: what a pickled head says of itself is compared with them.
        self.nc, self.no, self.nl, self.na = num_classes, num_classes + 5, len(rows), self.anchors.shape[1]
        self.m = nn.ModuleList(nn.Conv2d(c, self.na * self.no, 1) for c in channels)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Raw map of each level [B, A * (5 + nc), h, w]; for each anchor x, y, w, h, objectness, classes."""
        return [convolution(x) for convolution, x in zip(self.m, features, strict=True)]

    def levels(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The maps as [B, A, h, w, 5 + nc]."""
        return [m.unflatten(1, (self.na, -1)).permute(0, 1, 3, 4, 2) for m in maps]


class YoloV5(nn.Module):
    """The network that a YOLOv5 YAML describes, untrained; `forward` gives the head's raw maps."""

    def __init__(self, description: Mapping[str, Any], num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.sources: list[int | list[int]] = []
        channels: list[int] = []
        for source, number, kind, arguments in [*description["backbone"], *description["head"]]:
            repeats = max(round(number * description["depth_multiple"]), 1) if number > 1 else number
            inputs = [channels[i] if channels else 3 for i in ([source] if isinstance(source, int) else source)]
            name = kind.rpartition(".")[2]
            built, outputs = _layer(name, repeats, list(arguments), inputs, description, num_classes)
            built.f = source  # as YOLOv5 has it, against whose checkpoints it is held
            layers.append(built)
            channels.append(outputs)
            self.sources.append(source)
        self.model = nn.Sequential(*layers)
        set_activation(self, description.get("activation"))
        for part in self.modules():  # the settings that YOLOv5 trains with
            if isinstance(part, nn.BatchNorm2d):
                part.eps, part.momentum = 1e-3, 0.03
        self.eval()
        with torch.no_grad():
            maps = self(torch.zeros(1, 3, 256, 256))
        self.strides = tuple(256 // m.shape[-1] for m in maps)
        self.head.anchors /= torch.tensor(self.strides).view(-1, 1, 1)
        _start_biases(self.head, self.strides)

    @property
    def head(self) -> AnchorHead:
        head = self.model[-1]
        assert isinstance(head, AnchorHead)
        return head

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] in [0, 1], sides multiples of the largest stride, to raw maps (see AnchorHead)."""
        outputs: list[Any] = []
        for layer, source in zip(self.model, self.sources, strict=True):
            if isinstance(source, int):
                taken = x if source == -1 else outputs[source]
            else:
                taken = [x if i == -1 else outputs[i] for i in source]
            x = layer(taken)
            outputs.append(x)
        return x  # type: ignore[return-value]


def decode(head: AnchorHead, maps: Sequence[Tensor], strides: Sequence[int]) -> Tensor:
    """[B, 4 + nc, N]: boxes xywh (centre, pixels) and scores = objectness x class, as YOLOv5's val.py has them.

    xy = (2 sigmoid(t) - .5 + cell) stride, wh = (2 sigmoid(t))^2 anchor: models/yolo.py of YOLOv5, Detect.forward.
    """
    columns = []
    for level, raw in enumerate(maps):
        batch, _, height, width = raw.shape
        y = raw.float().view(batch, head.na, -1, height, width).sigmoid()
        ys, xs = torch.meshgrid(*(torch.arange(n, device=y.device) for n in (height, width)), indexing="ij")
        centres = (y[:, :, :2] * 2 - 0.5 + torch.stack([xs, ys])) * strides[level]
        anchors = head.anchors[level].float().view(1, -1, 2, 1, 1) * strides[level]
        sizes = (y[:, :, 2:4] * 2) ** 2 * anchors
        rows = torch.cat([centres, sizes, y[:, :, 5:] * y[:, :, 4:5]], 2)
        columns.append(rows.transpose(1, 2).flatten(2))
    return torch.cat(columns, 2)


def predictions(network: YoloV5, images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] to what `decode` gives."""
    return decode(network.head, network(images), network.strides)


class Decoded(nn.Module):
    """A YOLOv5 with its predictions decoded."""

    def __init__(self, network: YoloV5) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] to `predictions`."""
        return predictions(self.network, images)


def _layer(
    name: str, repeats: int, arguments: list[Any], inputs: list[int], description: Mapping[str, Any], num_classes: int
) -> tuple[nn.Module, int]:
    """A layer of the YAML and its number of output channels."""
    arguments = [_WORDS.get(a, a) if isinstance(a, str) else a for a in arguments]
    if name == "Concat":
        return Concat(*arguments), sum(inputs)
    if name == "Upsample":
        return nn.Upsample(*arguments), inputs[0]
    if name == "Detect":
        return AnchorHead(num_classes, description["anchors"], inputs), 0
    outputs = math.ceil(arguments[0] * description["width_multiple"] / 8) * 8
    arguments = [inputs[0], outputs, *arguments[1:]]
    if name == "C3":
        arguments.insert(2, repeats)
        repeats = 1
    blocks = []
    for _ in range(repeats):
        block = BLOCKS[name](*arguments)
        if isinstance(block, SPPF):
            block.cv1.act = nn.SiLU()  # Ultralytics dropped it in 8.4, and YOLOv5 was trained with it
        blocks.append(block)
        arguments[0] = outputs
    return (blocks[0] if len(blocks) == 1 else nn.Sequential(*blocks)), outputs


def _start_biases(head: AnchorHead, strides: Sequence[int]) -> None:
    """Biases of an untrained head: 8 objects to an image of 640 pixels, each class alike (YOLOv5, models/yolo.py)."""
    for convolution, stride in zip(head.m, strides, strict=True):
        assert isinstance(convolution, nn.Conv2d)
        assert convolution.bias is not None
        bias = convolution.bias.data.view(head.anchors.shape[1], -1)
        bias[:, 4] += math.log(8 / (640 / stride) ** 2)
        bias[:, 5:] += math.log(0.6 / (head.nc - 0.99999))
