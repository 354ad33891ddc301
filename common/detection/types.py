"""The conventions for images, boxes and head outputs.

Images are float tensors [B, 3, H, W], RGB, in [0, 1]. Boxes are float32, xyxy, in pixels of that image.
Labels are contiguous class indices in [0, number of classes), never COCO category ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # the configuration imports this file, and torch would make `zsqdet --help` take seconds
    from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """Ground truth of one image."""

    boxes: Tensor  # [n, 4] xyxy, pixels
    labels: Tensor  # [n] int64
    masks: Tensor | None = None  # [n, H, W] bool, for detectors that segment


@dataclass(frozen=True)
class Detections:
    """Detections in one image after NMS, best score first."""

    boxes: Tensor  # [n, 4] xyxy, pixels
    scores: Tensor  # [n] in [0, 1]
    labels: Tensor  # [n] int64
    masks: Tensor | None = None  # [n, m, m] in [0, 1], a grid over each box, see `masks.paste`


@dataclass(frozen=True)
class HeadTerm:
    """One kind of raw prediction; row i of teacher and student belong to the same anchor point or proposal."""

    values: Tensor  # [B, N, K], or [B, N, S, K] if a row has S separate distributions
    kind: Literal["sigmoid", "softmax", "offset"]  # of the last dimension: K logits, or K real numbers
    confidence: Tensor  # [B, N] in [0, 1], detached: the model's probability that the row is an object


@dataclass(frozen=True)
class HeadOutput:
    """The differentiable output of a detector for one batch."""

    terms: Mapping[str, HeadTerm]
    maps: tuple[
        Tensor, ...
    ]  # raw head map of each level [B, channels, h, w], which the published distillation loss compares
    losses: Mapping[str, Tensor] = field(default_factory=dict)  # [B] each; empty without targets
    proposals: object = None  # two-stage only: `roi_losses.Proposals` for the student


@dataclass(frozen=True)
class StatisticsLayer:
    """A convolution and the BatchNorm that follows it, by their names in the module."""

    convolution: str
    batch_norm: str
    overwritten: bool = False  # the BatchNorm's output is modified in place later, e.g. by `out += identity`


@dataclass(frozen=True)
class AttentionLayer:
    """The attention of one block of a transformer."""

    block: str  # a module whose first input is [B, tokens, C]
    projection: str  # in it, the Linear after attention; its input is softmax(q k^T) v, [B * windows, tokens, C]
    heads: int  # that input has the channels of head 0, head 1, ... in this order


@dataclass(frozen=True)
class NormedLayer:
    """A LayerNorm over the last dimension and the only layer that reads its output."""

    norm: str
    layer: str  # a Linear, or a convolution without padding
    shift: bool  # whether a channel offset can be folded: the layer has a bias, and no zero padding lies between


Role = Literal["first", "early", "body", "late", "head", "output", "attention_input"]


@dataclass(frozen=True)
class LayerPolicy:
    """A layer that could be quantized, and what it is to the detector.

    Roles: `first` sees the image; `early` are the first stages, few weights and the largest maps; `output` gives the
    final predictions; `head` is the rest of the head; `late` are layers before it that the published code leaves in
    float; `attention_input` is an input of a matrix product of two activations; `body` is everything else.
    """

    name: str  # qualified name of a Conv2d, ConvTranspose2d, Linear or AttentionInput in the module
    role: Role
    reason: str  # why it has this role, for the table of what was quantized
    always_float: bool = False  # whatever the settings say: the head's loss and terms never run it
