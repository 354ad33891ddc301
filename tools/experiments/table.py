"""A table of experiments: models x bits x rows x seeds, as one YAML file of configs/tables/.

Like a configuration it may name one `base:` file beside it. Its keys replace the base's; rows of a name that the base
has replace those, others come after them. Every combination of model, bits, row and seed is a line: one `zsqdet run`.
"""

import difflib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from common.config.load import load_config
from common.config.schema import ExperimentConfig
from common.runtime.errors import UserError
from tools.experiments import data
from tools.experiments.data import SETS

TABLES = Path("configs/tables")

RUNS, SMOKE_RUNS, SMOKE_SET = Path("runs/tables"), Path("runs/smoke"), "shapes_smoke"
# Settings of a toy-sized run.
TOY = (
    *("device=cpu", "synthesis.num_images=4", "synthesis.image_size=64", "synthesis.low_resolution_size=32"),
    *("synthesis.batch_size=2", "synthesis.iterations=2", "synthesis.low_resolution_iterations=4"),
    *("synthesis.label_sampling.every=2", "synthesis.directory=runs/smoke/synthetic"),
    *("quantization.calibration_images=4", "quantization.calibration_batch_size=2", "training.batch_size=2"),
    *("evaluation.image_size=64", "evaluation.batch_size=4", "evaluation.directory=runs/smoke/measured"),
)


def _known_set(name: str) -> str:
    if name not in SETS:
        raise ValueError(f"found {name!r}; allowed: {', '.join(SETS)}")
    return name


def _bits(text: str) -> str:
    if not re.fullmatch("w[2-8]a[2-8]", text):
        raise ValueError(f"found {text!r}; allowed: w2a2 to w8a8, e.g. w4a8 for 4-bit weights and 8-bit inputs")
    return text


Name = Annotated[str, Field(pattern=r"^[\w+.-]+$")]
Bits = Annotated[str, AfterValidator(_bits)]
SetName = Annotated[str, AfterValidator(_known_set)]


