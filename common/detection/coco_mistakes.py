"""The mistakes of a file, collected so that a user sees all of them at once."""

from array import array
from pathlib import Path
from typing import Any

from common.runtime.errors import UserError

SHOWN = 20  # mistakes in full
LONGEST = 60  # letters of what was found
NOTHING = "nothing"  # was found where a key is missing


class Mistakes:
    """Lines `file: place: found ...; allowed: ...`; without a file, places name their own."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._lines: list[str] = []
        self._count = 0

    def add(self, place: str, found: str, allowed: str) -> None:
        """Notes one mistake; of those after the first ones only the number is kept."""
        self._count += 1
        if len(self._lines) < SHOWN:
            place = place if self.path is None else f"{self.path}: {place}"
            self._lines.append(f"{place}: found {found}; allowed: {allowed}")

    def stop(self) -> None:
        """Ends the work if there was any.

        Raises:
            UserError: with a line for each.
        """
        if self._count:
            more = self._count - len(self._lines)
            raise UserError(*self._lines, *[f"... and {more} more"] * bool(more))


def shown(row: dict[str, Any], key: str) -> str:
    """The value of a key for a message, cut where it is long."""
    return short(row[key]) if key in row else NOTHING


def short(value: Any) -> str:
    """A value of a file for a message, cut where it is long."""
    if isinstance(value, list | str | bytes):
        value = value[: LONGEST + 1]  # a mask may have a million numbers
    if isinstance(value, list):
        value = [part[: LONGEST + 1].tolist() if isinstance(part, array) else part for part in value]  # of a polygon
    try:
        text = repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} in which others are nested"
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."
