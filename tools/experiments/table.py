"""A table of experiments: models x bits x rows x seeds, as one YAML file of configs/tables/.

Like a configuration it may name one `base:` file beside it. Its keys replace the base's; rows of a name that the base
has replace those, others come after them.
"""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from common.runtime.errors import UserError
from tools.experiments.data import SETS

TABLES = Path("configs/tables")


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


class Table(Part):
    """`models` maps a name to its configuration; `settings` are overrides of every row."""

    title: str
    paper: str | None = None  # the table of paper_numbers.json to stand beside
    models: dict[Name, str] = Field(min_length=1)
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
        raise UserError("\n".join(f"{path}: {_complaint(one, values)}" for one in found)) from error
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
