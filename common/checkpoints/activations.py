"""Activations by name: what a description may say, and the module that it stands for. Nothing is evaluated."""

import re
from typing import Any

from torch import nn

from common.checkpoints.unpickle import Inert

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
