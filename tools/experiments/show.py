"""A table of results as Markdown: what was measured, and the lines that were not run."""

from collections.abc import Iterator, Sequence

from common.pipeline.run_dir import PTQ, TRAINED, results
from tools.experiments.lines import Line
from tools.experiments.record import Group, Result, grouped

NONE = "-"
MISSING = "missing"
COLUMNS = (
    *("row", "levels", "mean bits", "not quantized", "images", "seeds", "on", "FP", "PTQ", "trained", "PTQ fidelity"),
    *("trained fidelity", "FP masks", "PTQ masks", "trained masks", "seconds"),
)


def table(rows: Sequence[Result], lines: Sequence[Line] = ()) -> Iterator[str]:
    """The rows in the order of `lines`, which are `missing` where there is none; AP from 0 to 1.

    Args:
        rows: results; several seeds of one name become mean and sample standard deviation.
        lines: the lines of the table; without them the rows come as they are.
    """
    groups = grouped(rows)
    names = list(dict.fromkeys(line.name for line in lines)) or list(dict.fromkeys(g.first.name for g in groups))
    cells = []
    for name in names:
        own = [group for group in groups if group.first.name == name]
        cells += [_cells(group) for group in own] or [{"row": name, "PTQ": MISSING}]
    shown = [column for column in COLUMNS if any(row.get(column, NONE) != NONE for row in cells)]
    yield from markdown([[row.get(column, NONE) for column in shown] for row in cells], shown)


def differences(lines: Sequence[Line], all_lines: Sequence[Line], samples: int) -> Iterator[str]:
    """Markdown: AP of each of some lines less that of the line that it is compared with, and the interval of a paired
    bootstrap over images, where both run folders are here. Trained detectors, or calibrated ones where the line says so
    or one of the two is not trained.
    """
    from tools.experiments.compare_ap import difference  # imports pycocotools, which --list does not wait for

    known = {(line.name, line.seed): line for line in all_lines}
    rows = []
    for line in lines:
        name, calibrated = line.against or ("", False)
        other = known.get((name, line.seed))
        if other is None or not all((one.run_dir / "results.json").exists() for one in (line, other)):
            continue
        stored = [results(one.run_dir) for one in (line, other)]
        names = [[row["name"] for row in one["rows"]] for one in stored]
        on_coco = all(one.get("measured_on", {}).get("annotations") for one in stored)
        if not on_coco or not all(PTQ in own for own in names):
            continue
        detector = PTQ if calibrated or not all(TRAINED in own for own in names) else TRAINED
        value, (low, high) = difference((line.run_dir, detector), (other.run_dir, detector), samples, 0)
        between = f"{low:+.4f} to {high:+.4f}"
        told = "yes" if low * high > 0 else "no"
        rows.append([line.full_name, other.name.rpartition("/")[2], detector, f"{value:+.4f}", between, told])
    columns = ("row", "against", "detector", "difference of AP", "95 % of draws", "more than the chance of the images")
    yield from markdown(rows, columns) if rows else ["No two runs that are compared are here."]


def markdown(rows: Sequence[Sequence[str]], columns: Sequence[str]) -> Iterator[str]:
    """Lines of a Markdown table with aligned columns."""
    widths = [max(len(line[i]) for line in [columns, *rows]) for i in range(len(columns))]
    yield _line(columns, widths)
    yield "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    yield from (_line(row, widths) for row in rows)


def levels(row: Result) -> str:
    """The kind of levels of weights and inputs, and the published quantizer's name where it is not the default one."""
    kind = f"{row.weight_levels} / {row.activation_levels}"
    kind = "uniform" if kind == "uniform / uniform" else kind
    return kind if row.quantizer == "lsq" else f"{kind} ({row.quantizer})"


def _cells(group: Group) -> dict[str, str]:
    first = group.first
    full = {"FP": first.full_ap, "FP masks": first.full_mask_ap}
    measured = {"PTQ": "ptq_ap", "trained": "trained_ap", "PTQ fidelity": "ptq_fidelity"}
    measured |= {"trained fidelity": "trained_fidelity", "PTQ masks": "ptq_mask_ap", "trained masks": "trained_mask_ap"}
    cells = {"row": first.name, "levels": levels(first), "mean bits": f"{first.mean_weight_bits:.2f}"}
    cells |= {
        "not quantized": first.float_layers,
        "images": f"{first.num_images} {first.images}",
        "seeds": str(group.seeds),
        "seconds": str(first.seconds),
    }
    size = f"{first.evaluated_on}, {first.evaluated_images} at {first.image_size}"
    cells["on"] = size if first.evaluated_images else NONE
    cells |= {name: _ap(value, None) for name, value in full.items()}
    return cells | {name: _ap(group.mean[key], group.deviation[key]) for name, key in measured.items()}


def _ap(value: float | None, deviation: float | None) -> str:
    if value is None:
        return NONE
    text = f"{value:.4f}".removeprefix("0")
    return text if deviation is None else f"{text} ± {deviation:.4f}".replace("± 0.", "± .")


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"
