"""Reads a run folder and its labels for the reports; parts that do not exist yet are empty."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from common.checkpoints.read import load_tensors
from common.detection.coco_json import read_coco
from common.pipeline.run_dir import check_files, environment_of, is_complete, results, stored_settings
from common.quantization.full_placement import tensor_key
from common.runtime.errors import UserError
from common.runtime.files import read_plainly
from common.synthesis.imageset import ImageSet

Row = Mapping[str, Any]


@dataclass(frozen=True)
class ScaleChange:
    """The scales of one quantizer, positive, [channels] or [1]."""

    layer: str
    side: str  # weight or input
    before: Tensor  # after calibration
    after: Tensor  # after training


@dataclass(frozen=True)
class InputRange:
    """Real values that an input quantizer represents after calibration."""

    low: float
    high: float
    zero_point: int | None  # code of 0 among 0 to 2^bits - 1; None for symmetric ranges


@dataclass(frozen=True)
class Contents:
    """A run folder in memory."""

    name: str
    settings: dict[str, Any]  # dotted key -> value, every key
    environment: Row
    results: Row  # as common.pipeline.run_dir.results gives it
    history: list[Row]  # of training, one row per epoch
    images: ImageSet | None
    images_missing: str  # why there is no image set, else ""
    scales: list[ScaleChange]  # empty unless both checkpoints are complete
    input_ranges: dict[str, InputRange]  # by layer; empty without the PTQ checkpoint
    sizes: dict[str, int]  # layer -> number of weights; empty without the PTQ checkpoint
    is_trained: bool  # whether the final checkpoint exists


def gather(run: Path) -> Contents:
    """Reads a run folder.

    Raises:
        UserError: it is not one, or a file in it is damaged.
    """
    settings = stored_settings(run)
    stored = results(run)
    check_files(run)
    images, missing = _images(stored["imageset"])
    before, after = (
        load_tensors(run / name / "model.safetensors")[0] if is_complete(run / name) else {}
        for name in ("ptq", "quantized")
    )
    names = [layer["name"] for layer in stored["layers"]]
    return Contents(
        name=run.resolve().name,
        settings=settings,
        environment=environment_of(run),
        results=stored,
        history=_history(run / "training" / "history.jsonl"),
        images=images,
        images_missing=missing,
        scales=_scales(stored["layers"], before, after),
        input_ranges=_input_ranges(stored["layers"], before),
        sizes={name: before[f"{name}.weight"].numel() for name in names if f"{name}.weight" in before},
        is_trained=bool(after),
    )


def _images(directory: str | None) -> tuple[ImageSet | None, str]:
    if directory is None:
        return None, "stage one has not finished"
    try:
        return ImageSet(Path(directory)), ""
    except UserError as error:
        return None, str(error)


def _history(path: Path) -> list[Row]:
    try:
        lines = read_plainly(path).splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a training history ({error}); rerun `zsqdet run`, it is made again") from error
    if not all(
        isinstance(row, dict) and all(v is None or type(v) in (int, float) for v in row.values()) for row in rows
    ):
        raise UserError(f"{path}: not a training history; rerun `zsqdet run`, it is made again")
    return rows


def _of_input(layer: Row) -> str:
    """Where the state of the quantizer of a layer's input is: its own one, or that of the tensor that it reads."""
    tensor = layer.get("input_tensor")
    return f"tensor_quantizers.{tensor_key(tensor)}" if tensor else f"{layer['name']}.input_quantizer"


def _scales(layers: Sequence[Row], before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[ScaleChange]:
    """Scales of both checkpoints in the order of the layers, as magnitudes, since quantizers use |scale|."""
    found = []
    for layer in layers:
        places = {"weight": f"{layer['name']}.weight_quantizer", "input": _of_input(layer)}
        for side, key in ((side, f"{place}.scale") for side, place in places.items()):
            if key in before and key in after:
                values = (state[key].abs().flatten() for state in (before, after))
                found.append(ScaleChange(layer["name"], side, *values))
    return found


def _input_ranges(layers: Sequence[Row], state: Mapping[str, Tensor]) -> dict[str, InputRange]:
    """The range of every uniform or minifloat input quantizer, from its scale and its lowest and highest code."""
    found = {}
    for layer in layers:
        name, kind = layer["name"], layer.get("activation_range")
        prefix = _of_input(layer)
        if kind is None or kind == "logarithmic" or f"{prefix}._extra_state" not in state:
            continue
        low, high = state[f"{prefix}._extra_state"].tolist()[:2]
        scale = state[f"{prefix}.scale"].abs().mean().item()
        offset = state[f"{prefix}.offset"].item() if f"{prefix}.offset" in state else 0.0
        found[name] = InputRange(low * scale + offset, high * scale + offset, None if kind == "symmetric" else -low)
    return found


@dataclass(frozen=True)
class Boxes:
    """All boxes of a dataset. Coordinates are fractions of the image sides."""

    name: str
    images: int
    labels: np.ndarray  # [n] class index, -1 for a class that the detector does not have
    centres: np.ndarray  # [n, 2] xy
    sizes: np.ndarray  # [n] sqrt(box area / image area)
    counts: np.ndarray  # [images] boxes per image

    @property
    def boxes(self) -> int:
        """Number of boxes."""
        return len(self.labels)

    @property
    def per_image(self) -> float:
        """Mean number of boxes per image."""
        return self.boxes / max(self.images, 1)


def boxes_of_coco(path: Path, class_names: Sequence[str], name: str | None = None) -> Boxes:
    """The boxes of a COCO file without crowds; classes are matched by name. `name` is shown in the charts.

    Raises:
        UserError: not a COCO detection file.
    """
    coco = read_coco(path, may_be_empty=True)
    sizes = {image["id"]: (image["width"], image["height"]) for image in coco.images}
    places = {name: i for i, name in enumerate(class_names)}
    labels = {category["id"]: places.get(category["name"], -1) for category in coco.categories}
    counts = dict.fromkeys(sizes, 0)
    rows = []
    for annotation in coco.annotations:
        if annotation["iscrowd"]:
            continue
        width, height = sizes[annotation["image_id"]]
        x, y, w, h = annotation["bbox"]
        counts[annotation["image_id"]] += 1
        rows.append([x / width, y / height, (x + w) / width, (y + h) / height, labels[annotation["category_id"]]])
    return _boxes(name or path.name, rows, list(counts.values()))


def _boxes(name: str, rows: list[list[float]], counts: list[int]) -> Boxes:
    table = np.array(rows, dtype=float).reshape(-1, 5)
    sides = (table[:, 2:4] - table[:, :2]).clip(min=0)
    centres = (table[:, :2] + table[:, 2:4]) / 2
    return Boxes(name, len(counts), table[:, 4].astype(int), centres, np.sqrt(sides.prod(1)), np.array(counts))
