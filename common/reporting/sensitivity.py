"""The sensitivity of layers as a chart in a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.files import atomic
from common.quantization.sensitivity import Sensitivity
from common.reporting.figures import INK, ROLES, WIDE, new_axes, styled


@styled
def draw(found: Sequence[Sensitivity], path: Path) -> None:
    """Writes an SVG image: a bar for each layer at its planned bits, coloured by its role, and numbers at more bits.

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
    axes.set(yscale="log", xlabel="number of the quantized layer", ylabel="change of predictions")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    with atomic(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": None})
