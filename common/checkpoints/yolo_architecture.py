"""The architecture of a YOLO as its YAML describes it: one schema for every road by which one arrives.

Ultralytics' parser looks the names of blocks up among its globals and evaluates texts; so names, words and numbers are
compared with what is allowed here before it sees them, and what the network would need is estimated.
"""

import math
import re
from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, ValidationInfo, model_validator
from torch import nn

from common.checkpoints.strict_json import Strict, checked, distinct, short
from common.checkpoints.unpickle import Inert

WORDS = (None, "None", "True", "False", "nc", "anchors", "nearest", "bilinear")  # what arguments may say
SEGMENT = {"Segment", "Segment26"}  # heads with masks
UNSCALED = {  # blocks with further numbers of channels
    "RepNCSPELAN4": (1, 2), "ELAN1": (1, 2), "SPPELAN": (1,), **dict.fromkeys(SEGMENT, (1, 2)),
}  # fmt: skip
HEADS = {"Detect", "v10Detect", *SEGMENT}
SAME_CHANNELS = {"nn.Upsample", "nn.MaxPool2d", "nn.ZeroPad2d", "nn.Identity", "CBFuse", *HEADS}
HALVING = {"ADown", "AConv", "Focus", "nn.MaxPool2d"}
MOST_CHANNELS, MOST_REPEATS, LARGEST_NUMBER, MOST_LAYERS = 8192, 64, 16, 100
MOST_WEIGHTS, MOST_ACTIVATIONS = 1.5e9, 4e8  # by a generous estimate; a YOLOv5x6 is at 8e8 and 2e7

Factor = Annotated[float, Field(gt=0, le=4)]
Channels = Annotated[float, Field(ge=8, le=MOST_CHANNELS)]
ClassName = Annotated[str, Field(min_length=1, max_length=200)]

_KINDS: dict[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (nn.SiLU, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardswish, nn.Mish, nn.GELU)
}
_FORM = re.compile(r"(?:(?:torch\.)?nn\.)?(\w+)(?:\((?:negative_slope=)?([\d.e-]*)(?:,? ?inplace=(?:True|False))?\))?")
DEFAULT = "nn.SiLU()"


def canonical(text: str | None) -> str:
    """`nn.SiLU()`, `nn.LeakyReLU(0.1)` and so on, for any way to write it; None and "" are the default, SiLU.

    Raises:
        ValueError: not the name of a known activation.
    """
    matched = _FORM.fullmatch(text or DEFAULT)
    if not matched or matched[1] not in _KINDS or (matched[2] and matched[1] != "LeakyReLU"):
        raise ValueError(f"not a known activation; known are {', '.join(_KINDS)}, as nn.SiLU() or nn.LeakyReLU(0.1)")
    if matched[1] != "LeakyReLU":
        return f"nn.{matched[1]}()"
    slope = float(matched[2] or 0.01)
    if not 0 <= slope < 1:
        raise ValueError("a slope outside of [0, 1)")
    return f"nn.LeakyReLU({slope:g})"


def pickled_activation(part: Inert) -> str:
    """The canonical name of a pickled activation.

    Raises:
        ValueError: not a known one.
    """
    kind = part.pickled_class.rpartition(".")[2]
    slope: Any = part.attributes.get("negative_slope", 0.01)
    if kind == "LeakyReLU" and isinstance(slope, float):
        return canonical(f"LeakyReLU({slope:g})")
    return canonical(kind)


def make(name: str) -> nn.Module:
    """A new module of that canonical name."""
    kind, _, argument = name.removeprefix("nn.").removesuffix(")").partition("(")
    return _KINDS[kind](float(argument)) if argument else _KINDS[kind]()


def set_activation(module: nn.Module, name: str | None) -> None:
    """Gives every block of convolution, BatchNorm and SiLU in `module` the activation of that name instead."""
    wanted = canonical(name)
    if wanted == DEFAULT:
        return
    for part in module.modules():
        if isinstance(getattr(part, "act", None), nn.SiLU) and {"conv", "bn"} <= dict(part.named_children()).keys():
            part.act = make(wanted)


