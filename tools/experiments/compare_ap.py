"""Which differences of AP between runs are more than the chance of which images they were measured on.

python -m tools.experiments.compare_ap runs/paper runs/ours    # losses, and what the second recovers
python -m tools.experiments.compare_ap runs/* --samples 2000 --json differences.json
python -m tools.experiments.compare_ap runs/* --fidelity 0.3  # close to full precision, labels unused

A paired bootstrap (Efron 1979) over the images: the set is drawn anew from its own images, as many as it has, and all
detectors are scored on the same draw. The chance of training seeds is not in it: name runs of other seeds as well.

With --fidelity the AP is fidelity AP: the detections of full precision are the ground truth. It tells quantized copies
apart on fewer images, since a mistake that the original makes as well costs nothing. It says how close a copy is to the
original, not how good it is.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from common.detection.average_precision import matched
from common.detection.coco_json import read_coco
from common.pipeline.run_dir import FULL, predictions_file, read_predictions, results
from common.runtime.errors import Parser, UserError
from common.runtime.files import write_json
from tools import report
from tools.experiments.fidelity import with_detections

Floats = NDArray[np.float64]
Kind = Literal["bbox", "segm"]
NAMES: dict[Kind, str] = {"bbox": "boxes", "segm": "masks"}
RECALLS = np.linspace(0, 1, 101)  # COCO's


@dataclass(frozen=True)
class ClassMatches:
    """The N detections of one class by falling score, at the ten thresholds of IoU."""

    images: NDArray[np.int64]  # [N], the place of each one's image in the set
    hits: NDArray[np.bool_]  # [10, N]
    misses: NDArray[np.bool_]  # [10, N]; what lies on a crowd is neither
    objects: Floats  # [images], how many count in each


def class_matches(content: dict[str, Any], detections: list[dict[str, Any]], kind: Kind) -> list[ClassMatches]:
    """Matches of each class by pycocotools, objects of all sizes, at most 100 detections of an image and class.

    Args:
        content: a COCO detection file.
        detections: COCO results.
        kind: what is compared.
    """
    evaluation = matched(content, detections, kind, slice(1))
    count = len(evaluation.params.imgIds)
    place = {image: i for i, image in enumerate(evaluation.params.imgIds)}
    found = []
    for start in range(0, len(evaluation.evalImgs), count):
        images = [image for image in evaluation.evalImgs[start : start + count] if image is not None]
        if not images:
            continue
        scores = [np.asarray(image["dtScores"], float) for image in images]
        order = np.argsort(-np.concatenate(scores), kind="mergesort")  # as pycocotools sorts
        where = np.repeat([place[image["image_id"]] for image in images], [len(s) for s in scores])[order]
        hit = np.concatenate([image["dtMatches"] for image in images], 1)[:, order] > 0
        ignored = np.concatenate([image["dtIgnore"] for image in images], 1)[:, order].astype(bool)
        objects = np.zeros(count)
        for image in images:
            objects[place[image["image_id"]]] = np.count_nonzero(np.logical_not(image["gtIgnore"]))
        found.append(ClassMatches(where, hit & ~ignored, ~hit & ~ignored, objects))
    return found


def average_precisions(classes: Sequence[ClassMatches], draws: Floats) -> Floats:
    """COCO's AP [draws] of sets in which image i is `draws[d, i]` times; nan where no object is drawn."""
    return np.array([_average_precision(classes, draw) for draw in draws])


def _average_precision(classes: Sequence[ClassMatches], draw: Floats) -> float:
    values = []
    for one in classes:
        objects = draw @ one.objects
        if not objects:
            continue
        times = draw[one.images]
        for hit, miss in zip(one.hits, one.misses, strict=True):
            hits, misses = np.cumsum(times * hit), np.cumsum(times * miss)
            precision = hits / np.maximum(hits + misses, 1)
            precision = np.maximum.accumulate(precision[::-1])[::-1]
            reached = np.searchsorted(hits / objects, RECALLS, side="left")
            values.append(np.append(precision, 0.0)[np.minimum(reached, len(precision))].mean())
    return float(np.mean(values)) if values else float("nan")


def image_draws(images: int, samples: int, seed: int) -> Floats:
    """How often each image is in each set, [1 + samples, images]; the first one is the set itself."""
    generator = np.random.default_rng(seed)
    drawn = [np.bincount(generator.integers(0, images, images), minlength=images) for _ in range(samples)]
    return np.array([np.ones(images), *drawn], float)


