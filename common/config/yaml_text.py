"""Reads YAML as people write it in settings: a few plain lines, each key once, nothing that grows when it is read."""

import copy
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from common.runtime.errors import UserError
from common.runtime.files import open_ordinary

MAX_BYTES = 200_000  # a file of settings has about 5000
MAX_DEPTH = 20  # the schema needs 4
_TEXT, _WHOLE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:int"


class _Loader(yaml.SafeLoader):
    """PyYAML's, which follows YAML 1.1, without its numbers that people do not mean: 010 is 8 there, and 1:30 is 90."""


def _number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    if ":" in node.value or (node.tag == _WHOLE and re.fullmatch(r"[-+]?0[0-9_]+", node.value)):
        problem = f"found {node.value}, which YAML reads as octal or base 60; write a plain number, or quote a text"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    read = loader.construct_yaml_int if node.tag == _WHOLE else loader.construct_yaml_float
    return read(node)


_Loader.add_constructor(_WHOLE, _number)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)


def read_text(path: Path, most: int = MAX_BYTES) -> str:
    """The text of a file of settings, of at most so many bytes.

    Raises:
        UserError: it cannot be read, is no UTF-8 text, or is far too long for settings.
    """
    try:
        with open_ordinary(path) as stream:
            content = stream.read(most + 1)
    except OSError as error:
        of_run = isinstance(error, IsADirectoryError) and (path / "config.yaml").is_file()
        file = f"e.g. {path / 'config.yaml'}" if of_run else "e.g. from configs/"
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give a checkpoint or a YAML file, {file}"
        ) from error
    except ValueError as error:  # a NUL in the name
        raise UserError(f"{str(path)!r}: cannot be read ({error}); give a YAML file, e.g. from configs/") from error
    if len(content) > most:
        raise UserError(f"{path}: more than {most} bytes; give a YAML file of settings, e.g. from configs/")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid YAML ({error})") from error


def parse_yaml(text: str, *, numbers: bool = False) -> tuple[Any, list[str]]:
    """The value that `text` stands for, and a line for each key that is given twice. Nothing in it is executed.

    Args:
        text: the content of a file.
        numbers: whole numbers may be keys, as in the `names` of a data.yaml.

    Raises:
        UserError: not valid YAML, an alias, deeper than MAX_DEPTH, or a key that is no text.
    """
    return copy.deepcopy(_parsed(text, numbers))


@functools.lru_cache(maxsize=1024)  # a table reads the same few files and words for each of its lines
def _parsed(text: str, numbers: bool) -> tuple[Any, list[str]]:
    try:
        _check_events(text)
        node = yaml.compose(text, Loader=_Loader)
        twice = list(_duplicates(node, "", (_TEXT, _WHOLE) if numbers else (_TEXT,)))
        return _Loader("").construct_document(node) if node else None, twice
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or a number that cannot be
        raise UserError(f"not valid YAML ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    hint = "; quote a text that begins with * or &" if "alias" in str(error.context) else ""
    return f"line {error.problem_mark.line + 1}: {' '.join(str(error.problem).split())}{hint}"


def _check_events(text: str) -> None:
    """What has to be known before anything is built: aliases can make ten lines a billion, nesting can be endless."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 0
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise UserError(f"line {line}: nested more than {MAX_DEPTH} levels deep; settings need four")
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"line {line}: found the alias *{event.anchor}; write its value out, or quote a pattern")
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise UserError(f"line {line}: found the tag {tag}; settings have plain values; leave it out")


def _duplicates(node: yaml.Node | None, prefix: str, allowed: tuple[str, ...]) -> Iterator[str]:
    """Keys that are given twice, which YAML itself would settle silently."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _duplicates(item, prefix, allowed)
    if not isinstance(node, yaml.MappingNode):
        return
    first_lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or key.tag not in allowed:
            found = repr(key.value) if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            raise UserError(f"line {line}: found {found} as a key; keys are text; quote it if it is meant as text")
        if key.value in first_lines:
            yield f"{prefix}{key.value}: given twice (lines {first_lines[key.value]} and {line}); keep one"
        first_lines.setdefault(key.value, line)
        yield from _duplicates(value, f"{prefix}{key.value}.", allowed)
