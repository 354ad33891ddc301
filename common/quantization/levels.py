"""Levels of a quantizer, in units of its scale: the nearest one, and the error of rounding to them."""

from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]  # element by element


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """The index of the nearest of the rising `levels` [..., k] for each value of x [..., n]: [..., n]."""
    return torch.searchsorted((levels[..., 1:] + levels[..., :-1]).div_(2), x.contiguous())


def sums_of(rows: Tensor, through: Function | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Rising values of rows [r, n] and the sums of the first 0, 1, ..., n of them and of their squares; float64.

    With `through` the sums are of what that function gives for the values.
    """
    values = rows.double().sort(1).values
    outputs = values if through is None else through(values)
    total, squares = (torch.nn.functional.pad(x.cumsum(1), (1, 0)) for x in (outputs, outputs.square()))
    return values, total, squares


def rounding_errors(sums: tuple[Tensor, Tensor, Tensor], levels: Tensor, through: Function | None = None) -> Tensor:
    """Squared error [r, candidates] of rows rounded to the nearest of rising levels [r, candidates, k].

    Args:
        sums: of the rows, from `sums_of`.
        levels: float.
        through: the function that `sums_of` had; the error is that of what it gives.
    """
    values, total, squares = sums
    rows, candidates, _ = levels.shape
    borders = torch.searchsorted(values, ((levels[..., 1:] + levels[..., :-1]) / 2).flatten(1))
    borders = torch.nn.functional.pad(borders.view(rows, candidates, -1), (1, 0))
    borders = torch.nn.functional.pad(borders, (0, 1), value=values.shape[1])
    levels = levels if through is None else through(levels)
    within = total.gather(1, borders.flatten(1)).view_as(borders).diff(dim=2)
    return squares[:, -1:] + (levels * (levels * borders.diff(dim=2) - 2 * within)).sum(2)
