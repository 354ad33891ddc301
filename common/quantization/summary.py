"""What a quantized detector is called wherever a person reads of it, and its mean bits."""

from collections.abc import Mapping, Sequence
from typing import Any

from common.quantization.attention_inputs import softmax_kind
from common.quantization.policy import FLOAT, UNIFORM_BITS

Row = Mapping[str, Any]
UNIFORM = "uniform"


def bits_label(quantization: Row, layers: Sequence[Row] = ()) -> str:
    """Bits and kind of levels, as "W4A8", "W4A8, codebook weights" or "W4A4, codebook weights, minifloat inputs".

    Uniform levels go without saying. Others are named where some layer has less than 8 bits and so has them.

    Args:
        quantization: the section of a configuration; a key that is missing, as in older runs, counts as uniform.
        layers: rows with `role`, `weight_bits` and `activation_bits`, as in results.json; without them the bits of the
            section and of its `layers` count.
    """
    label = f"W{quantization.get('weight_bits')}A{quantization.get('activation_bits')}"
    for levels, noun in zip(levels_in_use(quantization, layers), ("weights", "inputs"), strict=True):
        label += f", {levels} {noun}" if levels != UNIFORM else ""
    keys = {"softmax_quantizer": "same", "activation_levels": "uniform", "scale_init": "mse"}
    settings = {key: str(quantization.get(key, default)) for key, default in keys.items()}
    attention = [row for row in layers if row.get("role") == "attention_input" and row["activation_bits"] < FLOAT]
    if any(softmax_kind(row["activation_bits"], **settings) != "same" for row in attention):
        label += ", logarithmic attention"
    return label


def levels_in_use(quantization: Row, layers: Sequence[Row] = ()) -> tuple[str, str]:
    """The kinds of levels of weights and inputs that some layer has; arguments as those of `bits_label`."""
    exceptions = quantization.get("layers") or {}
    rows = layers or [quantization, *exceptions.values()]
    kinds = []
    for side in ("weight", "activation"):
        levels = str(quantization.get(f"{side}_levels", UNIFORM))
        bits = [row.get(f"{side}_bits") for row in rows]
        kinds.append(levels if any(number is not None and number < UNIFORM_BITS for number in bits) else UNIFORM)
    return kinds[0], kinds[1]


def mean_weight_bits(layers: Sequence[Row]) -> float | None:
    """The mean bits of all weights that are rounded, from the rows of results.json; None without any.

    A row has `weight_bits` and, where the layer has weights, `weights`, their number.
    """
    rounded = [row for row in layers if row.get("weights") and row["weight_bits"] < FLOAT]
    count = sum(row["weights"] for row in rounded)
    return sum(row["weights"] * row["weight_bits"] for row in rounded) / count if count else None
