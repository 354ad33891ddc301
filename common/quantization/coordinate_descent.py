"""Rounding of weights, with their scales, for the least error of a layer's output: GPTQ, then coordinate descent.

The scale of least error of the weights, where a quantizer starts, is not that of least error of the output. Coordinate
descent over the codes is QuantEase's (Behdin et al. 2023, arXiv 2309.01885), which cycles through the coordinates; here
each step takes the code of an output whose change lowers the error most.
"""

import torch
from torch import Tensor

from common.quantization.gptq import damped, eliminate, elimination, owners
from common.quantization.ranges import nearest

FACTORS = torch.linspace(0.7, 1.3, 11)  # of the scales of least error of the weights, all tried
ROUNDS = 3  # each fits the scales to the codes, then the codes to the scales
AT_A_TIME = 2**25  # weights for which several factors are tried together
LEAST = 1e-6  # a change of a code that pays less, relative to an error of a mean gap in a mean input, is not made


@torch.no_grad()
def coordinate_descent(weight: Tensor, scale: Tensor, levels: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Moves weights, and their scales, so that rounding each to its nearest level gives a small error of the output.

    Of eleven scales around the given one, the one is taken whose codes by GPTQ give the least squared error of the
    output. Then single codes change by one as long as that lowers it, and the scales are fitted to the codes.

    Args:
        weight: [out, ...], rows of `hessian`'s size behind one another.
        scale: broadcastable to `weight` and the same along a row.
        levels: in units of the scale, rising: [k], or [n, k] with a row for each of the n elements of `scale`.
        hessian: [groups, d, d], from `input_hessians`.

    Returns:
        Weights, not yet rounded (where a code was changed, the level itself), and scales, both of the given shapes.
    """
    w = weight.reshape(len(hessian), -1, hessian.shape[1])  # [G, R, d]
    owner = owners(weight, scale, w)  # [G, R]
    levels = levels.expand(scale.numel(), -1)[owner]  # [G, R, k]
    h = damped(hessian)
    by = elimination(h)
    moved, found = w, scale.flatten()  # `moved` in units of the scale
    least = torch.full_like(found, float("inf"))
    together = max(AT_A_TIME // w.numel(), 1)
    for factors in FACTORS.to(scale).split(together):
        many = w.repeat(1, len(factors), 1)
        tried = torch.outer(factors, scale.flatten())  # [F, scales]
        scales = tried[:, owner].transpose(0, 1).reshape(*many.shape[:2], 1)  # [G, F R, 1]
        each = levels.repeat(1, len(factors), 1)
        codes = eliminate(many, scales, each, by) / scales
        rounded = each.gather(2, nearest(codes, each)) * scales
        rows = _errors(rounded - many, h).view(len(w), len(factors), -1).transpose(0, 1)  # [F, G, R]
        for number, (factor_rows, some) in enumerate(zip(rows, tried, strict=True)):
            total = torch.zeros_like(least).index_add_(0, owner.flatten(), factor_rows.flatten())
            better = total < least
            least, found = torch.where(better, total, least), torch.where(better, some, found)
            part = codes.view(len(w), len(factors), -1, w.shape[2])[:, number]
            moved = torch.where(better[owner][..., None], part, moved)
    start = nearest(moved, levels)
    codes = _descend(start, w, found[owner][..., None], levels, h)
    for _ in range(ROUNDS):
        found = _fitted(levels.gather(2, codes), w, h, owner, found)
        codes = _descend(codes, w, found[owner][..., None], levels, h)
    moved = torch.where(codes == start, moved, levels.gather(2, codes))
    return (moved * found[owner][..., None]).reshape(weight.shape), found.view_as(scale)


def _fitted(values: Tensor, w: Tensor, h: Tensor, owner: Tensor, scales: Tensor) -> Tensor:
    """The scales of least error for the levels `values`, <w, values> / <values, values> with <a, b> = a H b; as before
    where all of them are zero."""
    moved = values @ h
    wanted, power = (
        torch.zeros_like(scales).index_add_(0, owner.flatten(), (moved * x).sum(2).flatten()) for x in (w, values)
    )
    fitted = wanted / power
    return torch.where((power > 0) & (fitted > 0), fitted, scales)


def _errors(difference: Tensor, h: Tensor) -> Tensor:
    """Squared error of the outputs [groups, out] from differences of weights [groups, out, d]."""
    return ((difference @ h) * difference).sum(2)


def _descend(codes: Tensor, w: Tensor, scales: Tensor, levels: Tensor, h: Tensor) -> Tensor:
    """Moves the code of each output whose move to the next level lowers its error most, until there is none or all had
    a turn. Codes are indices of levels."""
    diagonal = h.diagonal(dim1=1, dim2=2)[:, None]  # [G, 1, d]
    gaps = levels.diff(dim=2) * scales
    never = torch.full_like(gaps[..., :1], float("inf"))
    gaps = torch.cat([never, gaps, never], 2)  # from the level before, and from the last one
    slope = (levels.gather(2, codes) * scales - w) @ h  # [G, R, d], half the derivative by the weights
    mean_gap = (levels[..., -1:] - levels[..., :1]) * scales / (levels.shape[2] - 1)
    enough = -LEAST * (mean_gap.square() * diagonal).mean(2, keepdim=True)
    for _ in range(codes.shape[2]):
        fall, rise = gaps.gather(2, codes), gaps.gather(2, codes + 1)
        up = rise * (rise * diagonal + 2 * slope)
        down = fall * (fall * diagonal - 2 * slope)
        gain, place = torch.minimum(up, down).min(2, keepdim=True)
        rising = up.gather(2, place) < down.gather(2, place)
        move = torch.where(rising, rise.gather(2, place), -fall.gather(2, place)).masked_fill_(gain >= enough, 0)
        if not move.any():
            break
        codes = codes.scatter_add(2, place, move.sign().long())
        slope += move * h.gather(1, place.expand(-1, -1, h.shape[2]))
    return codes
