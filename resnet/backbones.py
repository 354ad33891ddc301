"""Backbones of `timm` under torchvision's heads: an FPN on `features_only` models that have BatchNorm.

A state_dict says neither which backbone it belongs to nor its anchors, so the configuration does (`detector:`). Names
are looked up in timm's registry and nowhere else: nothing is downloaded, and no name is an address or a path.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from common.checkpoints.state_dict import building
from common.detection.types import StatisticsLayer
from common.runtime.environment import needed
from common.runtime.errors import UserError

LEVELS = 4  # of the pyramid, unless the configuration names others
EXAMPLE = 64  # pixels of the image that finds which BatchNorm reads which convolution
EARLY = 4  # largest stride of the first stages


class TimmBackbone(nn.Module):
    """What `torchvision.models.detection` takes as a backbone."""

    def __init__(self, name: str, levels: list[int], channels: int) -> None:
        super().__init__()
        self.body = separated(timm_body(name, levels))
        found: Any = self.body
        self.fpn = FeaturePyramidNetwork(found.feature_info.channels(), channels, LastLevelMaxPool())
        self.out_channels = channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps by level, the finest first."""
        return self.fpn(OrderedDict((str(i), level) for i, level in enumerate(self.body(images))))


def timm_body(name: str, levels: list[int] | None) -> nn.Module:
    """timm's own model that gives the maps of these levels, without weights; None: the four coarsest.

    Raises:
        UserError: timm is not installed, does not know the name, or has no maps of that model.
    """
    timm: Any = needed("timm", "resnet")
    where = f"detector.backbone: found {name!r}"
    if not re.fullmatch(r"\w+", name) or not timm.is_model(name):
        raise UserError(f"{where}, which is no name of timm.list_models(); give one of those")
    with building(where):
        wanted = tuple(levels or range(-LEVELS, 0))
        body: nn.Module = timm.create_model(name, pretrained=False, features_only=True, out_indices=wanted)
    return body.eval()


def separated(body: nn.Module) -> nn.Module:
    """Every BatchNorm that timm joins with its activation as two modules, `norm` and `act`, in place."""
    for name in joined(body):
        old: Any = body.get_submodule(name)
        norm = nn.BatchNorm2d(old.num_features, old.eps, old.momentum, old.affine)
        norm.load_state_dict({key: value for key, value in old.state_dict().items() if "." not in key})
        body.set_submodule(name, nn.Sequential(OrderedDict(norm=norm, drop=old.drop, act=old.act)))
    return body.eval()


def joined(body: nn.Module) -> list[str]:
    """The names of the BatchNorms of timm that hold an activation."""
    return [name for name, part in body.named_modules() if isinstance(part, nn.BatchNorm2d) and hasattr(part, "act")]


def as_built(state: Mapping[str, Tensor], name: str, levels: list[int]) -> dict[str, Tensor]:
    """A state_dict under the names of `TimmBackbone`, whatever its own code calls body and pyramid."""
    body = timm_body(name, levels)
    first, split = next(iter(body.state_dict())), joined(body)
    pyramid = _before(state, "inner_blocks.0.0.weight") or "backbone.fpn."
    own = _before(state, first) or "backbone.body."
    found = {}
    for key, tensor in state.items():
        if key.startswith(pyramid):
            key = f"backbone.fpn.{key.removeprefix(pyramid)}"
        elif key.startswith(own):
            module, _, leaf = key.removeprefix(own).rpartition(".")
            key = f"backbone.body.{module}.norm.{leaf}" if module in split else f"backbone.body.{module}.{leaf}"
        found[key] = tensor
    return found


def _before(state: Mapping[str, Tensor], ending: str) -> str | None:
    """What stands before such a name of the backbone."""
    found = [key for key in state if key.startswith("backbone.") and key.endswith(f".{ending}")]
    return min(found, key=len).removesuffix(ending) if found else None


@torch.no_grad()
def normed(body: nn.Module, name: str) -> list[StatisticsLayer]:
    """The convolutions of a backbone whose output is read by a BatchNorm, found by running it once, in that order.

    Raises:
        UserError: there is none.
    """
    made: dict[int, tuple[str, Tensor]] = {}  # tensors are held, so that no two have one identity
    found: list[StatisticsLayer] = []

    def norm_reads(part: str, x: Tensor) -> None:
        if (source := made.get(id(x))) is not None:
            found.append(StatisticsLayer(f"backbone.body.{source[0]}", f"backbone.body.{part}", overwritten=True))

    handles = []
    for key, part in body.named_modules():
        if isinstance(part, nn.Conv2d):
            handles.append(part.register_forward_hook(lambda _, __, y, key=key: made.update({id(y): (key, y)})))
        elif isinstance(part, nn.BatchNorm2d):
            handles.append(part.register_forward_pre_hook(lambda _, x, key=key: norm_reads(key, x[0])))
    with building(f"detector.backbone: {name} on {EXAMPLE} x {EXAMPLE} pixels"):
        body(torch.zeros(1, 3, EXAMPLE, EXAMPLE))
    for handle in handles:
        handle.remove()
    if not found or found[0].convolution != f"backbone.body.{next(iter(made.values()))[0]}":
        raise UserError(
            f"detector.backbone: {name} has no BatchNorm behind its first convolution, and images are made from the "
            "statistics of BatchNorm; take a backbone that has it, such as a ResNet, RegNet, EfficientNet or MobileNet"
        )
    return found


def stages(body: Any) -> tuple[set[str], str]:
    """The convolutions of the first stages, up to stride 4, and the prefix of the last block's names."""
    names = [name for name, part in body.named_modules() if isinstance(part, nn.Conv2d)]
    ends = [row["module"].replace(".", "_") for row in body.feature_info.info if row["reduction"] <= EARLY]
    inside = [i for i, name in enumerate(names) if ends and name.replace(".", "_").startswith(ends[-1])]
    block = re.match(r"(.*\.\d+)\.", names[-1])
    early = {f"backbone.body.{name}" for name in names[: inside[-1] + 1]} if inside else set()
    return early, f"backbone.body.{block[1]}." if block else "none"
