"""Our rows beside the paper's: its numbers are in paper_numbers.json, with where they come from and how measured.

A difference is given only where both sides were measured on the same images and have the same kind of levels, evenly
spaced ones. Both sides have their gap to full precision, since each was measured by a program of its own.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.runtime.errors import UserError
from common.runtime.files import read_json
from tools.experiments.lines import Line
from tools.experiments.record import Group, Result, grouped
from tools.experiments.show import MISSING, NONE, levels, markdown

NUMBERS = Path(__file__).with_name("paper_numbers.json")
# Our own recipe is held against the same cell as the published one.
ALSO = {"ours": "ours_published", "ours_codebook": "ours_published"}
FULL_WIDTH = 8  # bits, from which on no role has more than another
COLUMNS = (
    *("cell", "levels", "mean bits", "paper AP", "paper gap", "AP", "gap", "difference"),
    *("paper AP50", "AP50", "difference50", "seeds", "on", "not quantized"),
)


def beside(rows: Sequence[Result], lines: Sequence[Line], table: str) -> Iterator[str]:
    """Markdown, AP in percent, as the paper's: a row for each line, `missing` where none was run.

    Raises:
        UserError: the paper has no such table.
    """
    numbers = paper_numbers(table)
    own = {group.first.name: group for group in grouped(rows)}
    by_name = {line.name: line for line in lines}
    cells = [cell(line, own.get(name), numbers) for name, line in by_name.items()]
    yield from markdown([[row[column] for column in COLUMNS] for row in cells], COLUMNS)
    metric = numbers["metric"]
    ours = next((row.evaluator for row in rows if row.evaluator), "pycocotools")
    yield ""
    yield f"AP in percent. Paper: quantized by {metric['quantized']}, full precision by {metric['full_precision']}."
    yield f"Ours: all by {ours}. A gap is full precision minus quantized, each side by its own measurements."
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
    yield from markdown(texts, ("cell", "method", "data", "FP", "gap", "AP", "evaluator", "source"))
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
    row = dict.fromkeys(COLUMNS, NONE) | {"cell": line.name, "AP": MISSING}
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
