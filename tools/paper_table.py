"""Our cells beside the paper's: its numbers are in paper_numbers.json, with where they come from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.reporting.tables import FULL, PTQ, TRAINED, is_float
from common.run_dir import results
from common.runtime.errors import UserError
from common.runtime.files import read_json

NUMBERS = Path(__file__).with_name("paper_numbers.json")
# Our own recipe, with tables or with even levels, is held against the same cell as the published one.
ALSO = {"ours": "ours_published", "ours_even": "ours_published"}
COLUMNS = (
    *("cell", "paper AP", "AP", "difference", "paper AP50", "AP50", "difference50", "FP", "paper FP"),
    *("evaluated", "evaluator", "read", "not quantized"),
)
MISSING = "missing"


def paper_rows(runs: Sequence[Path], table: str) -> list[dict[str, Any]]:
    """One row for each run, and one for each cell of the paper's table without a run; AP in percent, as the paper's.

    A run is found by the end of its path, MODEL/BITS/ROW. What was not measured is "missing"; what the paper does not
    have is None.
    """
    numbers = read_json(NUMBERS)["tables"].get(table, {"cells": {}, "full_precision": {}})
    rows = [_row("/".join(run.parts[-3:]), _measured(run), numbers) for run in runs]
    there = {row["cell"] for row in rows}
    cells = [f"{place}/{name}" for place, own in numbers["cells"].items() for name in own]
    return rows + [_row(cell, None, numbers) for cell in cells if cell not in there]


def source_of(table: str) -> str:
    """Where the paper's numbers of a table come from, and what is known about them."""
    numbers = read_json(NUMBERS)["tables"].get(table)
    return f"{numbers['source']}. {numbers['note']}" if numbers else f"The paper has no numbers for {table}."


def _measured(run: Path) -> dict[str, Any]:
    """The result of a run and how it came about.

    Raises:
        UserError: not a run folder.
    """
    if not (run / "results.json").exists():
        raise UserError(f"{run}: holds no results.json; name folders that `zsqdet run` made")
    stored = results(run)
    rows = {row["name"]: row for row in stored["rows"]}
    kept = dict.fromkeys(layer["role"] for layer in stored["layers"] if is_float(layer))
    zero_shot = stored.get("zero_shot")
    count = sum(is_float(layer) for layer in stored["layers"])
    return {
        "full": rows.get(FULL),
        "final": rows.get(TRAINED) or rows.get(PTQ),
        "read": None if zero_shot is None else "nothing" if zero_shot else "real images or labels",
        "not quantized": f"{count} of {len(stored['layers'])}: {' '.join(kept)}" if stored["layers"] else None,
    }


def _row(cell: str, measured: dict[str, Any] | None, numbers: dict[str, Any]) -> dict[str, Any]:
    place, _, name = cell.rpartition("/")
    own = numbers["cells"].get(place, {})
    paper = own.get(name) or own.get(ALSO.get(name, ""))
    paper_full = numbers["full_precision"].get(place.partition("/")[0])
    row: dict[str, Any] = dict.fromkeys(COLUMNS, None)
    row |= {"cell": cell, "paper AP": paper and paper[0], "paper AP50": paper and paper[1]}
    row |= {"paper FP": paper_full and paper_full[0], "AP": MISSING, "AP50": MISSING}
    measured = measured or {"full": None, "final": None}
    full, final = measured["full"], measured["final"]
    row |= {key: measured[key] for key in ("read", "not quantized") if key in measured}
    if full:
        row["FP"] = round(100 * full["AP"], 1)
    if final:
        row |= {"AP": round(100 * final["AP"], 1), "AP50": round(100 * final["AP50"], 1)}
        row |= {"evaluated": f"{final['images']} at {final['image_size']}", "evaluator": final["evaluator"]}
        if paper:
            row["difference"] = round(100 * final["AP"] - paper[0], 1)
            row["difference50"] = round(100 * final["AP50"] - paper[1], 1)
    return row