def compare(runs: Sequence[Path], samples: int, seed: int, fidelity: float | None = None) -> Iterator[dict[str, Any]]:
    """A row for each quantized detector of each run, boxes first: `AP`, what it `loses` to full precision, and the
    share of the loss of the first run's calibrated detector that it has `recovered`, each with the interval that holds
    95 % of the draws. The share is None for that very detector, and where the interval of its loss holds zero.

    Args:
        runs: run folders.
        samples: draws of the bootstrap.
        seed: of the draws.
        fidelity: take the detections of full precision with at least this score for objects, not the labels.

    Raises:
        UserError: a run without predictions, or runs that were measured on other images or from another detector; full
            precision detects nothing with that score.
    """
    content, detectors = _read(runs)
    if fidelity is not None:
        content = with_detections(content, detectors[runs[0], FULL], fidelity)
        if not content["annotations"]:
            raise UserError(f"--fidelity: full precision detects nothing of score {fidelity} or more; lower it")
    draws = image_draws(len(content["images"]), samples, seed)
    masks = all(_has_masks(rows) for rows in (content["annotations"], *detectors.values()))
    kinds = [kind for kind in NAMES if kind == "bbox" or masks]
    bar = tqdm(total=len(kinds) * len(detectors), desc="detectors", leave=False, disable=None)
    for kind in kinds:
        first: Floats | None = None
        full = np.array([])
        for (run, name), detections in detectors.items():
            aps = average_precisions(class_matches(content, detections, kind), draws)
            bar.update()
            if name == FULL:
                full = aps
                continue
            loss = full - aps
            row = {"run": str(run), "detector": name, "of": NAMES[kind], "AP": float(aps[0])}
            row |= {"loses": float(loss[0]), "loses_95": _interval(loss), "recovered": None, "recovered_95": None}
            if first is not None and _interval(first)[0] > 0:
                share = 1 - loss / first
                row |= {"recovered": float(share[0]), "recovered_95": _interval(share)}
            first = loss if first is None else first
            yield row


def difference(one: tuple[Path, str], other: tuple[Path, str], samples: int, seed: int) -> tuple[float, list[float]]:
    """AP of boxes of one detector (a run folder and a name in its results) less that of another on the same draws, and
    the interval that holds 95 % of them.

    Raises:
        UserError: they were measured on other images or in another way.
    """
    measured_on = [results(run).get("measured_on") for run, _ in (one, other)]
    if measured_on[0] is None or measured_on[0] != measured_on[1]:
        raise UserError(
            f"{one[0]}: measured otherwise than {other[0]}; name runs that were measured on the same images"
        )
    content = read_coco(Path(measured_on[0]["annotations"]), masks=True, to_score=True).content
    draws = image_draws(len(content["images"]), samples, seed)
    found = [read_predictions(run, predictions_file(run, name)) for run, name in (one, other)]
    first, second = (average_precisions(class_matches(content, rows, "bbox"), draws) for rows in found)
    return float(first[0] - second[0]), _interval(first - second)


def _interval(values: Floats) -> list[float]:
    return [float(value) for value in np.nanquantile(values[1:], (0.025, 0.975))]


def _has_masks(rows: list[dict[str, Any]]) -> bool:
    return bool(rows) and all("segmentation" in row for row in rows)


def _read(runs: Sequence[Path]) -> tuple[dict[str, Any], dict[tuple[Path, str], list[dict[str, Any]]]]:
    """The set, and the detections of full precision (once) and of all quantized detectors."""
    measured_on: Any = None
    full: Any = None
    detectors: dict[tuple[Path, str], list[dict[str, Any]]] = {}
    for run in runs:
        stored = results(run) if (run / "results.json").exists() else {}
        names = [row["name"] for row in stored.get("rows", [])]
        if FULL not in names or len(names) < 2:
            raise UserError(f"{run}: holds no measured detectors; name folders that `zsqdet run` made with data.images")
        measured_on = measured_on or stored["measured_on"]
        predictions = {name: read_predictions(run, predictions_file(run, name)) for name in names}
        full = predictions[FULL] if full is None else full
        if stored["measured_on"] != measured_on or predictions[FULL] != full:
            raise UserError(
                f"{run}: measured otherwise than {runs[0]}, or another detector; name runs of the same detector on the "
                "same images"
            )
        detectors |= {(run, name): rows for name, rows in predictions.items() if name != FULL or run == runs[0]}
    return read_coco(Path(measured_on["annotations"]), masks=True, to_score=True).content, detectors


def _line(row: dict[str, Any]) -> str:
    low, high = row["loses_95"]
    line = f"{row['AP']:.4f}  loses {row['loses']:+.4f} ({low:+.4f} to {high:+.4f})"
    if row["recovered"] is not None:
        low, high = row["recovered_95"]
        line += f"  recovered {row['recovered']:.0%} ({low:.0%} to {high:.0%})"
    return f"{row['of']}  {line}  {row['run']}, {row['detector']}"


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the module."""
    form = argparse.RawDescriptionHelpFormatter
    name = "python -m tools.experiments.compare_ap"
    parser = Parser(prog=name, description=__doc__, formatter_class=form)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders with predictions; the first is the baseline")
    parser.add_argument("--samples", type=int, default=400, help="draws of the bootstrap (default: 400)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument(
        "--fidelity",
        type=float,
        metavar="SCORE",
        help="count what full precision detects with at least this score as the objects, in the place of the labels",
    )
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args(arguments)
    if options.samples < 40:
        parser.error("--samples: an interval of 95 % needs at least 40 draws")

    def lines() -> Iterator[str]:
        rows = []
        for row in compare(options.runs, options.samples, options.seed, options.fidelity):
            rows.append(row)
            yield _line(row)
        if options.json:
            write_json(options.json, rows)

    return report(lines())


if __name__ == "__main__":
    sys.exit(main())