def _layer(row: list[Any], about: ValidationInfo) -> list[Any]:
    known: Collection[str] = about.context or ()
    if len(row) != 4:
        raise ValueError("a layer is [from, number, block, arguments]")
    sources, number, block, arguments = row
    inputs = sources if isinstance(sources, list) else [sources]
    if not 0 < len(inputs) <= LARGEST_NUMBER or not all(_is_whole(i, -MOST_LAYERS, MOST_LAYERS) for i in inputs):
        raise ValueError(f"a layer comes from numbers of layers, not {short(sources)}")
    if not _is_whole(number, 1, MOST_REPEATS):
        raise ValueError(f"a layer is repeated 1 to {MOST_REPEATS} times, not {short(number)}")
    if not isinstance(block, str) or block not in known:
        raise ValueError(f"has a block {short(block)}; known ones are {', '.join(sorted(known))}")
    if not isinstance(arguments, list) or len(arguments) > LARGEST_NUMBER:
        raise ValueError(f"the arguments of {short(block)} are a list of at most {LARGEST_NUMBER}")
    for place, argument in enumerate(arguments):
        wide = place in (0, *UNSCALED.get(block, ())) and (block not in SAME_CHANNELS or block in SEGMENT)
        _check_argument(block, argument, MOST_CHANNELS if wide else LARGEST_NUMBER)
    if block == "nn.Upsample" and arguments[:1] not in ([None], ["None"]):
        raise ValueError("nn.Upsample has a factor and no size")
    return row


def _check_argument(block: str, argument: Any, largest: int) -> None:
    if isinstance(argument, list):
        if len(argument) > LARGEST_NUMBER or any(isinstance(item, list) for item in argument):
            raise ValueError(f"an argument of {short(block)} is too long or nested")
        for item in argument:
            _check_argument(block, item, largest)
    elif isinstance(argument, str) or argument is None:
        if argument not in WORDS and block not in HEADS:
            raise ValueError(
                f"the argument {short(argument)} of {short(block)}; known are {', '.join(map(str, WORDS))}"
            )
    elif not isinstance(argument, int | float) or not -LARGEST_NUMBER <= argument <= largest:
        raise ValueError(f"the argument {short(argument)} of {short(block)}; allowed are numbers up to {largest}")


def _anchors(value: Any) -> Any:
    if _is_whole(value, 1, LARGEST_NUMBER):
        return value
    rows: list[Any] = value if isinstance(value, list) else [None]
    if not 0 < len(rows) <= LARGEST_NUMBER or not all(isinstance(row, list) for row in rows):
        raise ValueError("anchors are their number, or for each level a list w, h, w, h, ...")
    lengths, numbers = {len(row) for row in rows}, [number for row in rows for number in row]
    if len(lengths) != 1 or not 0 < (n := lengths.pop()) <= 2 * LARGEST_NUMBER or n % 2:
        raise ValueError("each level has as many anchors, each a width and a height")
    if not all(isinstance(x, int | float) and not isinstance(x, bool) and 0 < x <= 1e5 for x in numbers):
        raise ValueError("sizes of anchors are numbers of pixels above 0")
    return value


Layer = Annotated[list[Any], AfterValidator(_layer)]


