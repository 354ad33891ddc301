"""quantization.json, read against a schema: whatever it says is checked before anything is built from it."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from common.checkpoints.description import Strict, checked, read_strictly
from common.config.schema import QuantizationConfig
from common.detection.types import LayerPolicy, Role
from common.quantization.placement import Placement
from common.quantization.policy import FLOAT, LayerPlan
from common.runtime.errors import UserError

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
    return checked(Description, read_strictly(path), f"{path}: damaged quantized checkpoint")


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
