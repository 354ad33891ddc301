"""Kinds of values that the schema and the command's options are made of, with their bounds."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from common.checkpoints.rcnn_architecture import Size
from common.config.presets import with_preset

Preset = Literal["default", "quick", "paper"]
Bits = Annotated[int, Field(ge=2, le=8)]
LayerWidth = Literal[2, 3, 4, 5, 6, 7, 8, 32]  # 32 is float
Rate = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0, le=1_000_000)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]  # train2017 has 118287 images
Steps = Annotated[int, Field(ge=0, le=1_000_000)]
BatchSize = Annotated[int, Field(ge=1, le=4096)]
Pixels = Annotated[int, Field(ge=32, le=8192)]
Zoom = Annotated[float, Field(ge=0.1, le=10)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Sides = tuple[Size, ...]

CONTRADICTIONS = (  # a key and its value, another key, what that may be then, and why
    ("scale_init", "lsq", "weight_levels", ("uniform",), "is a formula for uniform levels"),
    ("scale_init", "lsq", "activation_levels", ("uniform",), "is a formula for uniform levels"),
    ("scale_init", "lsq", "activation_range", ("auto", "symmetric", "unsigned"), "finds no zero point"),
    ("scale_init", "lsq", "softmax_quantizer", ("auto", "same"), "is a formula for uniform levels"),
    ("codebook", "fp8", "weight_levels", ("codebook",), "are entries of codebooks"),
    ("quantizer", "lsq+", "activation_levels", ("uniform",), "learns an offset, which a minifloat grid has not"),
    ("activation_levels", "minifloat", "activation_range", ("auto", "symmetric", "unsigned"), "has no zero point"),
    ("concat_scales", "shared", "profile", ("full",), "is about the tensors between layers"),
    ("profile", "full", "activation_levels", ("uniform",), "has 8-bit integers between layers"),
    ("profile", "full", "quantizer", ("lsq",), "has integer zero points"),
    ("profile", "full", "scale_init", ("mse",), "has zero points, which that formula does not find"),
)
OLD_VALUES = {  # of version 0.1, for an error that names the new one
    **{"signed": "symmetric", "affine": "asymmetric"},
    "lut": "weight_levels=codebook activation_levels=minifloat",
}


class Section(BaseModel):
    """Unknown keys are errors, values are checked and finite, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _of_its_kind(cls, value: Any, info: ValidationInfo) -> Any:
        """`true` is no number and 1 is not `true`, though Python takes either for the other; a path can be a path."""
        wanted = cls.model_fields[str(info.field_name)].annotation
        items = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(item, bool) != (wanted is bool) for item in items):
            raise PydanticCustomError("kind", "true or false, and only there")
        if wanted in (Path, Path | None, str, str | None) and value is not None:
            _check_text(str(value), is_path=wanted in (Path, Path | None))
        return value


class PresetSection(Section):
    """A section whose key `preset` names values of presets.py under those that are given."""

    presets_of: ClassVar[str]  # the name of the section

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        return with_preset(cls.presets_of, values)


def _check_text(text: str, is_path: bool) -> None:
    """Refuses what no file system takes (limits of Linux), before hours of work meet it."""
    if not text or "\0" in text:
        raise PydanticCustomError("kind", "a text without NUL")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # config.yaml could not hold it
        raise ValueError("found a name that is not UTF-8; allowed: one that is") from error
    size = max(len(part.encode()) for part in text.split("/"))
    if is_path and (size > 255 or len(text) > 4000):
        raise ValueError(
            f"found a path of {len(text)} characters, the longest name in it {size}; allowed: 4000 and 255"
        )


def whole(low: int, high: int) -> Callable[[str], int]:
    """A reader of options: whole numbers within bounds."""

    def read(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"found {text!r}; allowed: a whole number from {low} to {high}")
        return int(text)

    return read


def sides(text: str) -> tuple[int, int]:
    """Reads an option: pixels, height and width."""
    found = text.lower().split("x")
    if len(found) not in (1, 2) or not all(side.isdecimal() and 0 < int(side) <= 8192 for side in found):
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed: pixels, as 640 or 480x640 (height x width)")
    return int(found[0]), int(found[-1])


def fraction(text: str) -> float:
    """Reads an option: a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed: a number from 0 to 1")
    return value
