"""A table of results as Markdown: what was measured, and the lines that were not run."""

from collections.abc import Iterator, Sequence

from tools.experiments.lines import Line
from tools.experiments.record import Group, Result, grouped

NONE = "-"
MISSING = "missing"
COLUMNS = (
    *("row", "levels", "mean bits", "images", "seeds", "on", "FP", "PTQ", "trained", "PTQ fidelity"),
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
    cells |= {"images": f"{first.num_images} {first.images}", "seeds": str(group.seeds), "seconds": str(first.seconds)}
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
