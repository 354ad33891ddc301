"""The charts of the reports: SVG data URIs with a transparent background."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from common.quantization.sensitivity import Sensitivity
from common.reporting.run_data import Boxes, Row, ScaleChange
from common.reporting.tables import is_float, mean_change
from common.runtime.files import atomic

# Colour-blind safe palette (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
ROLES = dict(zip(("first", "early", "body", "head", "output"), ("#E69F00", *COLOURS[:4]), strict=True)) | {
    "late": "#56B4E9",
    "attention_input": "#999999",
}
INK, FAINT = "#333333", "#dddddd"
MOST_TICK_LABELS = 16  # layers or classes; with more, their names do not fit below the axis
SMALL, WIDE = (4.8, 2.9), (9.6, 3.2)  # inches
LOWER, HIGHER = COLOURS[1], COLOURS[2]
GRID = 16  # cells per side of the box centre histogram
MOST_BOXES = 25  # per image; the last bin counts more, too
LONGEST_NAME = 28  # characters in a legend
MOST_BAR_LABELS = 6  # runs; with more, the numbers on the bars do not fit
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "axes.formatter.min_exponent": 4,  # 0.01 and not a power of ten
    "svg.hashsalt": "zsqdet",  # the same run gives the same file
}
YLABELS = {"loss": "training loss", "fidelity": "fidelity AP", "held_out": "held-out loss"}
styled = matplotlib.rc_context(STYLE)


@styled
def synthesis_losses(history: Sequence[Row]) -> str:
    """Unweighted loss terms over the iterations of all passes, log scale."""
    places: list[int] = []
    passes: list[tuple[int, int]] = []  # first iteration and image size of each
    for row in history:
        if row["iteration"] == 0:
            passes.append((places[-1] + 1 if places else 0, row["size"]))
        places.append(passes[-1][0] + row["iteration"])
    figure, axes = new_axes(WIDE)
    terms = [name for name in history[0] if name not in ("size", "iteration")]
    for term, colour in zip(terms, COLOURS, strict=False):
        if any(row[term] > 0 for row in history):
            axes.plot(places, [row[term] for row in history], color=colour, label=term.replace("_", " "))
    for begin, size in passes:
        axes.axvline(begin, color=INK, linewidth=0.8, linestyle=":")
        axes.annotate(f" {size} pixels", (begin, 0.99), xycoords=("data", "axes fraction"), va="top")
    axes.set(yscale="log", xlabel="iteration", ylabel="loss")
    axes.margins(y=0.15)
    legend_above(axes)
    return image(figure)


@styled
def training_losses(history: Sequence[Row]) -> str:
    """Weighted loss and its terms per epoch, log scale; epoch 0 has none."""
    rows = [row for row in history if "loss" in row]
    figure, axes = new_axes(SMALL)
    for name, colour in zip(("loss", "logit", "feature", "task"), (INK, *COLOURS), strict=False):
        if name in rows[0]:
            axes.plot([r["epoch"] for r in rows], [r[name] for r in rows], color=colour, label=name, marker=".")
    axes.set(xlabel="epoch", ylabel="training loss", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    legend_above(axes)
    return image(figure)


@styled
def selection(history: Sequence[Row], chosen: int, key: str) -> str:
    """A metric of the held-out images per epoch, with the selected epoch marked."""
    rows = [row for row in history if key in row]
    figure, axes = new_axes(SMALL)
    axes.plot([r["epoch"] for r in rows], [r[key] for r in rows], color=COLOURS[0], marker=".")
    best = next(row[key] for row in rows if row["epoch"] == chosen)
    axes.plot([chosen], [best], "o", color=COLOURS[1], markersize=8, label=f"selected: epoch {chosen}")
    axes.set(xlabel="epoch", ylabel=YLABELS[key])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    legend_above(axes)
    return image(figure)


@styled
def scale_changes(scales: Sequence[ScaleChange], side: str, layers: Sequence[Row]) -> str:
    """Relative change of weight or input scales per layer: a dot for the mean, a line over the channels' range."""
    numbers = {layer["name"]: number for number, layer in enumerate(layers, 1)}
    figure, axes = new_axes(SMALL)
    chosen = [scale for scale in scales if scale.side == side]
    for scale in chosen:
        ends = ((scale.after / scale.before - 1) * 100).aminmax()
        axes.plot([numbers[scale.layer]] * 2, [end.item() for end in ends], color=COLOURS[0], alpha=0.35)
    places = [numbers[scale.layer] for scale in chosen]
    axes.plot(places, [mean_change(scale) * 100 for scale in chosen], ".", color=COLOURS[0])
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set(ylabel=f"{side} scale, change in %")
    _name_layers(axes, layers)
    return image(figure)


