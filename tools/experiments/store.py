"""results/results.csv: one row a run, written by the runner alone, sorted, and checked against the tables.

A row is what a run folder says; rows that differ in their seed alone are one group with mean and spread.
"""

import contextlib
import csv
import fcntl
import os
import shlex
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.cli import parse
from common.config.load import flatten, load_config
from common.config.schema import ExperimentConfig
from common.pipeline.run_dir import FREE_KEYS, FULL, PTQ, TRAINED, predictions_file, results, stored_settings
from common.runtime.errors import UserError
from common.runtime.files import atomic, read_json
from tools.experiments.data import SETS
from tools.experiments.table import TABLES, Line, table_lines

AP = float | None
DIGITS = 4
FLOAT = 32  # bits of what is not quantized

RESULTS = Path("results/results.csv")


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
    from common.quantization.convert import levels_in_use, mean_weight_bits
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


def read(path: Path) -> list[Result]:
    """All rows; none where there is no file.

    Raises:
        UserError: one line for each row that is not one.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise UserError(f"{path}: found columns {reader.fieldnames}; needed are {', '.join(COLUMNS)}")
        rows, problems = [], []
        for number, values in enumerate(reader, 2):
            try:
                rows.append(Result.model_validate({name: value or None for name, value in values.items()}))
            except ValidationError as error:
                problems += [f"{path}:{number}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    if problems:
        raise UserError(*problems)
    return rows


def put(path: Path, row: Result) -> None:
    """Adds a row, in the place of the one with the same key. Several runners may do so at once."""
    with _locked(path):
        write(path, {one.key: one for one in [*read(path), row]}.values())


def write(path: Path, rows: Iterable[Result]) -> None:
    """Replaces the file, atomically; the same rows always make the same bytes."""
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.model_dump() for row in sorted(rows, key=lambda row: row.key))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The folder itself is locked, so that no file is left there; the lock goes with the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def check(path: Path, tables: Path = TABLES, rescore: bool = False) -> Iterator[str]:
    """What is wrong with the rows: each is a line of its table with its settings, and says what its run folder says,
    where that is still there. With `rescore` AP is computed anew from the predictions there, in seconds a row.

    Raises:
        UserError: the file or a table cannot be read.
    """
    known: dict[str, dict[tuple[str, int], Line]] = {}
    keys = set()
    for row in read(path):
        place = f"{path}: {row.table} {row.name} seed {row.seed}"
        if row.key in keys:
            yield f"{place}: is there twice; keep one"
        keys.add(row.key)
        file = tables / f"{row.table}.yaml"
        if row.table not in known:
            lines = table_lines(file) if file.exists() else []
            known[row.table] = {(line.name, line.seed): line for line in lines}
        line = known[row.table].get((row.name, row.seed))
        if line is None:
            yield f"{place}: {file} has no such line; remove the row, or mend the table"
            continue
        yield from (f"{place}: {problem}" for problem in _check_row(row, line, rescore))


def _check_row(row: Result, line: Line, rescore: bool) -> Iterator[str]:
    try:
        config = parsed(row.command)
    except UserError as error:
        yield from (f"command: {problem}" for problem in str(error).splitlines())
        return
    wanted = line.load()
    mine, theirs = (dict(flatten(c.model_dump(mode="json"))) for c in (config, wanted))
    for key in mine:
        if key not in FREE_KEYS and mine[key] != theirs[key]:
            yield f"command: {key} is {mine[key]}; the table has {theirs[key]}; run the line again"
    from common.quantization.convert import levels_in_use  # torch takes seconds to import

    levels = levels_in_use(config.quantization.model_dump(mode="json"))  # at 8 bits all are uniform
    if (row.weight_levels, row.activation_levels) != levels:
        yield f"levels: found {row.weight_levels}, {row.activation_levels}; its command has {', '.join(levels)}"
    here = SETS.get(row.evaluated_on)
    if here is None or not here.is_that_of(mine):
        there = config.data.dataset or config.data.annotations
        yield f"evaluated_on: found {row.evaluated_on}; its command has {there}"
    yield from _check_figures(row, line, config)
    if rescore:
        yield from _check_scores(row, config)


def _check_figures(row: Result, line: Line, config: ExperimentConfig) -> Iterator[str]:
    """Compares with the run folder, where it is on this machine and measured on the same set."""
    measured_on = results(config.run_dir).get("measured_on") or {}
    key, path = ("dataset", config.data.dataset) if config.data.dataset else ("annotations", config.data.annotations)
    if Path(measured_on.get(key, "")).name == Path(str(path)).name:
        again = row_of(config.run_dir, line).model_dump(exclude={"command", "evaluated_on"})
        for name, value in again.items():
            if getattr(row, name) != value:
                yield f"{name}: found {getattr(row, name)}; {config.run_dir} has {value}; run the line again"


def _check_scores(row: Result, config: ExperimentConfig) -> Iterator[str]:
    """Compares AP of boxes with that of the predictions in the run folder, where they are there."""
    from common.detection.average_precision import score  # imports pycocotools
    from common.detection.coco_json import read_coco

    measured_on = results(config.run_dir).get("measured_on") or {}
    annotations = Path(measured_on.get("annotations") or "")
    if not annotations.is_file():
        return
    content = read_coco(annotations, masks=True, to_score=True).content
    for name, value in ((FULL, row.full_ap), (PTQ, row.ptq_ap), (TRAINED, row.trained_ap)):
        file = predictions_file(config.run_dir, name)
        if value is not None and file.exists():
            again = round(score(content, read_json(file))["AP"], DIGITS)
            if again != value:
                yield f"{name}: AP {value}; its predictions in {config.run_dir} have {again}; run the line again"


def parsed(command: str) -> ExperimentConfig:
    """The experiment of a recorded command, read by today's command line and schema.

    Raises:
        UserError: not a `zsqdet run`, or settings that are not allowed.
    """
    words = shlex.split(command)
    if words[:2] != ["zsqdet", "run"] or len(words) < 3:
        raise UserError(f"found {command!r}; allowed: zsqdet run CONFIG KEY=VALUE ...")
    arguments = parse(words[1:])
    return load_config(arguments.config, arguments.overrides)
