"""Results as Markdown: what was measured, the lines that were not run, and our rows beside the paper's.

The paper's numbers are in paper_numbers.json, with where they come from and how measured. A difference is given only
where both sides were measured on the same images and have the same kind of levels, evenly spaced ones. Both sides have
their gap to full precision, since each was measured by a program of its own.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.pipeline.run_dir import PTQ, TRAINED, results
from common.runtime.errors import UserError
from common.runtime.files import read_json
from tools.experiments.store import Group, Result, grouped
from tools.experiments.table import Line

NONE = "-"
MISSING = "missing"
COLUMNS = (
    *("line", "levels", "mean bits", "not quantized", "images", "seeds", "on", "FP", "PTQ", "trained", "PTQ fidelity"),
    *("trained fidelity", "FP masks", "PTQ masks", "trained masks", "seconds"),
)

NUMBERS = Path(__file__).with_name("paper_numbers.json")
# Our own recipe is held against the same cell as the published one.
ALSO = {"ours": "published_settings", "ours_codebook": "published_settings"}
FULL_WIDTH = 8  # bits, from which on no role has more than another
PAPER_COLUMNS = (
    *("line", "levels", "mean bits", "paper AP", "paper gap", "AP", "gap", "difference"),
    *("paper AP50", "AP50", "difference50", "seeds", "on", "not quantized"),
)


def table(rows: Sequence[Result], lines: Sequence[Line] = ()) -> Iterator[str]:
    """The rows in the order of `lines`, behind them those that are `missing`; AP from 0 to 1.

    Args:
        rows: results; several seeds of one name become mean and sample standard deviation.
        lines: the lines of the table; without them the rows come as they are.
    """
    groups = grouped(rows)
    names = list(dict.fromkeys(line.name for line in lines)) or list(dict.fromkeys(g.first.name for g in groups))
    cells = []
    for name in names:
        own = [group for group in groups if group.first.name == name]
        cells += [_cells(group) for group in own] or [{"line": name, "PTQ": MISSING}]
    cells.sort(key=lambda row: row["PTQ"] == MISSING)
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
    columns = ("line", "against", "detector", "difference of AP", "95 % of draws", "more than the chance of the images")
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
    cells = {"line": first.name, "levels": levels(first), "mean bits": f"{first.mean_weight_bits:.2f}"}
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


def beside(rows: Sequence[Result], lines: Sequence[Line], table: str) -> Iterator[str]:
    """Markdown, AP in percent, as the paper's: a row for each line, `missing` where none was run.

    Raises:
        UserError: the paper has no such table.
    """
    numbers = paper_numbers(table)
    own = {group.first.name: group for group in grouped(rows)}
    by_name = {line.name: line for line in lines}
    cells = [cell(line, own.get(name), numbers) for name, line in by_name.items()]
    yield from markdown([[row[column] for column in PAPER_COLUMNS] for row in cells], PAPER_COLUMNS)
    metric = numbers["metric"]
    ours = next((row.evaluator for row in rows if row.evaluator), "pycocotools")
    yield ""
    yield f"AP in percent. Paper: quantized by {metric['quantized']}, full precision by {metric['full_precision']}."
    yield f"zsqdet: all by {ours}. gap: full precision minus quantized, each side by its own measurements."
    yield "difference: AP minus paper AP. on: evaluation set, images, pixels. not quantized: layers in float, by role."
    yield "paper AP beside ours and ours_codebook: the paper's zero-shot row, for comparison."
    yield f"Paper: {numbers['source']}. {numbers['note']}"
    yield from elsewhere(lines)


def elsewhere(lines: Sequence[Line]) -> Iterator[str]:
    """Markdown: what others have measured of the same models and bits, AP in percent, by their own programs."""
    found = read_json(NUMBERS)["elsewhere"]
    cells = {line.name.rpartition("/")[0] for line in lines}
    rows = [row for row in found["rows"] if f"{row[0]}/{row[3]}" in cells]
    if not rows:
        return
    texts = []
    for model, method, seen, bits, full, ap, evaluator, source in rows:
        gap = (NONE, NONE) if full is None else (f"{full:.1f}", f"{full - ap:.1f}")
        texts.append([f"{model}/{bits}", method, seen, *gap, f"{ap:.1f}", evaluator, source])
    yield ""
    yield "Elsewhere, not run here, each by a program of its own."
    yield ""
    yield from markdown(texts, ("line", "method", "data", "FP", "gap", "AP", "evaluator", "source"))
    yield ""
    yield from (f"- {name}: {found['sources'][name]}" for name in dict.fromkeys(row[-1] for row in rows))


def paper_numbers(table: str) -> dict[str, Any]:
    """The paper's numbers of one table, with the set that it was measured on.

    Raises:
        UserError: the paper has no such table.
    """
    content = read_json(NUMBERS)
    if table not in content["tables"]:
        raise UserError(f"paper: found {table!r}; allowed: {', '.join(content['tables'])}")
    return {"evaluated_on": content["evaluated_on"]} | content["tables"][table]


def cell(line: Line, group: Group | None, numbers: dict[str, Any]) -> dict[str, str]:
    """One line of the comparison, as text."""
    place, _, name = line.name.rpartition("/")
    published = numbers["cells"].get(place, {})
    paper = published.get(name) or published.get(ALSO.get(name, ""))
    full = numbers["full_precision"].get(place.partition("/")[0])
    row = dict.fromkeys(PAPER_COLUMNS, NONE) | {"line": line.name, "AP": MISSING}
    if paper:
        row |= {
            "paper AP": f"{paper[0]:.1f}",
            "paper AP50": f"{paper[1]:.1f}",
            "paper gap": f"{full[0] - paper[0]:.1f}",
        }
    if group is None:
        return row
    first = group.first
    row |= {"levels": levels(first), "mean bits": f"{first.mean_weight_bits:.2f}", "seeds": str(group.seeds)}
    row |= {"on": f"{first.evaluated_on}, {first.evaluated_images} at {first.image_size}"}
    row["not quantized"] = first.float_layers
    ap, ap50 = (_final(group, metric) for metric in ("ap", "ap50"))
    if ap is None or ap50 is None or first.full_ap is None:
        return row
    row |= {"AP": f"{100 * ap:.1f}", "AP50": f"{100 * ap50:.1f}", "gap": f"{100 * (first.full_ap - ap):.1f}"}
    if paper and first.evaluated_on == numbers["evaluated_on"] and _same_kind(line, first):
        row["difference"] = f"{100 * ap - paper[0]:+.1f}"
        row["difference50"] = f"{100 * ap50 - paper[1]:+.1f}"
    return row


def _final(group: Group, metric: str) -> float | None:
    trained = group.mean[f"trained_{metric}"]
    return group.mean[f"ptq_{metric}"] if trained is None else trained


def _same_kind(line: Line, row: Result) -> bool:
    """Whether the quantizer is of the published kind: uniform levels, and no layer at more bits for its loss.

    Heads may have 8 bits, which the published quantizer leaves in float.
    """
    config = line.load().quantization
    more = set(config.eight_bit_roles) - {"head", "output"} if row.mean_weight_bits < FULL_WIDTH else set()
    mixed = config.average_bits is not None or more
    return row.weight_levels == row.activation_levels == "uniform" and not mixed