@styled
def output_errors(layers: Sequence[Row]) -> str:
    """Output error per layer, coloured by role; layers in float are hatched."""
    figure, axes = new_axes(WIDE)
    for role, colour in ROLES.items():
        places = [i for i, row in enumerate(layers) if row["role"] == role and not is_float(row)]
        if places:
            errors = [layers[i]["output_error"] for i in places]
            axes.bar([i + 1 for i in places], errors, color=colour, label=role)
    label = "float"
    for number, row in enumerate(layers, 1):
        if is_float(row):
            ends = (number - 0.5, number + 0.5)
            axes.axvspan(*ends, facecolor="none", edgecolor="#bbbbbb", hatch="////", linewidth=0, label=label)
            label = "_nolegend_"  # once is enough
    axes.set(ylabel="relative output error")
    _name_layers(axes, layers)
    legend_above(axes, columns=8)
    return image(figure)


def _name_layers(axes: Axes, layers: Sequence[Row]) -> None:
    """Layers as ticks: their names if these fit, else their numbers in the table."""
    axes.set_xlim(0.4, len(layers) + 0.6)
    if len(layers) <= MOST_TICK_LABELS:
        names = [layer["name"] for layer in layers]
        axes.set_xticks(range(1, len(names) + 1), names, rotation=30, ha="right", parse_math=False)
    else:
        axes.set_xlabel("layer number in the table")


def legend_above(axes: Axes, columns: int = 4) -> None:
    """A legend above the axes."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0, handlelength=1.5, columnspacing=1
    )


def new_axes(size: tuple[float, float]) -> tuple[Figure, Axes]:
    """An empty figure of `size` (width, height) in inches."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot()