class Part(BaseModel):
    """Unknown keys are errors, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(Part):
    """One kind of experiment; `isolates` says what a reader learns from it and from no other row.

    Where it starts with "Against NAME" or "Against the PTQ column of NAME" that row is what it is compared with.
    """

    name: Name
    isolates: str = Field(min_length=20)
    overrides: dict[str, Any] = {}  # dotted key of the experiment -> value
    bits: tuple[Bits, ...] | None = None  # in the place of the table's
    data: SetName | None = None  # in the place of the table's
    real_images: SetName | None = None  # stage one takes these images, with their labels where they have some
    true_labels: SetName | None = None  # stage one takes the labels of this set for its own images


class Model(Part):
    """A configuration, or with `weights` another checkpoint in its place; a name alone is a configuration."""

    config: str
    weights: str | None = None


def _model(value: Any) -> Any:
    return {"config": value} if isinstance(value, str) else value


class Table(Part):
    """`models` maps a name to its configuration; `settings` are overrides of every row."""

    title: str
    paper: str | None = None  # the table of paper_numbers.json to stand beside
    models: dict[Name, Annotated[Model, BeforeValidator(_model)]] = Field(min_length=1)
    bits: tuple[Bits, ...] = Field(min_length=1)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1)
    data: SetName
    settings: dict[str, Any] = {}
    rows: tuple[Row, ...] = Field(min_length=1)


def load_table(path: Path) -> Table:
    """Reads and checks one file.

    Raises:
        UserError: one line for each mistake in it.
    """
    values = _read(path)
    base = values.pop("base", None)
    if base is not None:
        below = _read(path.parent / str(base))
        if "base" in below:
            raise UserError(f"{path}: base: found {base!r}, which has a base itself; name that one")
        values = _over(below, values)
    try:
        table = Table.model_validate(values)
    except ValidationError as error:
        # A list whose items are wrong counts as too short as well.
        found = [one for one in error.errors() if one["type"] != "too_short" or not one["input"]]
        raise UserError(*(f"{path}: {_complaint(one, values)}" for one in found)) from error
    names = [row.name for row in table.rows]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"{path}: rows: found two rows called {twice!r}; give one of them another name")
    return table


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a file of {TABLES}/") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: found no keys; allowed are {', '.join(Table.model_fields)}")
    return values


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    own = {row.get("name"): row for row in _rows(above)}
    names = {row.get("name") for row in _rows(below)}
    rows = [own.get(row.get("name"), row) for row in _rows(below)]
    return below | above | {"rows": rows + [row for name, row in own.items() if name not in names]}


def _rows(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = values.get("rows", [])
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _complaint(problem: Any, values: Mapping[str, Any]) -> str:
    place, known = _place(problem["loc"], values)
    if problem["type"] == "extra_forbidden":
        key = str(problem["loc"][-1])
        near = difflib.get_close_matches(key, known, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        return f"{place}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{place}: missing; every {'row' if known is Row.model_fields else 'table'} needs it"
    message = re.sub(r"^Value error, ", "", problem["msg"])
    found = "" if message.startswith("found ") else f"found {problem['input']!r}; "
    return f"{place}: {found}{message}"


def _place(location: tuple[str | int, ...], values: Mapping[str, Any]) -> tuple[str, Any]:
    """The key to blame, a row by its name, and the keys that are known there."""
    if location[0] != "rows" or len(location) < 3 or not isinstance(location[1], int):
        return ".".join(map(str, location)), Table.model_fields
    row = values["rows"][location[1]]
    name = row.get("name", location[1]) if isinstance(row, dict) else location[1]
    return f"row {name}: {'.'.join(map(str, location[2:]))}", Row.model_fields


@dataclass(frozen=True)
class Line:
    """`words` are KEY=VALUE, with $COCO and the like not expanded."""

    table: str
    name: str  # MODEL/BITS/ROW
    seed: int
    isolates: str
    data: str  # the set that it is evaluated on
    sets: tuple[str, ...]  # all that it reads
    config: str
    weights: str | None  # in the place of the configuration's
    words: tuple[str, ...]
    run_dir: Path

    @property
    def full_name(self) -> str:
        return f"{self.name}/seed{self.seed}"

    @property
    def model(self) -> str:
        """What tells the model: its weights where the table names them, else its configuration."""
        return Path(self.weights or self.config).stem

    @property
    def against(self) -> tuple[str, bool] | None:
        """The name MODEL/BITS/ROW that the line is compared with, and whether with its PTQ column, if it says so."""
        found = re.match(r"Against (the PTQ column of )?([\w+.-]*\w)( \(PTQ\))?", self.isolates)
        if found is None:
            return None
        return f"{self.name.rpartition('/')[0]}/{found[2]}", bool(found[1] or found[3])

    @property
    def command(self) -> str:
        """As one types it: variables are left to the shell."""
        return " ".join(["zsqdet run", self.config, *map(shell_word, self.words)])

    def load(self, values: Mapping[str, str] | None = None) -> ExperimentConfig:
        """The experiment that the line describes, with the variables' folders where they are given.

        Raises:
            UserError: a setting that the schema does not allow.
        """
        try:
            return load_config(Path(self.config), self.expanded(values or {}))
        except UserError as error:
            place = f"{self.table}: {self.name}"
            raise UserError(*(f"{place}: {line}" for line in error.args)) from error

    def expanded(self, values: Mapping[str, str]) -> list[str]:
        return [data.expand(word, values) for word in self.words]


@dataclass(frozen=True)
class _Mode:
    """How all lines of a table are to be made."""

    extra: tuple[str, ...]
    folder: Path
    smoke: bool
    on: str | None  # the set to evaluate on in the place of the table's


def table_lines(
    path: Path, extra: Sequence[str] = (), *, smoke: bool = False, runs: Path | None = None, on: str | None = None
) -> list[Line]:
    """All lines of a table, each checked against the schema of experiments.

    Args:
        path: the table.
        extra: KEY=VALUE for every line.
        smoke: at toy size, with the micro detector of each family on drawn shapes.
        runs: where the run folders go, in a folder named as the table (runs/tables, or runs/smoke).
        on: name of a set to evaluate on in the place of the table's.

    Raises:
        UserError: one line for each mistake in the table or in a row's settings.
    """
    table = load_table(path)
    mode = _Mode(tuple(extra), (runs or (SMOKE_RUNS if smoke else RUNS)) / path.stem, smoke, on)
    lines = [
        _line(path.stem, table, model, row, bits, seed, mode)
        for model in table.models
        for row in table.rows
        for bits in row.bits or table.bits
        for seed in table.seeds
    ]
    problems: dict[str, None] = {}
    for line in lines:
        try:
            line.load()
        except UserError as error:
            problems |= dict.fromkeys(str(error).splitlines())
    if problems:
        raise UserError(*problems)
    return lines


def matching(lines: Sequence[Line], pattern: str) -> list[Line]:
    """Lines whose MODEL/BITS/ROW, with /seedN or without, matches as file names do.

    Raises:
        UserError: none does.
    """
    found = [line for line in lines if fnmatchcase(line.name, pattern) or fnmatchcase(line.full_name, pattern)]
    if not found:
        raise UserError(f"--only: no line of this table is called {pattern!r}; --list shows them all")
    return found


def bits_words(bits: str) -> list[str]:
    """The settings of a bit-width such as w4a8."""
    return [f"bits={bits}"]


def override_words(overrides: Mapping[str, Any]) -> list[str]:
    """KEY=VALUE as on the command line, where values are YAML."""
    return [f"{key}={_text(value)}" for key, value in overrides.items()]


def micro_config(family: str) -> str:
    """The configuration of a family's micro detector.

    Raises:
        UserError: it has none.
    """
    path = Path("configs", family, f"micro_{family}.yaml")
    if not path.is_file():
        raise UserError(f"--smoke: family {family} has no micro detector ({path})")
    return path.as_posix()


def shell_word(word: str) -> str:
    """Quoted for a shell, which replaces variables in it."""
    if "$" not in word:
        return shlex.quote(word)
    return word if re.fullmatch(r"[\w.=$/+-]+", word) else f'"{word}"'


def _line(name: str, table: Table, model: str, row: Row, bits: str, seed: int, mode: _Mode) -> Line:
    at = f"{model}/{bits}/{row.name}"
    shapes = SMOKE_SET if mode.smoke else None
    evaluated = shapes or mode.on or row.data or table.data
    settings = {key: value for key, value in table.settings.items() if not (mode.smoke and key == "weights")}
    config, weights = table.models[model].config, table.models[model].weights
    if mode.smoke:
        config, weights = micro_config(Path(config).parent.name), None
    words = [f"weights={weights}"] if weights else []
    words += [*bits_words(bits), f"seed={seed}", *override_words(settings), *data.evaluation_words(evaluated)]
    sets = [evaluated]
    if row.real_images:
        sets.append(shapes or row.real_images)
        words += data.real_image_words(sets[-1])
    if row.true_labels:
        sets.append(shapes or row.true_labels)
        words += data.true_label_words(sets[-1])
    words += override_words(row.overrides)
    if mode.smoke:
        words += [*TOY, f"training.epochs={min(1, row.overrides.get('training.epochs', 1))}"]
    run_dir = mode.folder / at / f"seed{seed}"
    words += [*mode.extra, f"run_dir={run_dir}"]
    return Line(name, at, seed, row.isolates, evaluated, tuple(sets), config, weights, tuple(words), run_dir)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...").replace(", ", ",")
