"""The lines of a table: every combination of model, bits, row and seed is one `zsqdet run`."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from common.config.load import load_config
from common.config.schema import ExperimentConfig
from common.runtime.errors import UserError
from tools.experiments import data
from tools.experiments.table import Row, Table, load_table

RUNS, SMOKE_RUNS, SMOKE_SET = Path("runs/tables"), Path("runs/smoke"), "shapes_smoke"
# Settings of a toy-sized run.
TOY = (
    *("device=cpu", "synthesis.num_images=4", "synthesis.image_size=64", "synthesis.low_resolution_size=32"),
    *("synthesis.batch_size=2", "synthesis.iterations=2", "synthesis.low_resolution_iterations=4"),
    *("synthesis.label_sampling.every=2", "synthesis.directory=runs/smoke/synthetic"),
    *("quantization.calibration_images=4", "quantization.calibration_batch_size=2", "training.batch_size=2"),
    *("evaluation.image_size=64", "evaluation.batch_size=4", "evaluation.directory=runs/smoke/measured"),
)


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
    words: tuple[str, ...]
    run_dir: Path

    @property
    def full_name(self) -> str:
        return f"{self.name}/seed{self.seed}"

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
            raise UserError("\n".join(f"{place}: {line}" for line in str(error).splitlines())) from error

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
        raise UserError("\n".join(problems))
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
    words = [*bits_words(bits), f"seed={seed}", *override_words(settings), *data.evaluation_words(evaluated)]
    sets = [evaluated]
    if row.real_images:
        sets.append(shapes or row.real_images)
        words += data.real_image_words(sets[-1])
    if row.true_labels:
        sets.append(shapes or row.true_labels)
        words += data.true_label_words(sets[-1])
    words += override_words(row.overrides)
    config = table.models[model]
    if mode.smoke:
        config = micro_config(Path(config).parent.name)
        words += [*TOY, f"training.epochs={min(1, row.overrides.get('training.epochs', 1))}"]
    run_dir = mode.folder / at / f"seed{seed}"
    words += [*mode.extra, f"run_dir={run_dir}"]
    return Line(name, at, seed, row.isolates, evaluated, tuple(sets), config, tuple(words), run_dir)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...").replace(", ", ",")
