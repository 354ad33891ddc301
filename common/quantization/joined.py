"""Inputs that join several maps: each map is rounded with its own step.

What a concatenation joins comes from layers of different ranges, so that one step for all of it suits none of them. In
integers a layer whose input has k maps is the sum of k layers, one for each map and its channels of the weight.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from common.quantization.observe import Feed, watching
from common.quantization.policy import FLOAT, LayerPlan

JOINS = (torch.cat, torch.concat, torch.concatenate)


class Joined(nn.Module):
    """Rounds the maps of an input [B, C, h, w], one after the other along the channels, each with a quantizer."""

    def __init__(self, channels: Sequence[int], quantizers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.maps = nn.ModuleList(quantizers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([q(part) for q, part in zip(self.maps, x.split(self.channels, 1), strict=True)], 1)

    @property
    def initialised(self) -> bool:
        return all(quantizer.initialised for quantizer in self.maps)

    @initialised.setter
    def initialised(self, value: bool) -> None:
        for quantizer in self.maps:
            quantizer.initialised = value  # type: ignore[assignment]


def map_quantizers(quantizer: nn.Module) -> list[Any]:
    """The quantizers of an input's maps, or the only one."""
    return list(quantizer.maps) if isinstance(quantizer, Joined) else [quantizer]


@torch.no_grad()
def plan_maps(teacher: nn.Module, plan: Sequence[LayerPlan], run: Feed) -> list[LayerPlan]:
    """The plan with `maps` filled in for each layer whose input is rounded and joins several maps whenever it runs.

    Args:
        teacher: the float module.
        plan: from `plan_layers`.
        run: runs a few images through it.
    """
    seen: dict[str, set[tuple[int, ...]]] = {}
    joins = _Joins()

    def look(name: str, x: Tensor) -> None:
        seen.setdefault(name, set()).add(joins.channels(x))

    names = [entry.name for entry in plan if entry.activation_bits < FLOAT and entry.role != "product"]
    with joins, watching(teacher, names, inputs=look):
        run(teacher)
    return [replace(entry, maps=_only(seen, entry.name)) for entry in plan]


def _only(seen: Mapping[str, set[tuple[int, ...]]], name: str) -> tuple[int, ...]:
    """A layer that runs on several inputs, each joined in another way, has no maps."""
    found = seen.get(name, set())
    return next(iter(found)) if len(found) == 1 else ()


class _Joins(TorchFunctionMode):
    """Remembers what each concatenation along the channels was made of."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[Tensor, tuple[int, ...]]] = {}  # by id; a tensor that is kept keeps its id

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in JOINS and result.ndim == 4 and (args[1:] or (kwargs.get("dim", 0),))[0] in (1, -3):
            parts = args[0] if args else kwargs["tensors"]
            self._made[id(result)] = (result, tuple(part.shape[1] for part in parts))
        return result

    def channels(self, x: Tensor) -> tuple[int, ...]:
        """Those of the maps that `x` joins; nothing if it joins none."""
        _, found = self._made.get(id(x), (x, ()))
        return found if len(found) > 1 else ()
