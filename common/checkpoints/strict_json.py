"""What a file says about a detector, read strictly: JSON of bounded depth and length, plain values of a Python text,
and names of classes."""

import ast
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from common.runtime.errors import UserError
from common.runtime.files import read_ordinary

log = logging.getLogger("zsqdet")
LONGEST, DEEPEST = 16 << 20, 32  # characters; levels of lists and objects
LONGEST_TEXT = 1_000_000  # characters of a Python text
NOTHING = "nothing of that name"
Schema = TypeVar("Schema", bound=BaseModel)


class Strict(BaseModel):
    """Base of descriptions: values have exactly the stated type, numbers are finite, unknown keys are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text.

    Args:
        text: of any origin.
        where: what the message begins with.

    Raises:
        UserError: no JSON, a key twice in one object, NaN or infinity, too deep or too long.
    """
    try:
        if len(text) > LONGEST:
            raise ValueError(f"longer than {LONGEST} characters")
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
        _measure_depth(value)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{where}: not valid JSON ({reason}); make the file again") from error
    return value


def read_strictly(path: Path) -> Any:
    """The value in a JSON file, as `parse_json` reads it.

    Raises:
        UserError: missing, unreadable or not valid.
    """
    try:
        if path.stat().st_size > 4 * LONGEST:
            raise UserError(f"{path}: far too long for what it should be; make it again")
        return parse_json(read_ordinary(path).decode(), str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); make the file again") from error


def checked(schema: type[Schema], content: Any, where: str, context: Any = None) -> Schema:
    """`content` as an object of `schema`, whose validators get the `context`.

    Raises:
        UserError: one line with the first place that differs, what is there and what is allowed.
    """
    try:
        return schema.model_validate(content, context=context)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the description"
        message = first["msg"].removeprefix("Value error, ")
        found = "nothing" if first["type"] == "missing" else short(first["input"])
        raise UserError(f"{where}: {place[:80]}: found {found}; {message}") from error
    except RecursionError as error:
        raise UserError(f"{where}: nested too deeply") from error


def short(value: Any) -> str:
    """A value for a message: plain ones as they are, containers by their kind."""
    if value is None or isinstance(value, str | int | float):
        text = repr(value[:60] if isinstance(value, str) else value)
        return text if len(text) <= 62 else f"{text[:59]}..."
    return {"list": "a list", "dict": "an object"}.get(type(value).__name__, f"a {type(value).__name__}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)[:60]!r} is given twice")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"found {constant}; allowed are finite numbers")


def _measure_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        level = [item for part in level for item in _items(part)]
        if not level:
            return
    raise ValueError(f"nested deeper than {DEEPEST} levels")


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def class_list(names: Any, where: str) -> list[str]:
    """The names of classes in the order of the outputs, from a list or a dictionary with the keys 0, 1, 2, ...

    Raises:
        UserError: other keys, or names that are no texts.
    """
    rows = names
    if isinstance(names, Mapping):
        try:
            indices = {int(key): name for key, name in names.items()}
        except (TypeError, ValueError):
            indices = {}
        if sorted(indices) != list(range(len(names))):
            raise UserError(f"{where}: the classes have the numbers {short(list(names)[:4])}; needed are 0, 1, 2, ...")
        rows = [indices[i] for i in range(len(indices))]
    if not isinstance(rows, list | tuple) or not rows or not all(isinstance(name, str) for name in rows):
        raise UserError(f"{where}: found {short(names)} as names of classes; needed is a list of texts")
    if odd := [name for name in rows if not name.strip() or "\0" in name]:
        raise UserError(f"{where}: found {short(odd[0])} as the name of a class; needed are letters")
    return _told_apart(list(rows), where)