def image(figure: Figure) -> str:
    """The figure as an SVG data URI."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(stream.getvalue()).decode()}"


@styled
def box_sizes(sets: Sequence[Boxes]) -> str:
    """Histogram of box sizes per set."""
    figure, axes = new_axes(SMALL)
    edges = np.linspace(0, 1, 21)
    for part, colour in zip(sets, COLOURS, strict=False):
        shares = np.histogram(part.sizes.clip(0, 1), edges)[0] / len(part.sizes)
        axes.stairs(shares, edges, color=colour, label=part.name, fill=len(sets) == 1, linewidth=1.8)
    axes.set(xlabel="box size", ylabel="fraction of boxes")
    legend_above(axes)
    return image(figure)


@styled
def box_counts(sets: Sequence[Boxes]) -> str:
    """Histogram of boxes per image."""
    figure, axes = new_axes(SMALL)
    edges = np.arange(-0.5, MOST_BOXES + 1)
    for part, colour in zip(sets, COLOURS, strict=False):
        shares = np.histogram(part.counts.clip(max=MOST_BOXES), edges)[0] / len(part.counts)
        axes.stairs(shares, edges, color=colour, label=part.name, fill=len(sets) == 1, linewidth=1.8)
    axes.set(xlabel=f"boxes per image (last: {MOST_BOXES} or more)", ylabel="fraction of images")
    legend_above(axes)
    return image(figure)


@styled
def box_positions(sets: Sequence[Boxes]) -> str:
    """2-D histograms of box centres; darker is more."""
    figure, _ = new_axes(SMALL)
    figure.clear()
    for place, part in enumerate(sets, 1):
        axes = figure.add_subplot(1, len(sets), place)
        x, y = part.centres.clip(0, 1).T
        cells = np.histogram2d(y, x, GRID, [[0, 1], [0, 1]])[0]
        edges = np.linspace(0, 1, GRID + 1)
        axes.pcolormesh(edges, edges, cells, cmap="Greys", vmin=0)
        axes.set(xticks=[], yticks=[], aspect="equal", ylim=(1, 0))
        axes.grid(False)
        for spine in axes.spines.values():
            spine.set_visible(True)
        axes.set_title(_short(part.name), fontsize=9)
    return image(figure)


@styled
def class_shares(sets: Sequence[Boxes], class_names: Sequence[str]) -> str:
    """Class frequency: bars for the first set, dashes for the second."""
    figure, axes = new_axes(WIDE)
    places = np.arange(len(class_names))
    for number, (part, colour) in enumerate(zip(sets, COLOURS, strict=False)):
        known = part.labels[part.labels >= 0]
        shares = np.bincount(known, minlength=len(class_names)) / max(len(known), 1)
        if number == 0:
            axes.bar(places, shares, color=colour, label=part.name)
        else:
            axes.plot(places, shares, "_", color=colour, markersize=7, markeredgewidth=2, label=part.name)
    if len(class_names) <= MOST_TICK_LABELS:
        axes.set_xticks(places, list(class_names), rotation=30, ha="right", parse_math=False)
    else:
        axes.set_xlabel("class index")
    axes.set_xlim(-0.8, len(class_names) - 0.2)
    axes.set(ylabel="fraction of boxes")
    legend_above(axes)
    return image(figure)


@styled
def class_changes(rows: Sequence[tuple[str, float]], limits: tuple[float, float]) -> str:
    """Change of AP per class, first class on top; `limits` of the axis."""
    figure, axes = new_axes(SMALL)
    places = range(len(rows))
    axes.barh(places, [change for _, change in rows], color=[(LOWER, HIGHER)[change >= 0] for _, change in rows])
    axes.set_yticks(places, [_short(name) for name, _ in rows], parse_math=False)
    axes.set(xlim=limits, ylim=(len(rows) - 0.5, -0.5), xlabel="change of AP")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.axvline(0, color=INK, linewidth=0.8)
    return image(figure)


@styled
def precision_of_runs(names: Sequence[str], rows: Mapping[str, Sequence[float | None]]) -> str:
    """AP per run: one bar each for full precision, PTQ and QAT; None leaves a gap."""
    figure, axes = new_axes(WIDE)
    width = 0.8 / max(len(rows), 1)
    for number, ((title, values), colour) in enumerate(zip(rows.items(), (INK, *COLOURS), strict=False)):
        places = [i + (number - (len(rows) - 1) / 2) * width for i, v in enumerate(values) if v is not None]
        bars = axes.bar(places, [v for v in values if v is not None], width * 0.9, color=colour, label=title)
        if len(names) <= MOST_BAR_LABELS:
            axes.bar_label(bars, fmt="%.3f", fontsize=9)
    axes.set_xticks(range(len(names)), [_short(name) for name in names], rotation=20, ha="right", parse_math=False)
    axes.set(ylabel="AP")
    axes.margins(y=0.12)
    legend_above(axes)
    return image(figure)


@styled
def histories(names: Sequence[str], runs: Sequence[Sequence[Row]], key: str) -> str:
    """A training curve of each run that has it; losses on a log scale."""
    figure, axes = new_axes(SMALL)
    styles = ("-", "--", ":", "-.")
    for number, (name, history) in enumerate(zip(names, runs, strict=True)):
        rows = [row for row in history if key in row]
        if rows:
            colour, style = COLOURS[number % len(COLOURS)], styles[number // len(COLOURS) % len(styles)]
            values = [row[key] for row in rows]
            axes.plot([row["epoch"] for row in rows], values, style, color=colour, marker=".", label=_short(name))
    axes.set(xlabel="epoch", ylabel=YLABELS[key], yscale="linear" if key == "fidelity" else "log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    legend_above(axes, columns=2)
    return image(figure)


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}\N{HORIZONTAL ELLIPSIS}"


@styled
def draw_sensitivity(found: Sequence[Sensitivity], path: Path) -> None:
    """Writes an SVG chart of layer sensitivities: bars at the planned bits, coloured by role, and digits at more bits.

    Raises:
        UserError: the file cannot be written.
    """
    figure, axes = new_axes(WIDE)
    for role, colour in ROLES.items():
        places = [i for i, entry in enumerate(found, 1) if entry.role == role]
        if places:
            axes.bar(places, [found[i - 1].planned for i in places], color=colour, label=role)
    for bits in sorted({bits for entry in found for bits in entry.wider}):
        changes = [entry.wider[bits] for entry in found]
        number: dict[str, Any] = {"marker": f"${bits}$", "markersize": 6, "markeredgewidth": 0.4, "linestyle": ""}
        axes.plot(range(1, len(found) + 1), changes, color=INK, label=f"{bits} bits", **number)
    axes.set(yscale="log", xlabel="layer number", ylabel="prediction distance")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    with atomic(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": None})
