"""Mixed precision under a limit on the average bits of the weights, from the sensitivity of each layer."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import nn

from common.quantization.layers import weight_count
from common.quantization.policy import LayerPlan, with_weights
from common.quantization.sensitivity import Sensitivity
from common.runtime.errors import UserError


def allocate_bits(plan: Sequence[LayerPlan], found: Sequence[Sensitivity], limit: float) -> list[LayerPlan]:
    """Gives more bits to the layers whose predictions gain most for each bit, until the weights have `limit` bits.

    Bits are counted as the mean over the weights of all quantized layers. An upgrade takes a layer from its bits to
    any of those that were scanned; one that no longer fits is passed over for a smaller one.

    Raises:
        UserError: the limit is below what the plan needs already.
    """
    count, used = _used([(entry.weights, entry.planned_bits[0]) for entry in found], limit)
    chosen: dict[str, int] = {}
    while upgrades := [
        upgrade
        for entry in found
        for upgrade in _upgrades(entry, chosen.get(entry.name, 0))
        if used + upgrade.cost <= limit * count
    ]:
        best = max(upgrades)
        used += best.cost
        chosen[best.name] = best.bits
    reasons = {name: f"; {bits} bits by the average of {limit}" for name, bits in chosen.items()}
    return [entry.widened(chosen[entry.name], reasons[entry.name]) if entry.name in chosen else entry for entry in plan]


def check_average_bits(plan: Sequence[LayerPlan], module: nn.Module, limit: float, widths: Sequence[int]) -> None:
    """Whether `allocate_bits` can meet it by giving layers one of `widths`, before anything is scanned.

    Raises:
        UserError: the limit is below what the plan needs already, or no layer would get more bits than it has.
    """
    layers = with_weights(plan)
    _used([(weight_count(module, entry.name), entry.weight_bits) for entry in layers], limit)
    if all(max(widths) <= min(entry.weight_bits, entry.activation_bits) for entry in layers):
        raise UserError(
            f"quantization.mixed_precision_bits: found {list(widths)}, but all layers have as many bits; give more, "
            "lower quantization.weight_bits, or leave out quantization.average_bits"
        )


def _used(layers: Sequence[tuple[int, int]], limit: float) -> tuple[int, int]:
    """The number of weights of layers (weights, planned bits), and of their bits; those in float count as 8."""
    count = sum(weights for weights, _ in layers)
    used = sum(weights * min(bits, 8) for weights, bits in layers)
    if used > limit * count + 1e-6:
        raise UserError(
            f"quantization.average_bits: {limit} bits, but the layers have {used / count:.2f} on average; raise it, "
            "lower quantization.weight_bits, or leave out some of quantization.eight_bit_roles"
        )
    return count, used


class _Upgrade(NamedTuple):
    """More bits for one layer; the largest is the best."""

    gain: float  # fall of its change for each bit of `cost`
    cost: int  # bits that its weights take besides those they have
    name: str
    bits: int


def _upgrades(entry: Sensitivity, now: int) -> Iterator[_Upgrade]:
    """All ways on from `now` bits (0: the planned ones) that lower the change."""
    changes = {0: entry.planned} | entry.wider
    planned = entry.planned_bits[0]
    for bits, change in entry.wider.items():
        if bits > max(now, min(entry.planned_bits)) and change < changes[now]:
            cost = entry.weights * (max(bits, planned) - max(now, planned))
            yield _Upgrade((changes[now] - change) / max(cost, 1), cost, entry.name, bits)