class YoloYaml(Strict):
    """What counts of a YAML of YOLOv5 or Ultralytics; the rest is dropped."""

    model_config = ConfigDict(extra="ignore")

    nc: Annotated[int, Field(ge=1, le=10_000)]
    backbone: Annotated[list[Layer], Field(min_length=1, max_length=MOST_LAYERS)]
    head: Annotated[list[Layer], Field(min_length=1, max_length=MOST_LAYERS)]
    anchors: Annotated[Any, AfterValidator(_anchors)] = 3
    depth_multiple: Factor = 1.0
    width_multiple: Factor = 1.0
    max_channels: Channels = MOST_CHANNELS
    scales: dict[str, tuple[Factor, Factor, Channels] | tuple[Factor, Factor]] | None = None
    scale: str = ""
    activation: Annotated[str | None, AfterValidator(canonical)] = None
    reg_max: Annotated[int, Field(ge=1, le=64)] = 16
    end2end: bool | None = None
    ch: Literal[3] = 3
    channels: Literal[3] = 3

    @model_validator(mode="before")
    @classmethod
    def _plain_scales(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        scales = content.get("scales")
        if isinstance(scales, dict):
            rows = {k: tuple(v) if isinstance(v, list) else v for k, v in scales.items()}
            content = content | {"scales": rows}
        return content

    @model_validator(mode="after")
    def _fits(self) -> "YoloYaml":
        if self.scales and self.scale not in self.scales:
            raise ValueError(f"the scale {short(self.scale)} is none of {', '.join(map(short, self.scales))}")
        *inner, last = [row[2] for row in [*self.backbone, *self.head]]
        if last not in HEADS or HEADS & set(inner):
            raise ValueError(f"the last layer, and no other one, is a head: {', '.join(sorted(HEADS))}")
        arguments = self.head[-1][3]
        if last in SEGMENT:
            if len(arguments) != 3 or not all(_is_whole(n, 1, 1024) for n in arguments[1:]):
                raise ValueError(f"{last} has the arguments nc and two numbers, of masks and of channels, up to 1024")
            arguments = arguments[:1]
        if any(a not in ("nc", "anchors", self.nc) and not isinstance(a, list) for a in arguments):
            raise ValueError(f"{last} has the argument nc, and Detect anchors")
        weights, activations = self._estimate()
        if weights > MOST_WEIGHTS or activations > MOST_ACTIVATIONS:
            raise ValueError("a network that is far larger than any YOLO")
        return self

    def _estimate(self) -> tuple[float, float]:
        """Upper bounds of the numbers of weights and of activations at 256 pixels, of the layers that are scaled."""
        depth, width, most = (*(self.scales or {}).get(self.scale, self._own_scale()), MOST_CHANNELS)[:3]
        channels, pixels, weights, activations = [3.0], [65536.0], 0.0, 0.0
        for i, (sources, number, block, arguments) in enumerate([*self.backbone, *self.head]):
            inputs = sources if isinstance(sources, list) else [sources]
            if not all(-i - 1 <= s < i or (i == 0 and s == -1) for s in inputs):
                raise ValueError(f"layer {i} comes from one that is not before it")
            places = [s if s < 0 else s + 1 for s in inputs]  # behind the image
            incoming, area = sum(channels[p] for p in places), pixels[places[0]]
            numbers = [a for a in arguments if isinstance(a, int | float) and not isinstance(a, bool)]
            own = math.ceil(min(numbers[0], most) * width / 8) * 8 if numbers else incoming
            outgoing = incoming if block == "Concat" or block in SAME_CHANNELS else max(own, *numbers, 1)
            kernel = numbers[1] if block.endswith("Conv") and len(numbers) > 1 else 3
            repeats = max(number * depth, 1) * max([1.0, *numbers[3:]])
            step = numbers[2] if block.endswith("Conv") and len(numbers) > 2 else 1 + (block in HALVING)
            area = area * (max([1.0, *numbers]) ** 2 if block == "nn.Upsample" else 1 / max(step, 1) ** 2)
            weights += repeats * max(incoming, outgoing) * outgoing * max(9, kernel**2)
            activations += repeats * outgoing * area
            channels.append(outgoing)
            pixels.append(area)
        return weights, activations

    def _own_scale(self) -> tuple[float, float, float]:
        return self.depth_multiple, self.width_multiple, self.max_channels


class YoloArchitecture(Strict):
    """`architecture` of a YOLO detector."""

    yaml: YoloYaml
    names: Annotated[list[ClassName], Field(min_length=1, max_length=10_000), AfterValidator(distinct)]

    @model_validator(mode="after")
    def _one_name_for_each_class(self) -> "YoloArchitecture":
        if self.yaml.nc != len(self.names):
            raise ValueError(f"{self.yaml.nc} classes and {len(self.names)} names")
        return self


def yolo_architecture(content: Any, blocks: Collection[str], where: str) -> dict[str, Any]:
    """{"yaml": ..., "names": [...]} as it was, without what does not count.

    Args:
        content: of any origin.
        blocks: names of blocks that the family builds.
        where: what a message begins with.

    Raises:
        UserError: the first place that is not allowed.
    """
    found = checked(YoloArchitecture, content, where, context=blocks)
    return found.model_dump(mode="json", exclude_unset=True)


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