def _told_apart(names: list[str], where: str) -> list[str]:
    """Classes are known by their names everywhere, so one that has the name of another gets a number behind it."""
    given, counts, found = set(names), dict.fromkeys(names, 0), dict[str, str]()
    for name in names:
        counts[name] += 1
        own = name if counts[name] == 1 else f"{name} ({counts[name]})"
        while own != name and own in given:
            counts[name] += 1
            own = f"{name} ({counts[name]})"
        found[own] = name
    again = [own for own, name in found.items() if own != name]
    if again:
        log.warning("%s: several classes have one name; called apart: %s", where, ", ".join(map(short, again[:5])))
    return list(found)


def distinct(names: list[str]) -> list[str]:
    """For schemas: names of classes, each of its own.

    Raises:
        ValueError: one of them twice.
    """
    again = next((name for name, count in Counter(names).items() if count > 1), None)
    if again is not None:
        raise ValueError(f"{short(again)} is the name of several classes; allowed is one of its own for each")
    return names


def published_names(meta: Mapping[str, Any], where: str) -> list[str]:
    """The names of classes in the `meta` of OpenMMLab's files; empty where there are none.

    mmdet 2.x has `CLASSES`, 3.x has `dataset_meta` with `classes`, of old `CLASSES`.

    Raises:
        UserError: something else under such a key.
    """
    within = meta.get("dataset_meta")
    places = (meta, within if isinstance(within, Mapping) else {})
    found = [place[key] for place in places for key in ("CLASSES", "classes") if place.get(key)]
    return class_list(found[0], f"{where}: its meta") if found else []


def assigned(text: str) -> dict[str, Any]:
    """The values that a Python text assigns to names, or the dictionary that it is. Nothing of it is executed.

    Raises:
        ValueError: neither, or anything else but imports in it.
    """
    try:
        body = ast.parse(text).body if len(text) <= LONGEST_TEXT else []
        if len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Dict | ast.Call):
            found = _value(body[0].value)
        else:
            rows = [_assignment(node) for node in body if not isinstance(node, ast.Import | ast.ImportFrom)]
            found = {name: _value(value) for name, value in rows}
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError("it is no Python text") from error
    if not isinstance(found, dict) or not found:
        raise ValueError("it gives no values to names")
    return found


def _assignment(node: ast.stmt) -> tuple[str, ast.expr]:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    value = getattr(node, "value", None)
    if not isinstance(node, ast.Assign | ast.AnnAssign) or len(targets) > 1 or value is None:
        raise ValueError("it does more than to give values to names")
    if not isinstance(targets[0], ast.Name):
        raise ValueError("it does more than to give values to names")
    return targets[0].id, value


def _value(node: ast.expr) -> Any:
    """A constant, list or dictionary; an empty dictionary for anything else."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        return -node.operand.value if isinstance(node.operand.value, int | float) else {}
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(part) for part in node.elts]
    if isinstance(node, ast.Dict):
        return {k.value: _value(v) for k, v in zip(node.keys, node.values, strict=True) if isinstance(k, ast.Constant)}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        parts = [{word.arg: _value(word.value)} if word.arg else _value(word.value) for word in node.keywords]
        return {key: value for part in parts if isinstance(part, dict) for key, value in part.items()}
    return {}


def differences(
    said: Any, built: Any, default: Callable[[object, str], Any], name: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Name, value and what is built of each setting that differs.

    Args:
        said: what `assigned` gave, in which an empty dictionary stands for what was not read.
        built: nested dictionaries.
        default: of the `type` beside a setting and its name to what holds where `built` leaves it out, or NOTHING.
        name: of both.
    """
    if said == {}:
        return
    if isinstance(said, dict) and isinstance(built, dict):
        for key, value in said.items():
            own = built[key] if key in built else default(built.get("type"), str(key))
            yield from differences(value, own, default, f"{name}.{key}" if name else str(key))
    elif _listed(said) != _listed(built) and not (built is NOTHING and said in (None, False)):
        yield name, said, built


def _listed(value: Any) -> Any:
    return [_listed(part) for part in value] if isinstance(value, list | tuple) else value
