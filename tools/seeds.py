"""Runs that differ in their seed alone, as one row with the mean and the spread of what was measured."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.run_dir import FREE_KEYS, stored_settings
from common.runtime.errors import UserError

MEASURED = ("PTQ", "trained", "PTQ50", "trained50")
COLUMNS = (
    *("experiment", "bits", "mean bits", "quantizer", "images", "count", "seeds", "FP"),
    *(column for name in MEASURED for column in (name, f"{name} +-")),
    *("evaluated", "seconds", "commit"),
)
FREE = FREE_KEYS | {"seed"}


def seed_rows(runs: Sequence[Path], collect: Callable[[Path], dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each folder of runs EXPERIMENT/seed0, EXPERIMENT/seed1, ..., in the order of the first of each.

    AP and `seconds` are means over the seeds, `+-` is the sample standard deviation, None with fewer than two seeds.

    Raises:
        UserError: a folder without results, or runs of one folder whose settings differ in more than the seed.
    """
    groups: dict[Path, list[Path]] = {}
    for run in runs:
        groups.setdefault(run.resolve().parent, []).append(run)
    return [_row(folder, members, [collect(run) for run in members]) for folder, members in groups.items()]


def _row(folder: Path, runs: Sequence[Path], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    _check_same(runs)
    first = rows[0]
    row: dict[str, Any] = {"experiment": "/".join(folder.parts[-3:]), "seeds": len({row["seed"] for row in rows})}
    row |= {name: first[name] for name in ("bits", "mean bits", "quantizer", "images", "count", "FP", "evaluated")}
    for name in MEASURED:
        values = [row[name] for row in rows if row[name] is not None]
        row[name] = round(statistics.mean(values), 4) if values else None
        row[f"{name} +-"] = round(statistics.stdev(values), 4) if len(values) > 1 else None
    commits = sorted({str(row["commit"])[:7] for row in rows})
    return row | {"seconds": round(statistics.mean(r["seconds"] for r in rows)), "commit": " ".join(commits)}


def _check_same(runs: Sequence[Path]) -> None:
    settings = []
    for run in runs:
        settings.append({key: value for key, value in stored_settings(run).items() if key not in FREE})
    for run, own in zip(runs, settings, strict=True):
        different = [key for key in own | settings[0] if own.get(key) != settings[0].get(key)]
        if different:
            raise UserError(f"{run}: {different[0]} differs from {runs[0]}; --seeds takes runs that differ in the seed")
