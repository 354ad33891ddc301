"""Rows of the report's tables, and number formats."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config.reference import known_keys
from common.pipeline.run_dir import FREE_KEYS, FULL, PTQ, TRAINED
from common.quantization.convert import bits_label, mean_weight_bits
from common.quantization.sensitivity import Sensitivity
from common.reporting.run_data import Contents, Row, ScaleChange

METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR100")
TITLES = {FULL: "Full precision", PTQ: "PTQ", TRAINED: "QAT"}
FLOAT = 32  # bits of what is not quantized
NO_OBJECTS = "full precision detects no object in these images"
FEW = 50  # objects, of which one lost or found moves fidelity by some hundredths
ROUGH = "rough, since there are few"
SMALLEST_LOSS = 0.005  # of a metric: below it, the share that training recovered says little


@dataclass(frozen=True)
class Cell:
    """A metric and its difference to full precision; None if not available."""

    value: float | None
    difference: float | None


@dataclass(frozen=True)
class Headline:
    """`shares`: for each metric what training recovered of what calibration lost; None without all three rows."""

    rows: list[tuple[Row, list[Cell]]]
    shares: list[float | None] | None


@dataclass(frozen=True)
class Setting:
    name: str
    value: Any
    default: Any
    meaning: str
    differs: bool


def headline(rows: Sequence[Row]) -> Headline:
    """All metrics of every evaluated detector."""
    by_name = {row["name"]: row for row in rows}
    full = by_name.get(FULL, {})
    cells = [(row, [cell(row, full, metric) for metric in METRICS]) for row in rows]
    complete = {FULL, PTQ, TRAINED} <= by_name.keys()
    return Headline(cells, [_share(by_name, metric) for metric in METRICS] if complete else None)


def of_masks(rows: Sequence[Row]) -> list[Row]:
    """The rows with mask metrics instead of box metrics; empty without masks."""
    if not all("segm" in row for row in rows):
        return []
    return [{**row, **row["segm"]} for row in rows]


def per_class(rows: Sequence[Row]) -> list[tuple[str, list[Cell]]]:
    """AP per class and detector; largest drop in the last detector first."""
    full = rows[0].get("per_class", {}) if rows else {}
    classes = [(name, [cell(row.get("per_class", {}), full, name) for row in rows]) for name in full]
    return sorted(classes, key=lambda entry: entry[1][-1].difference or 0.0)


def result_lines(found: dict[str, Any]) -> Iterator[str]:
    """AP and fidelity of each detector of results.json, as text."""
    for row in found["rows"]:
        mask = f"  AP of masks {metric(measured(row['segm']['AP']))}" if "segm" in row else ""
        yield f"{row['name']:<15} {label_of_row(row)}  AP {metric(measured(row['AP']))}{mask}"
    alike = found.get("fidelity", {})
    for row in alike.get("rows", []):
        objects = row["objects"]
        value = f"{metric(measured(row['AP']))} ({objects} objects)" if objects else f"not measured: {NO_OBJECTS}"
        few = f": {ROUGH}" if 0 < objects < FEW else ""
        yield f"{row['name']:<15} {label_of_row(row)}  fidelity {value}{few}"
    if not found["rows"] and any(0 < row["objects"] < FEW for row in alike.get("rows", [])):
        images = "images of yours, which need no labels" if alike.get("synthetic") else "more images"
        yield f"a better estimate: give {images}, with data.images=DIR"


def kind_of_images(fidelity: Row) -> str:
    """On what a fidelity of results.json was measured, to stand after the number of images."""
    return "held-out synthetic images" if fidelity.get("synthetic") else "images of data.images"


def metric_lines(metrics: Row) -> Iterator[str]:
    """COCO's metrics of one detector, or its fidelity by each, as text; "n/a" where there are no annotations."""
    kind = "fidelity" if metrics.get("fidelity") else "AP"
    for name in (*METRICS, "AP50_voc07"):
        mask = f"   masks {metric(measured(metrics['segm'][name]))}" if "segm" in metrics else ""
        yield f"{name.replace('AP', kind):<{len(kind) + 8}} {metric(measured(metrics[name]))}{mask}"


def fidelity_lines(metrics: Row) -> list[str]:
    """What a fidelity is measured by, and that of each class, lowest first."""
    counts = f"{metrics['objects']} full-precision detections in {metrics['images']} images"
    classes = sorted(metrics["per_class"].items(), key=lambda entry: entry[1])
    return [f"fidelity: {counts} are the ground truth", *(f"  {value:.4f}  {name}" for name, value in classes)]


def settings(values: dict[str, Any]) -> list[Setting]:
    """Every key with its default. Keys without default and paths never count as different."""
    found = []
    for name, value in values.items():
        key = known_keys().get(name)
        default = key.default if key else None
        differs = name not in FREE_KEYS and value != default
        found.append(Setting(name, value, default, key.meaning if key else "unknown to this version", differs))
    return found


