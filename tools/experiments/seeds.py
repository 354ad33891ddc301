"""Rows that differ in their seed alone, as one with the mean and the spread of what was measured."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tools.experiments.record import Result

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
