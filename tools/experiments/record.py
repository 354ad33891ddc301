"""One run folder as one row of figures, and rows that differ in their seed alone as one with mean and spread."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from common.pipeline.run_dir import FULL, PTQ, TRAINED, results, stored_settings
from common.runtime.errors import UserError
from common.runtime.files import read_json
from tools.experiments.data import SETS
from tools.experiments.lines import Line

AP = float | None
DIGITS = 4
FLOAT = 32  # bits of what is not quantized


class Result(BaseModel):
    """A row: the experiment, what it did and what was measured. AP is from 0 to 1, None where nothing was measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    table: str
    name: str  # MODEL/BITS/ROW
    seed: int = Field(ge=0)
    bits: str = Field(pattern=r"^W\dA\d$")
    quantizer: Literal["lsq", "lsq+"]
    weight_levels: Literal["uniform", "codebook"]
    activation_levels: Literal["uniform", "minifloat"]
    mean_weight_bits: float = Field(ge=2, le=8)  # of the quantized weights
    float_layers: str  # how many of all
    images: str  # of calibration and training: where they come from
    num_images: int = Field(ge=1)
    zero_shot: bool
    evaluated_on: str
    evaluated_images: int | None
    image_size: int
    full_ap: AP
    ptq_ap: AP
    trained_ap: AP
    full_ap50: AP
    ptq_ap50: AP
    trained_ap50: AP
    full_mask_ap: AP
    ptq_mask_ap: AP
    trained_mask_ap: AP
    ptq_fidelity: AP
    trained_fidelity: AP
    evaluator: str | None
    seconds: int = Field(ge=0)  # of all stages, stage one included
    commit: str | None
    command: str

    @property
    def key(self) -> tuple[str, str, int, str]:
        """One row for each of these."""
        return (self.table, self.name, self.seed, self.evaluated_on)


COLUMNS = tuple(Result.model_fields)


def row_of(run: Path, line: Line | None = None) -> Result:
    """The row of a run folder; without `line` it belongs to no table, and its name is the folder's.

    Raises:
        UserError: the folder holds no results.
    """
    from tools.experiments.fidelity import measured_fidelity  # imports pycocotools, which --list does not wait for

    if not (run / "results.json").exists():
        raise UserError(f"{run}: holds no results.json; name folders that `zsqdet run` made")
    stored, config = results(run), stored_settings(run)
    measured = {row["name"]: row for row in stored["rows"]}
    fidelity = measured_fidelity(run) if measured else {}
    metrics: dict[str, Any] = {}
    for prefix, name in (("full", FULL), ("ptq", PTQ), ("trained", TRAINED)):
        row = measured.get(name, {})
        metrics |= {f"{prefix}_ap": _rounded(row.get("AP")), f"{prefix}_ap50": _rounded(row.get("AP50"))}
        metrics[f"{prefix}_mask_ap"] = _rounded(row.get("segm", {}).get("AP"))
    full = measured.get(FULL, {})
    return Result(
        table=line.table if line else "-",
        name=line.name if line else run.name,
        seed=config["seed"],
        **_quantization(run, stored["layers"], config),
        images=_images(config),
        num_images=config["synthesis.num_images"],
        zero_shot=stored["zero_shot"],
        evaluated_on=line.data if line else _set_name(config),
        evaluated_images=full.get("images"),
        image_size=config["evaluation.image_size"],
        **metrics,
        ptq_fidelity=_rounded(fidelity.get(PTQ)),
        trained_fidelity=_rounded(fidelity.get(TRAINED)),
        evaluator=full.get("evaluator"),
        seconds=round(sum(stored["seconds"].values())),
        commit=read_json(run / "environment.json").get("commit"),
        command=line.command if line else f"zsqdet run {run / 'config.yaml'}",
    )


def _quantization(run: Path, layers: list[dict[str, Any]], config: dict[str, Any]) -> dict[str, Any]:
    # These import torch, which --list does not wait for.
    from common.quantization.description import levels_in_use, mean_weight_bits
    from common.reporting.tables import section

    of_weights, of_inputs = levels_in_use(section(config, "quantization"), layers)
    mean = mean_weight_bits(layers)
    if mean is None:
        raise UserError(f"{run}: no layer has quantized weights; there is nothing to record")
    kept = [row["role"] for row in layers if min(row["weight_bits"], row["activation_bits"]) >= FLOAT]
    return {
        "bits": f"W{config['quantization.weight_bits']}A{config['quantization.activation_bits']}",
        "quantizer": config["quantization.quantizer"],
        "weight_levels": of_weights,
        "activation_levels": of_inputs,
        "mean_weight_bits": round(mean, 3),
        "float_layers": f"{len(kept)} of {len(layers)}" + (f": {' '.join(dict.fromkeys(kept))}" if kept else ""),
    }


def _set_name(config: Mapping[str, Any]) -> str:
    """The set that a run is measured on: its name where it is one of ours, else its file."""
    path = config.get("data.dataset") or config.get("data.annotations")
    return next((name for name, one in SETS.items() if one.is_that_of(config)), str(path))


def _images(config: dict[str, Any]) -> str:
    source = config["synthesis.source"]
    if source == "real":
        return "real, labelled" if config["synthesis.labels"] == "true_label" else "real"
    labels = ", true labels" if config["synthesis.labels"] == "true_label" and source == "task" else ""
    return {"task": "synthetic", "batch_norm": "synthetic, statistics alone", "noise": "noise"}[source] + labels


def _rounded(value: float | None) -> float | None:
    """COCO's metrics are -1 where no annotation counts."""
    return None if value is None or value < 0 else round(value, DIGITS)


MEASURED = tuple(
    name for name in Result.model_fields if name.endswith(("_ap", "_ap50", "_fidelity")) and not name.startswith("full")
)


@dataclass(frozen=True)
class Group:
    """`first` stands for what the seeds share; mean and sample standard deviation are None where nothing was measured,
    the deviation with one seed too."""

    first: Result
    seeds: int
    mean: dict[str, float | None]
    deviation: dict[str, float | None]


def grouped(rows: Sequence[Result]) -> list[Group]:
    """One group for each experiment and evaluated set, in the order of the first row of each."""
    found: dict[tuple[str, str, str], list[Result]] = {}
    for row in rows:
        found.setdefault((row.table, row.name, row.evaluated_on), []).append(row)
    return [_group(members) for members in found.values()]


def _group(rows: Sequence[Result]) -> Group:
    mean: dict[str, float | None] = {}
    deviation: dict[str, float | None] = {}
    for name in MEASURED:
        values = [value for row in rows if (value := getattr(row, name)) is not None]
        mean[name] = round(statistics.mean(values), 4) if values else None
        deviation[name] = round(statistics.stdev(values), 4) if len(values) > 1 else None
    return Group(rows[0], len(rows), mean, deviation)