def is_float(layer: Row) -> bool:
    """Whether neither weights nor input of a layer are quantized."""
    return min(layer["weight_bits"], layer["activation_bits"]) >= FLOAT


def kept_in_float(layers: Sequence[Row]) -> dict[str, list[str]]:
    """Reason -> names of the layers in float."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        if is_float(layer):
            groups.setdefault(layer["reason"], []).append(layer["name"])
    return groups


def quantized_groups(layers: Sequence[Row], sizes: dict[str, int]) -> list[tuple[str, int, float | None]]:
    """For each combination of bits, most layers first, float last: label, number of layers, fraction of all weights."""
    total = sum(sizes.values())
    groups: dict[str, list[str]] = {}
    for layer in layers:
        label = "float" if is_float(layer) else f"W{layer['weight_bits']}A{layer['activation_bits']}"
        groups.setdefault(label, []).append(layer["name"])
    counted = [
        (label, len(names), sum(sizes.get(n, 0) for n in names) / total if total else None)
        for label, names in groups.items()
    ]
    return sorted(counted, key=lambda entry: (entry[0] == "float", -entry[1]))


def mean_change(change: ScaleChange) -> float:
    """The relative change of the mean scale; 0.1 is 10 % larger after training."""
    return float(change.after.mean() / change.before.mean()) - 1


def label_of_run(run: Contents) -> str:
    """Bits, kind of levels and, where layers differ in their bits, the mean bits of the weights."""
    label = bits_label(section(run.settings, "quantization"), run.results["layers"])
    mean = mean_weight_bits(run.results["layers"])
    planned = run.settings.get("quantization.weight_bits")
    return label if mean is None or mean == planned else f"{label} ({mean:.2f} bits per weight on average)"


def section(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """The keys of a section, without its name before them, of dotted settings."""
    return {key.removeprefix(f"{name}."): value for key, value in settings.items() if key.startswith(f"{name}.")}


def label_of_row(row: Row) -> str:
    """Bits and kind of levels of a measured detector; rows of older runs have the bits alone."""
    plain = "float" if row["weight_bits"] >= FLOAT else f"W{row['weight_bits']}A{row['activation_bits']}"
    return str(row.get("label", plain))


def bits(number: int) -> str:
    return "float" if number >= FLOAT else str(number)


def basename(path: object) -> str:
    return Path(str(path)).name


def title_of(row: str) -> str:
    """Column title of a row of results.json."""
    return TITLES.get(row, row)


def metric(value: float | None) -> str:
    """Four decimals; "n/a" for None, which stands for COCO's -1 (no annotations)."""
    return "n/a" if value is None else f"{value:.4f}"


def signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "\N{MINUS SIGN}")


def percent(value: float) -> str:
    return f"{value * 100:.0f} %".replace("-", "\N{MINUS SIGN}")


def significant(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}") if math.isfinite(value) else str(value)


def decibels(error: float) -> str:
    """A relative squared error as signal-to-quantization-noise ratio."""
    return f"{-10 * math.log10(error):.1f} dB" if error > 0 else "\N{INFINITY} dB"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def plain(value: Any) -> str:
    """A setting in YAML flow style."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(plain, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {plain(inner)}" for name, inner in value.items()) + "}"
    return str(value)


def cell(row: Row, full: Row, key: str) -> Cell:
    """A metric of `row` and its difference to `full`; no difference for `full` itself."""
    value, reference = (measured(source.get(key)) for source in (row, full))
    if value is None or reference is None or row is full:
        return Cell(value, None)
    return Cell(value, value - reference)


def measured(value: float | None) -> float | None:
    """None if missing or COCO's -1."""
    return None if value is None or value < 0 else float(value)


def _share(rows: dict[str, Row], key: str) -> float | None:
    full, ptq, trained = (measured(rows[name].get(key)) for name in (FULL, PTQ, TRAINED))
    if full is None or ptq is None or trained is None or full - ptq < SMALLEST_LOSS:
        return None
    return (trained - ptq) / (full - ptq)


def sensitivity_lines(found: Sequence[Sensitivity]) -> Iterator[str]:
    """A table as text, the most sensitive layers first."""
    wider = [f"at {bits} bits" for bits in (found[0].wider if found else ())]
    yield " ".join([f"{'change':>10}", *(f"{head:>10}" for head in wider), f"{'weights':>9}  bits   layer"])
    for entry in sorted(found, key=lambda entry: entry.planned, reverse=True):
        changes = " ".join(f"{change:>10.3g}" for change in (entry.planned, *entry.wider.values()))
        bits = "W{}A{}".format(*entry.planned_bits)
        yield f"{changes} {entry.weights:>9}  {bits:<6} {entry.name} ({entry.role})"
