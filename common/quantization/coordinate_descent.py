"""Rounding of weights, with their steps, for the least error of a layer's output: GPTQ, then single codes.

The step of least error of the weights, where `ranges.weight_range` starts, is not that of least error of the output.
The descent over single codes is that of QuantEase (Behdin et al. 2023, arXiv 2309.01885), which takes one code after
the other; here it is the one that pays most.
"""

import torch
from torch import Tensor

from common.quantization.gptq import damped, eliminate, elimination, owners
from common.quantization.levels import nearest

FACTORS = torch.linspace(0.7, 1.3, 11)  # of the steps of least error of the weights
ROUNDS = 3  # of fitting the steps to the codes and the codes to the steps
AT_A_TIME = 2**25  # weights for which several factors are tried together
LEAST = 1e-6  # a change of a code that pays less, relative to an error of a mean gap in a mean input, is not made


@torch.no_grad()
def refine(weight: Tensor, step: Tensor, levels: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
    """Moves weights, and their steps, so that rounding each to its nearest level gives a small error of the output.

    Of eleven steps around the given one that is taken whose codes by GPTQ give the outputs of this step the least
    squared error; then single codes change by one as long as that lowers it, and the steps are fitted to the codes.

    Args:
        weight: [out, ...], rows of `product`'s size behind one another.
        step: broadcastable to `weight` and the same along a row.
        levels: what is rounded to, in steps, rising: [k], or [steps, k] with a row for each element of `step`.
        product: [groups, d, d], of the inputs.

    Returns:
        Weights, not yet rounded (where a code was changed, in the middle of what has this code), and steps, both of the
        shapes that were given.
    """
    w = weight.reshape(len(product), -1, product.shape[1])  # [G, R, d]
    owner = owners(weight, step, w)  # [G, R]
    levels = levels.expand(step.numel(), -1)[owner]  # [G, R, k]
    h = damped(product)
    by = elimination(h)
    moved, found = w, step.flatten()  # `moved` in steps
    least = torch.full_like(found, float("inf"))
    together = max(AT_A_TIME // w.numel(), 1)
    for factors in FACTORS.to(step).split(together):
        many = w.repeat(1, len(factors), 1)
        tried = torch.outer(factors, step.flatten())  # [F, steps]
        steps = tried[:, owner].transpose(0, 1).reshape(*many.shape[:2], 1)  # [G, F R, 1]
        each = levels.repeat(1, len(factors), 1)
        codes = eliminate(many, steps, each, by) / steps
        rounded = each.gather(2, nearest(codes, each)) * steps
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
    return (moved * found[owner][..., None]).reshape(weight.shape), found.view_as(step)


def _fitted(values: Tensor, w: Tensor, h: Tensor, owner: Tensor, steps: Tensor) -> Tensor:
    """The steps of least error for these values in steps, <w, values> / <values, values> in the outputs; as before
    where all are zero."""
    moved = values @ h
    wanted, power = (
        torch.zeros_like(steps).index_add_(0, owner.flatten(), (moved * x).sum(2).flatten()) for x in (w, values)
    )
    fitted = wanted / power
    return torch.where((power > 0) & (fitted > 0), fitted, steps)


def _errors(difference: Tensor, h: Tensor) -> Tensor:
    """Squared error of the outputs [groups, out] from differences of weights [groups, out, d]."""
    return ((difference @ h) * difference).sum(2)


def _descend(codes: Tensor, w: Tensor, steps: Tensor, levels: Tensor, h: Tensor) -> Tensor:
    """Moves the code of each output whose move to the next level lowers its error most, until there is none or all had
    a turn. Codes are numbers of levels."""
    diagonal = h.diagonal(dim1=1, dim2=2)[:, None]  # [G, 1, d]
    gaps = levels.diff(dim=2) * steps
    never = torch.full_like(gaps[..., :1], float("inf"))
    gaps = torch.cat([never, gaps, never], 2)  # from the level before, and from the last one
    slope = (levels.gather(2, codes) * steps - w) @ h  # [G, R, d], half the derivative by the weights
    mean_gap = (levels[..., -1:] - levels[..., :1]) * steps / (levels.shape[2] - 1)
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
