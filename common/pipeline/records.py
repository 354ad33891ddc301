"""What results.json and environment.json of a run hold, as far as something is computed or shown of it.

Keys may be missing where older versions did not write them, and there may be more.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import ConfigDict, Field, model_validator

from common.checkpoints.strict_json import Strict

FLOAT = 32
Bits = Annotated[int, Field(ge=2, le=FLOAT)]
Metric = float | None  # -1 stands for nothing to measure


class _Record(Strict):
    model_config = ConfigDict(extra="allow")


class _Metrics(_Record):
    """COCO's, of boxes or masks."""

    AP: float
    AP50: Metric = None
    AP75: Metric = None
    AP_small: Metric = None
    AP_medium: Metric = None
    AP_large: Metric = None
    AR100: Metric = None
    AP50_voc07: Metric = None
    per_class: dict[str, Metric] = Field(default_factory=dict)


class _Detector(_Metrics):
    name: str
    weight_bits: Bits
    activation_bits: Bits
    label: str = ""
    predictions_sha256: str | None = None
    detector_sha256: str | None = None


class _Row(_Detector):
    images: int
    image_size: int
    evaluator: str
    segm: _Metrics | None = None


class _Alike(_Detector):
    objects: int


class _Fidelity(_Record):
    rows: list[_Alike] = Field(default_factory=list)
    images: int = 0
    synthetic: bool = False
    files: dict[str, str] = Field(default_factory=dict)
    measured_on: dict[str, Any] = Field(default_factory=dict)


class _Layer(_Record):
    name: str
    role: str
    weight_bits: Bits
    activation_bits: Bits
    reason: str
    weights: int | None = None
    weight_granularity: str = ""
    activation_range: str = ""
    weight_error: float = 0
    output_error: float | None = None
    weight_scale: float = 0
    activation_scale: float = 0
    input_tensor: str = ""

    @model_validator(mode="after")
    def _is_measured(self) -> "_Layer":
        if min(self.weight_bits, self.activation_bits) < FLOAT and self.output_error is None:
            raise ValueError("a quantized layer has an output_error")
        return self


class _Read(_Record):
    stage: str
    files: list[str]


def protocol(settings: Mapping[str, Any] | None) -> str:
    """How images came to the detector in a measurement, from its `measured_on` or a section `evaluation`."""
    found = settings or {}
    size, resize = found.get("image_size"), found.get("resize", "letterbox")
    if size is None:
        return "how the images were resized is not recorded"
    if resize == "stretch":
        return f"images of {size} x {size} pixels, stretched"
    if resize == "shorter_side":
        return f"images with a shorter side of {size} pixels, at most {found.get('longest_side')}"
    padded = "rectangular batches" if found.get("rectangular", True) else "squares"
    return f"images with a longer side of {size} pixels, padded to {padded}"


class Results(_Record):
    """results.json."""

    rows: list[_Row]
    layers: list[_Layer]
    data_read: list[_Read]
    imageset: str | None
    seconds: dict[str, float]
    files: dict[str, dict[str, str]]
    identity: str | None = None
    zero_shot: bool | None = None
    fidelity: _Fidelity | None = None
    measured_on: dict[str, Any] | None = None
    measured_files: dict[str, str] | None = None


class _Place(_Record):
    versions: dict[str, str | None] = Field(default_factory=dict)


class Environment(_Place):
    """environment.json."""

    weights_sha256: Annotated[str, Field(min_length=1)]
    continued_with: list[_Place] = Field(default_factory=list)
    directory: Annotated[str, Field(min_length=1)] | None = None
