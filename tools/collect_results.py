"""Puts the results of run folders into one table: Markdown on the screen, CSV and JSON in files.

python -m tools.collect_results runs/a runs/b --csv table.csv --json table.json
python -m tools.collect_results runs/tables/yolo11/*/*/* --paper yolo11      # beside the paper's numbers, in percent
python -m tools.collect_results runs/ablations/*/*/*/* --seeds              # mean and spread over EXPERIMENT/seedN
"""

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.quantization.summary import bits_label, mean_weight_bits
from common.reporting.tables import section
from common.run_dir import results, stored_settings
from common.runtime.errors import UserError
from common.runtime.files import atomic, read_json, write_json
from tools import paper_table, seeds
from tools.command import report

COLUMNS = (
    "run", "bits", "mean bits", "quantizer", "images", "count", "size",
    "FP", "PTQ", "trained", "FP50", "PTQ50", "trained50",
    "FP masks", "PTQ masks", "trained masks",
    "evaluated", "seed", "seconds", "commit",
)  # fmt: skip


def collect(run: Path) -> dict[str, Any]:
    """One row for one run folder; a value that was not measured is None.

    Raises:
        UserError: the folder holds no results.
    """
    if not (run / "results.json").exists():
        raise UserError(f"{run}: holds no results.json; name folders that `zsqdet run` made")
    stored, config = results(run), stored_settings(run)
    environment = read_json(run / "environment.json")
    measured = {row["name"]: row for row in stored["rows"]}
    source, mean = config.get("synthesis.source"), mean_weight_bits(stored["layers"])

    def value(row: str, key: str, masks: bool = False) -> float | None:
        metrics = measured.get(row, {})
        metrics = metrics.get("segm", {}) if masks else metrics
        return round(metrics[key], 4) if key in metrics else None

    return {
        "run": run.name,
        "bits": bits_label(section(config, "quantization"), stored["layers"]),
        "mean bits": None if mean is None else round(mean, 2),
        "quantizer": f"{config.get('quantization.preset')} ({config.get('quantization.quantizer')})",
        "images": source if source != "task" else f"task, {config.get('synthesis.preset')}",
        "count": config.get("synthesis.num_images"),
        "size": config.get("evaluation.image_size"),
        "FP": value("full precision", "AP"),
        "PTQ": value("ptq", "AP"),
        "trained": value("trained", "AP"),
        "FP50": value("full precision", "AP50"),
        "PTQ50": value("ptq", "AP50"),
        "trained50": value("trained", "AP50"),
        "FP masks": value("full precision", "AP", masks=True),
        "PTQ masks": value("ptq", "AP", masks=True),
        "trained masks": value("trained", "AP", masks=True),
        "evaluated": measured["full precision"]["images"] if "full precision" in measured else None,
        "seed": config.get("seed"),
        "seconds": round(sum(stored["seconds"].values())),
        "commit": environment.get("commit"),
    }


def markdown(rows: list[dict[str, Any]], columns: Sequence[str] = COLUMNS, digits: int = 4) -> str:
    """The rows as a Markdown table; what was not measured is a dash."""
    cells = [list(columns)] + [[_text(c, row[c], digits) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _text(column: str, value: Any, digits: int) -> str:
    if value is None:
        return "-"
    if column == "mean bits":
        return f"{value:.2f}"
    if isinstance(value, float):
        return f"{value:.{digits}f}"
    return str(value)[:10] if column == "commit" else str(value)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.collect_results", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--csv", type=Path, help="also write the table as CSV")
    parser.add_argument("--json", type=Path, help="also write the table as JSON")
    parser.add_argument("--paper", metavar="TABLE", help="compare with the paper's table: yolov5, yolo11 or swin")
    parser.add_argument(
        "--seeds", action="store_true", help="one row for the runs of a folder, which differ in the seed"
    )
    parser.add_argument("--columns", type=lambda text: text.split(","), help=f"some of {','.join(COLUMNS)}")
    arguments = parser.parse_args(argv)
    if arguments.paper and arguments.seeds:
        parser.error("argument --seeds: not together with --paper")
    columns = paper_table.COLUMNS if arguments.paper else seeds.COLUMNS if arguments.seeds else COLUMNS
    wrong = next((name for name in arguments.columns or () if name not in columns), None)
    if wrong:
        parser.error(f"argument --columns: no column {wrong!r}; there are {', '.join(columns)}")
    return report(_make(arguments, columns))


def _make(arguments: argparse.Namespace, columns: Sequence[str]) -> Iterator[str]:
    if arguments.paper:
        rows = paper_table.paper_rows(arguments.runs, arguments.paper)
    elif arguments.seeds:
        rows = seeds.seed_rows(arguments.runs, collect)
    else:
        rows = [collect(run) for run in arguments.runs]
    if arguments.csv:
        with atomic(arguments.csv) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(rows)
    if arguments.json:
        write_json(arguments.json, rows)
    shown = [c for c in columns if not c.endswith("masks") or any(row[c] is not None for row in rows)]
    yield markdown(rows, arguments.columns or shown, digits=1 if arguments.paper else 4)
    if arguments.paper:
        yield f"\nPaper: {paper_table.source_of(arguments.paper)}"


if __name__ == "__main__":
    sys.exit(main())
