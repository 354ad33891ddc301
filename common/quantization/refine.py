"""Rounding of weights, with their steps, for the least error of a layer's output: GPTQ, then single codes.

The step of least error of the weights, where `ranges.weight_range` starts, is not that of least error of the output.
The descent over single codes is that of QuantEase (Behdin et al. 2023, arXiv 2309.01885), which takes one code after
the other; here it is the one that pays most.
"""

import torch
from torch import Tensor

from common.quantization.gptq import damped, eliminate, elimination

FACTORS = torch.linspace(0.7, 1.3, 11)  # of the steps of least error of the weights
ROUNDS = 3  # of fitting the steps to the codes and the codes to the steps
AT_A_TIME = 2**25  # weights for which several factors are tried together
LEAST = 1e-6  # a change of a code that pays less, relative to an error of one step in a mean input, is not made


@torch.no_grad()
def refine(weight: Tensor, step: Tensor, low: int, high: int, product: Tensor) -> tuple[Tensor, Tensor]:
    """Moves weights, and their steps, so that rounding each to its nearest code gives a small error of the output.

    Of eleven steps around the given one that is taken whose codes by GPTQ give the outputs of this step the least
    squared error; then single codes change by one as long as that lowers it, and the steps are fitted to the codes.

    Args:
        weight: [out, ...], rows of `product`'s size behind one another.
        step: broadcastable to `weight` and the same along a row.
        low: smallest code.
        high: largest code.
        product: [groups, d, d], of the inputs.

    Returns:
        Weights, not yet rounded (where a code was changed, in the middle of what has this code), and steps, both of the
        shapes that were given.
    """
    w = weight.reshape(len(product), -1, product.shape[1])  # [G, R, d]
    # The number of each row's step, [G, R].
    owner = torch.arange(step.numel(), device=step.device).view_as(step).expand_as(weight).reshape(w.shape)[..., 0]
    h = damped(product)
    by = elimination(h)
    moved, found = w, step.flatten()  # `moved` in steps
    least = torch.full_like(found, float("inf"))
    together = max(AT_A_TIME // w.numel(), 1)
    for factors in FACTORS.to(step).split(together):
        many = w.repeat(1, len(factors), 1)
        tried = torch.outer(factors, step.flatten())  # [F, steps]
        steps = tried[:, owner].transpose(0, 1).reshape(*many.shape[:2], 1)  # [G, F R, 1]
        codes = eliminate(many, steps, low, high, by) / steps
        rows = _errors(codes.round() * steps - many, h).view(len(w), len(factors), -1).transpose(0, 1)  # [F, G, R]
        for number, (factor_rows, some) in enumerate(zip(rows, tried, strict=True)):
            total = torch.zeros_like(least).index_add_(0, owner.flatten(), factor_rows.flatten())
            better = total < least
            least, found = torch.where(better, total, least), torch.where(better, some, found)
            part = codes.view(len(w), len(factors), -1, w.shape[2])[:, number]
            moved = torch.where(better[owner][..., None], part, moved)
    codes = _descend(moved.round(), w, found[owner][..., None], low, high, h)
    for _ in range(ROUNDS):
        found = _fitted(codes, w, h, owner, found)
        codes = _descend(codes, w, found[owner][..., None], low, high, h)
    moved = torch.where(codes == moved.round(), moved, codes)
    return (moved * found[owner][..., None]).reshape(weight.shape), found.view_as(step)


def _fitted(codes: Tensor, w: Tensor, h: Tensor, owner: Tensor, steps: Tensor) -> Tensor:
    """The steps of least error for these codes, <w, codes> / <codes, codes> in the outputs; as before without codes."""
    moved = codes @ h
    wanted, power = (
        torch.zeros_like(steps).index_add_(0, owner.flatten(), (moved * x).sum(2).flatten()) for x in (w, codes)
    )
    fitted = wanted / power
    return torch.where((power > 0) & (fitted > 0), fitted, steps)


def _errors(difference: Tensor, h: Tensor) -> Tensor:
    """Squared error of the outputs [groups, out] from differences of weights [groups, out, d]."""
    return ((difference @ h) * difference).sum(2)


def _descend(codes: Tensor, w: Tensor, steps: Tensor, low: int, high: int, h: Tensor) -> Tensor:
    """Moves the code of each output whose move by one lowers its error most, until there is none or all had a turn."""
    diagonal = h.diagonal(dim1=1, dim2=2)[:, None]  # [G, 1, d]
    slope = (codes * steps - w) @ h  # [G, R, d], half the derivative by the weights
    curve = steps.square() * diagonal
    enough = -LEAST * curve.mean(2, keepdim=True)
    for _ in range(codes.shape[2]):
        up = (curve + 2 * slope * steps).masked_fill_(codes >= high, float("inf"))
        down = (curve - 2 * slope * steps).masked_fill_(codes <= low, float("inf"))
        gain, place = torch.minimum(up, down).min(2, keepdim=True)
        move = torch.where(up.gather(2, place) < down.gather(2, place), 1.0, -1.0).to(codes) * (gain < enough)
        if not move.any():
            break
        codes = codes.scatter_add(2, place, move)
        slope += move * steps * h.gather(1, place.expand(-1, -1, h.shape[2]))
    return codes
