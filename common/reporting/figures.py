"""The charts of the report, each an SVG image as a data URI with a transparent background."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from common.reporting.contents import Row, StepChange
from common.reporting.tables import is_float, mean_change

# Colours that people with any kind of colour vision can tell apart (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
ROLES = dict(zip(("first", "early", "body", "head", "output"), ("#E69F00", *COLOURS[:4]), strict=True))
INK, FAINT = "#333333", "#dddddd"
NAMED = 16  # layers: more do not fit with their names below the axis
SMALL, WIDE = (4.8, 2.9), (9.6, 3.2)  # inches
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
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
    "text.parse_math": False,  # names of layers are not formulas
    "svg.hashsalt": "zsqdet",  # the same run gives the same file
}
styled = matplotlib.rc_context(STYLE)


@styled
def stage_one(history: Sequence[Row]) -> str:
    """The unweighted loss terms over the iterations of all passes, on a logarithmic axis."""
    places: list[int] = []
    passes: list[tuple[int, int]] = []  # where each begins, and its size
    for row in history:
        if row["iteration"] == 0:
            passes.append((places[-1] + 1 if places else 0, row["size"]))
        places.append(passes[-1][0] + row["iteration"])
    figure, axes = _axes(WIDE)
    terms = [name for name in history[0] if name not in ("size", "iteration")]
    for term, colour in zip(terms, COLOURS, strict=False):
        if any(row[term] > 0 for row in history):
            axes.plot(places, [row[term] for row in history], color=colour, label=term.replace("_", " "))
    for begin, size in passes:
        axes.axvline(begin, color=INK, linewidth=0.8, linestyle=":")
        axes.annotate(f" {size} pixels", (begin, 1.01), xycoords=("data", "axes fraction"), va="bottom")
    axes.set(yscale="log", xlabel="iteration")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _image(figure)


@styled
def training_losses(history: Sequence[Row]) -> str:
    """The weighted sum and its terms, epoch by epoch; epoch 0 has none."""
    rows = [row for row in history if "loss" in row]
    figure, axes = _axes(SMALL)
    for name, colour in zip(("loss", "logit", "feature", "task"), (INK, *COLOURS), strict=False):
        if name in rows[0]:
            axes.plot([r["epoch"] for r in rows], [r[name] for r in rows], color=colour, label=name, marker=".")
    axes.set(title="Training losses", xlabel="epoch", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return _image(figure)


@styled
def held_out(history: Sequence[Row], chosen: int) -> str:
    """The loss on the held-out images, with the epoch that was kept."""
    rows = [row for row in history if "held_out" in row]
    figure, axes = _axes(SMALL)
    axes.plot([r["epoch"] for r in rows], [r["held_out"] for r in rows], color=COLOURS[0], marker=".")
    best = next(row["held_out"] for row in rows if row["epoch"] == chosen)
    axes.plot([chosen], [best], "o", color=COLOURS[1], markersize=8, label=f"epoch {chosen} is kept")
    axes.set(title="Loss on held-out synthetic images", xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return _image(figure)


@styled
def step_changes(steps: Sequence[StepChange], side: str) -> str:
    """The relative change of the step sizes of one side: a dot for the mean, a line from least to most."""
    chosen = [step for step in steps if step.side == side]
    figure, axes = _axes(SMALL)
    for i, step in enumerate(chosen):
        ratio = (step.after / step.before - 1) * 100
        axes.plot([i, i], [float(ratio.min()), float(ratio.max())], color="#9ecae1", linewidth=1.2)
    means = [mean_change(step) * 100 for step in chosen]
    axes.plot(range(len(chosen)), means, ".", color=COLOURS[0])
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set(title=f"Steps of the {'weights' if side == 'weight' else 'inputs'}, change in %")
    _name_layers(axes, [step.layer for step in chosen])
    return _image(figure)


@styled
def output_errors(layers: Sequence[Row]) -> str:
    """A bar for the output error of each layer, coloured by its role; grey where a layer is not quantized."""
    figure, axes = _axes(WIDE)
    for role, colour in ROLES.items():
        places = [i for i, row in enumerate(layers) if row["role"] == role and not is_float(row)]
        if places:
            axes.bar(places, [layers[i]["output_error"] for i in places], color=colour, label=role)
    label = "not quantized"
    for i, row in enumerate(layers):
        if is_float(row):
            axes.axvspan(i - 0.5, i + 0.5, color=FAINT, linewidth=0, label=label)
            label = "_nolegend_"
    axes.set(ylabel="relative squared error")
    axes.margins(x=0.01)
    _name_layers(axes, [row["name"] for row in layers])
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _image(figure)


def _name_layers(axes: Axes, names: Sequence[str]) -> None:
    if len(names) <= NAMED:
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    else:
        axes.set_xlabel("layer, in the order of the table")


def _axes(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot()


def _image(figure: Figure) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(stream.getvalue()).decode()}"
