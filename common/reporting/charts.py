"""Charts that compare several sets of labels, or several runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import MaxNLocator

from common.reporting.contents import Row
from common.reporting.figures import COLOURS, INK, NAMED, SMALL, WIDE, image, legend_above, new_axes, styled

if TYPE_CHECKING:
    from common.reporting.labels import Boxes

LOST, WON = COLOURS[1], COLOURS[2]
GRID = 16  # cells of the map of centres, along each side
MOST_BOXES = 25  # in an image; more are counted there
LONGEST_NAME = 28  # of a run in a legend
NUMBERED = 6  # runs: with more, numbers on the bars do not fit


@styled
def sizes(sets: Sequence[Boxes]) -> str:
    """A histogram of the sizes of boxes, each set by itself."""
    figure, axes = new_axes(SMALL)
    edges = np.linspace(0, 1, 21)
    for part, colour in zip(sets, COLOURS, strict=False):
        shares = np.histogram(part.sizes.clip(0, 1), edges)[0] / len(part.sizes)
        axes.stairs(shares, edges, color=colour, label=part.name, fill=len(sets) == 1, linewidth=1.8)
    axes.set(xlabel="size", ylabel="share of boxes")
    legend_above(axes)
    return image(figure)


@styled
def counts(sets: Sequence[Boxes]) -> str:
    """A histogram of the number of boxes in an image."""
    figure, axes = new_axes(SMALL)
    edges = np.arange(-0.5, MOST_BOXES + 1)
    for part, colour in zip(sets, COLOURS, strict=False):
        shares = np.histogram(part.counts.clip(max=MOST_BOXES), edges)[0] / len(part.counts)
        axes.stairs(shares, edges, color=colour, label=part.name, fill=len(sets) == 1, linewidth=1.8)
    axes.set(xlabel=f"boxes ({MOST_BOXES}: or more)", ylabel="share of images")
    legend_above(axes)
    return image(figure)


@styled
def positions(sets: Sequence[Boxes]) -> str:
    """Maps of the centres of boxes, darkest where most are."""
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
def classes(sets: Sequence[Boxes], class_names: Sequence[str]) -> str:
    """The share of each class among the boxes: a bar for the first set, a line over it for the second."""
    figure, axes = new_axes(WIDE)
    places = np.arange(len(class_names))
    for number, (part, colour) in enumerate(zip(sets, COLOURS, strict=False)):
        known = part.labels[part.labels >= 0]
        shares = np.bincount(known, minlength=len(class_names)) / max(len(known), 1)
        if number == 0:
            axes.bar(places, shares, color=colour, label=part.name)
        else:
            axes.plot(places, shares, "_", color=colour, markersize=7, markeredgewidth=2, label=part.name)
    if len(class_names) <= NAMED:
        axes.set_xticks(places, list(class_names), rotation=30, ha="right", parse_math=False)
    else:
        axes.set_xlabel("number of the class")
    axes.set_xlim(-0.8, len(class_names) - 0.2)
    axes.set(ylabel="share of boxes")
    legend_above(axes)
    return image(figure)


@styled
def class_changes(rows: Sequence[tuple[str, float]], limits: tuple[float, float]) -> str:
    """A bar for the change of the AP of each class, the first class on top; the axis goes from limit to limit."""
    figure, axes = new_axes(SMALL)
    places = range(len(rows))
    axes.barh(places, [change for _, change in rows], color=[(LOST, WON)[change >= 0] for _, change in rows])
    axes.set_yticks(places, [_short(name) for name, _ in rows], parse_math=False)
    axes.set(xlim=limits, ylim=(len(rows) - 0.5, -0.5), xlabel="change of AP")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.axvline(0, color=INK, linewidth=0.8)
    return image(figure)


@styled
def precision_of_runs(names: Sequence[str], rows: Mapping[str, Sequence[float | None]]) -> str:
    """Bars of AP: for each run one of each measured detector; None leaves a gap."""
    figure, axes = new_axes(WIDE)
    width = 0.8 / max(len(rows), 1)
    for number, ((title, values), colour) in enumerate(zip(rows.items(), (INK, *COLOURS), strict=False)):
        places = [i + (number - (len(rows) - 1) / 2) * width for i, v in enumerate(values) if v is not None]
        bars = axes.bar(places, [v for v in values if v is not None], width * 0.9, color=colour, label=title)
        if len(names) <= NUMBERED:
            axes.bar_label(bars, fmt="%.3f", fontsize=9)
    axes.set_xticks(range(len(names)), [_short(name) for name in names], rotation=20, ha="right", parse_math=False)
    axes.set(ylabel="AP")
    axes.margins(y=0.12)
    legend_above(axes)
    return image(figure)


@styled
def histories(names: Sequence[str], runs: Sequence[Sequence[Row]], key: str) -> str:
    """One curve of training for each run that has it."""
    figure, axes = new_axes(SMALL)
    styles = ("-", "--", ":", "-.")
    for number, (name, history) in enumerate(zip(names, runs, strict=True)):
        rows = [row for row in history if key in row]
        if rows:
            colour, style = COLOURS[number % len(COLOURS)], styles[number // len(COLOURS) % len(styles)]
            values = [row[key] for row in rows]
            axes.plot([row["epoch"] for row in rows], values, style, color=colour, marker=".", label=_short(name))
    axes.set(xlabel="epoch", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    legend_above(axes, columns=2)
    return image(figure)


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}\N{HORIZONTAL ELLIPSIS}"
