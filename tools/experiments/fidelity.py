"""Fidelity AP of finished runs, and how well it ranks them as their AP does.

python -m tools.experiments.fidelity runs/tables/yolo11n/*/*/*/seed0   # a table, and Spearman's rank correlations

Runs of one detector that were measured on the same labelled images. The fidelity on held-out synthetic images is in
those that were also continued without data: zsqdet run RUN/config.yaml 'data={images: null, annotations: null}'.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.detection.average_precision import as_objects
from common.detection.coco_json import read_coco
from common.evaluation.fidelity import OBJECT, fidelity
from common.pipeline.run_dir import FULL, predictions_file, read_predictions, results
from common.reporting.figures import COLOURS, SMALL, legend_above, new_axes, styled
from common.runtime.errors import Parser, UserError
from common.runtime.files import atomic, read_json, write_json
from tools import report

FILE = "fidelity.json"
SAME, HELD_OUT = "fidelity, same images", "fidelity, held-out synthetic images"


def measured_fidelity(run: Path) -> dict[str, float]:
    """Fidelity AP of boxes for each quantized detector of a run; kept in its folder, where it is looked up first.

    Returns:
        "ptq" and, after training, "trained"; empty where full precision detects nothing of score .3 or more.

    Raises:
        UserError: predictions that are missing or damaged.
    """
    stored = results(run)
    basis = {"measured_on": stored.get("measured_on"), "AP": {row["name"]: row["AP"] for row in stored["rows"]}}
    kept = read_json(run / FILE) if (run / FILE).exists() else {}
    if kept.get("basis") == basis:
        return dict(kept["fidelity"])
    content = read_coco(Path(stored["measured_on"]["annotations"]), to_score=True).content
    full = read_predictions(run, predictions_file(run, FULL))
    names = [row["name"] for row in stored["rows"] if row["name"] != FULL]
    measured = {name: fidelity(content, full, read_predictions(run, predictions_file(run, name))) for name in names}
    found = {name: metrics["AP"] for name, metrics in measured.items() if metrics["objects"]}
    write_json(run / FILE, {"basis": basis, "score": OBJECT, "fidelity": found})
    return found


def with_detections(content: dict[str, Any], detections: list[dict[str, Any]], lowest: float) -> dict[str, Any]:
    """A COCO file whose objects are those detections that have a score of `lowest` or more."""
    return content | {"annotations": as_objects(detections, lowest)}


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's, equal values having their mean rank."""
    ranks = [[(np.sum(np.array(x) < v) + np.sum(np.array(x) <= v)) / 2 for v in x] for x in (first, second)]
    return float(np.asarray(np.corrcoef(ranks))[0, 1])


@dataclass(frozen=True)
class Detector:
    """A quantized detector of a run: its AP, and its fidelity on the same and on held-out synthetic images."""

    label: str
    ap: float
    same: float | None
    held_out: float | None


def detectors(runs: Sequence[Path]) -> list[Detector]:
    """The quantized detectors of all runs, the lowest AP first.

    Raises:
        UserError: a run without AP, or fewer than three detectors.
    """
    rows = []
    for run in runs:
        stored = results(run) if (run / "results.json").exists() else {}
        if not stored.get("rows"):
            raise UserError(f"{run}: holds no AP; name folders that `zsqdet run` made with labelled data")
        same = measured_fidelity(run)
        held_out = stored.get("fidelity", {})
        other = {row["name"]: row["AP"] for row in held_out.get("rows", []) if held_out["synthetic"]}
        for row in stored["rows"]:
            name = row["name"]
            if name != FULL:
                label = f"{row.get('label', '')} {name}, {run.parent.name}/{run.name}".strip()
                rows.append(Detector(label, row["AP"], same.get(name), other.get(name)))
    if len(rows) < 3:
        raise UserError(f"found {len(rows)} quantized detectors; ranks are compared of three or more; name more runs")
    return sorted(rows, key=lambda row: row.ap)


def compare(runs: Sequence[Path], figure: Path | None = None) -> Iterator[str]:
    """Lines of Markdown: a row for each quantized detector, and below each fidelity its rank correlation with AP.

    Args:
        runs: of one detector, measured on the same images.
        figure: a file for a chart of the same, SVG or PNG.

    Raises:
        UserError: as `detectors`, or the figure cannot be written.
    """
    rows = detectors(runs)
    yield f"| | AP | {SAME} | {HELD_OUT} |"
    yield "|--|--|--|--|"
    for row in rows:
        values = (row.ap, row.same, row.held_out)
        yield f"| {row.label} | {' | '.join('-' if v is None else f'{v:.4f}'.lstrip('0') for v in values)} |"
    correlations = []
    for key in ("same", "held_out"):
        pairs = [(row.ap, getattr(row, key)) for row in rows if getattr(row, key) is not None]
        correlations.append(f"{rank_correlation(*zip(*pairs, strict=True)):.2f}" if len(pairs) > 2 else "-")
    yield f"| rank correlation with AP (Spearman) | 1 | {' | '.join(correlations)} |"
    if figure:
        draw(rows, figure)


@styled
def draw(rows: Sequence[Detector], path: Path) -> None:
    """AP and each fidelity of the detectors, as SVG or PNG."""
    figure, axes = new_axes(SMALL)
    for key, title, colour, marker in (("same", SAME, COLOURS[0], "o"), ("held_out", HELD_OUT, COLOURS[1], "s")):
        known = [row for row in rows if getattr(row, key) is not None]
        if known:
            places = [row.ap for row in known], [getattr(row, key) for row in known]
            axes.plot(*places, marker, color=colour, label=title.removeprefix("fidelity, "), markersize=5)
    axes.set(xlabel="AP", ylabel="fidelity AP")
    legend_above(axes)
    with atomic(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None)


def main(argv: list[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m tools.experiments.fidelity", description=__doc__, formatter_class=form)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folders of one detector")
    parser.add_argument("--figure", metavar="FILE", type=Path, help="also a chart of the table, .svg or .png")
    arguments = parser.parse_args(argv)
    if arguments.figure and arguments.figure.suffix not in (".svg", ".png"):
        parser.error(f"--figure: found {arguments.figure}; allowed are .svg and .png")
    return report(compare(arguments.runs, arguments.figure))


if __name__ == "__main__":
    sys.exit(main())
