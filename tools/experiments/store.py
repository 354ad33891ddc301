"""results/results.csv: one row a run, written by the runner alone, sorted, and checked against the tables."""

import contextlib
import csv
import fcntl
import os
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import ValidationError

from common.cli import parse
from common.config.load import flatten, load_config
from common.config.schema import ExperimentConfig
from common.pipeline.run_dir import FREE_KEYS, FULL, PTQ, TRAINED, predictions_file, results
from common.runtime.errors import UserError
from common.runtime.files import atomic, read_json
from tools.experiments.data import SETS
from tools.experiments.lines import Line, table_lines
from tools.experiments.record import COLUMNS, DIGITS, Result, row_of
from tools.experiments.table import TABLES

RESULTS = Path("results/results.csv")


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
        raise UserError("\n".join(problems))
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
    from common.quantization.description import levels_in_use  # torch takes seconds to import

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
