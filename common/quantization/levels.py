"""Levels of a quantizer, in units of its scale: the nearest one, and the error of rounding to them."""

import torch
from torch import Tensor


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """The index of the nearest of the rising `levels` [..., k] for each value of x [..., n]: [..., n]."""
    return torch.searchsorted((levels[..., 1:] + levels[..., :-1]).div_(2), x.contiguous())


def sums_of(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rising values of rows [r, n] and the sums of the first 0, 1, ..., n of them and of their squares; float64."""
    values = rows.double().sort(1).values
    total, squares = (torch.nn.functional.pad(x.cumsum(1), (1, 0)) for x in (values, values.square()))
    return values, total, squares


def rounding_errors(sums: tuple[Tensor, Tensor, Tensor], levels: Tensor) -> Tensor:
    """Squared error [r, candidates] of rows rounded to the nearest of rising levels [r, candidates, k].

    `sums`: of the rows, from `sums_of`.
    """
    values, total, squares = sums
    rows, candidates, _ = levels.shape
    borders = torch.searchsorted(values, ((levels[..., 1:] + levels[..., :-1]) / 2).flatten(1))
    borders = torch.nn.functional.pad(borders.view(rows, candidates, -1), (1, 0))
    borders = torch.nn.functional.pad(borders, (0, 1), value=values.shape[1])
    within = total.gather(1, borders.flatten(1)).view_as(borders).diff(dim=2)
    return squares[:, -1:] + (levels * (levels * borders.diff(dim=2) - 2 * within)).sum(2)
