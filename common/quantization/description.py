"""quantization.json, read against a schema before anything is built from it; and the name of a quantized detector."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from common.checkpoints.description import Strict, checked, read_strictly
from common.config.schema import QuantizationConfig
from common.detection.types import LayerPolicy, Role
from common.quantization.layers import softmax_kind
from common.quantization.placement import Placement
from common.quantization.policy import FLOAT, UNIFORM_BITS, LayerPlan
from common.runtime.errors import UserError
from common.runtime.files import is_unchanged

Row = Mapping[str, Any]
UNIFORM = "uniform"
DESCRIPTION = "quantization.json"
Bits = Annotated[int, Field(ge=2, le=FLOAT)]
Name = Annotated[str, Field(min_length=1, max_length=300)]


class _Layer(Strict):
    name: Name
    role: Role
    weight_bits: Bits
    activation_bits: Bits
    reason: Annotated[str, Field(max_length=2000)]


class _Placement(Strict):
    """Of quantizers, as `placement.Placement` has it."""

    shared: dict[Name, Name] = Field(max_length=20_000)
    tensors: dict[Name, Literal["plain", "silu", "sigmoid"]] = Field(max_length=20_000)
    covered: list[Name] = Field(max_length=20_000)


class Description(Strict):
    """What a quantized detector is; `architecture` is checked by the adapter of the family."""

    model_config = ConfigDict(extra="ignore")

    family: Annotated[str, Field(min_length=1, max_length=80)]
    architecture: dict[str, Any]
    quantization: dict[str, Any]
    layers: Annotated[list[_Layer], Field(max_length=20_000)]
    placement: _Placement

    @property
    def placed(self) -> Placement:
        """Which quantizers are shared, and which stand between layers."""
        return Placement(**self.placement.model_dump())

    @property
    def plan(self) -> list[LayerPlan]:
        """What became of each layer."""
        return [LayerPlan(**entry.model_dump()) for entry in self.layers]


def read_description(directory: Path) -> Description:
    """What quantization.json in a folder of `save_quantized` says.

    Raises:
        UserError: missing or damaged.
    """
    path = directory / DESCRIPTION
    content = read_strictly(path)
    if isinstance(content, dict) and not is_unchanged(content):
        raise UserError(f"{path}: damaged quantized checkpoint (its SHA-256 is not the recorded one); make it again")
    return checked(Description, content, f"{path}: damaged quantized checkpoint")


def read_config(description: Description, directory: Path) -> QuantizationConfig:
    """Its settings.

    Raises:
        UserError: settings that there are not.
    """
    where = f"{directory / DESCRIPTION}: damaged quantized checkpoint"
    return checked(QuantizationConfig, description.quantization, where)


def check_plan(description: Description, policy: list[LayerPolicy]) -> None:
    """Compares the layers with those of the rebuilt detector.

    Raises:
        UserError: others, in another order, or with another role.
    """
    found, wanted = ([(entry.name, entry.role) for entry in rows] for rows in (description.layers, policy))
    if found != wanted:
        pairs = zip([*found, *wanted[len(found) :]], [*wanted, *found[len(wanted) :]], strict=True)
        name = next((f[0] for f, w in pairs if f != w), wanted[-1][0])
        raise UserError(f"its layers are not those of the detector, the first one at {name[:80]}")


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
        fp8 = "fp8 " if levels == "codebook" and quantization.get("codebook") == "fp8" else ""
        label += f", {fp8}{levels} {noun}" if levels != UNIFORM else ""
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
