"""Kinds of values that the schema is made of, with their bounds, and what all its sections refuse."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Preset = Literal["default", "paper"]
Bits = Annotated[int, Field(ge=2, le=8)]
Rate = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1_000_000)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]  # train2017 has 118287 images
Steps = Annotated[int, Field(ge=0, le=1_000_000)]
BatchSize = Annotated[int, Field(ge=1, le=4096)]
Pixels = Annotated[int, Field(ge=32, le=8192)]
Zoom = Annotated[float, Field(ge=0.1, le=10)]
Fraction = Annotated[float, Field(ge=0, le=1)]


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


def _check_text(text: str, is_path: bool) -> None:
    """Refuses what no file system takes (limits of Linux), before hours of work meet it."""
    if not text or "\0" in text:
        raise PydanticCustomError("kind", "a text without NUL")
    size = max(len(part.encode(errors="surrogateescape")) for part in text.split("/"))
    if is_path and (size > 255 or len(text) > 4000):
        raise ValueError(
            f"found a path of {len(text)} characters, the longest name in it {size}; allowed: 4000 and 255"
        )
