"""Rounding of weights with second-order compensation: GPTQ (Frantar et al. 2022, arXiv 2210.17323)."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.quantization.hooks import Feed, watching
from common.quantization.layers import QuantLayer

SAMPLED_ROWS = 2**14  # input patches of a layer, over all batches
# Of the mean diagonal; the paper has .01. Synthetic images leave some inputs of a layer almost unused that real ones
# use, and errors must not be put there (measured in results/findings_calibration.md).
DAMPING = 0.03
HELD = 2**28  # numbers of Hessians in memory at once, 1 GiB; the batches run again for those of further layers
BLOCK = 32  # columns compensated together; the paper's 128 is for a GPU and takes up to twice the time here


def groups_of_layers(layers: Mapping[str, QuantLayer]) -> list[list[str]]:
    """The names in their order, in groups whose Hessians have at most `HELD` numbers, or of a single layer."""
    groups: list[list[str]] = []
    held = HELD
    for name, layer in layers.items():
        size = _groups(layer) * (layer.weight.shape[0] if _is_transposed(layer) else layer.weight[0].numel()) ** 2
        if held + size > HELD:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


@torch.no_grad()
def input_hessians(
    module: nn.Module, layers: Mapping[str, QuantLayer], batches: Sequence[Feed], wanted: Collection[str] | None = None
) -> dict[str, Tensor]:
    """X^T X / n of the rounded inputs X of each layer, [groups, d, d] with d weights of an output.

    Up to a factor it is the Hessian of the squared error of an output by its weights.
    At most about 2^14 patches of each layer are used, at places drawn anew for each batch.

    Args:
        module: with the layers in it.
        layers: by name; which ones there are decides which places are drawn.
        batches: to run.
        wanted: names of the layers whose Hessians are returned; all of them by default.
    """
    share = -(-SAMPLED_ROWS // len(batches))
    hessians: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)

    def add(name: str, x: Tensor) -> None:
        layer: Any = layers[name]
        places = _places(layer, x, share, generator)
        if wanted is not None and name not in wanted:
            return
        x = x if layer.input_quantizer is None else layer.input_quantizer(x)
        rows = _patches(layer, x, places)  # [groups, n, d]
        hessian = (rows.transpose(1, 2) @ rows).div_(rows.shape[1])
        hessians[name] = hessians[name].add_(hessian) if name in hessians else hessian

    with watching(module, layers, inputs=add):
        for run in batches:
            run(module)
    return hessians


def _groups(layer: Any) -> int:
    return layer.groups if isinstance(layer, nn.Conv2d) else 1


def _is_transposed(layer: nn.Module) -> bool:
    return isinstance(layer, nn.ConvTranspose2d)


def _places(layer: Any, x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Numbers of about `count` of the rows that the weights of an output are multiplied with, each once at most: of a
    convolution the same places in each image, of other layers any rows."""
    if isinstance(layer, nn.Conv2d):
        rows, count = math.prod(_output_size(layer, x)), -(-count // len(x))
    else:
        rows = x.numel() // x.shape[1 if _is_transposed(layer) else -1]
    return torch.randperm(rows, generator=generator)[:count].to(x.device)


def _output_size(layer: Any, x: Tensor) -> tuple[int, int]:
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    height, width = x.shape[2] + top + bottom, x.shape[3] + left + right
    return (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1


def _patches(layer: Any, x: Tensor, places: Tensor) -> Tensor:
    """The rows at `places` that the weights of an output are multiplied with, [groups, n, d]."""
    if not isinstance(layer, nn.Conv2d):
        x = x.permute(0, 2, 3, 1) if _is_transposed(layer) else x
        return x.reshape(-1, x.shape[-1])[places][None]
    width = _output_size(layer, x)[1]
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    x = F.pad(x, layer._reversed_padding_repeated_twice).permute(0, 2, 3, 1).contiguous()  # reads whole pixels
    down, right = (torch.arange(k, device=x.device) * d for k, d in ((kh, dh), (kw, dw)))
    rows = (places // width * sh)[:, None] + down.repeat_interleave(kw)  # [n, kh * kw]
    columns = (places % width * sw)[:, None] + right.repeat(kh)
    patches = x[:, rows, columns]  # [B, n, kh * kw, C]
    patches = patches.unflatten(3, (layer.groups, -1)).permute(3, 0, 1, 4, 2)
    return patches.reshape(layer.groups, patches.shape[1] * patches.shape[2], -1)


@torch.no_grad()
def compensate(weight: Tensor, scale: Tensor, levels: Tensor, hessian: Tensor) -> Tensor:
    """Moves weights so that rounding each to its nearest level gives a small error of the layer's output.

    Columns are taken in the order of falling diagonal of the Hessian; those after a column compensate for its rounding.

    Args:
        weight: [out, ...].
        scale: broadcastable to `weight`.
        levels: in units of the scale, rising: [k], or [n, k] with a row for each of the n elements of `scale`.
        hessian: [groups, d, d], from `input_hessians`.

    Returns:
        Weights of the same shape, not yet rounded; they lie within half a scale of the levels' range.
    """
    w = weight.reshape(len(hessian), -1, hessian.shape[1])
    scales = scale.expand_as(weight).reshape(w.shape)[..., :1]
    each = levels.expand(scale.numel(), -1)[owners(weight, scale, w)]
    return eliminate(w, scales, each, elimination(damped(hessian))).reshape(weight.shape)


def owners(weight: Tensor, scale: Tensor, rows: Tensor) -> Tensor:
    """The index of the element of `scale` that each row of a weight, laid out as `rows` [groups, out, d], has."""
    numbers = torch.arange(scale.numel(), device=scale.device).view_as(scale)
    return numbers.expand_as(weight).reshape(rows.shape)[..., 0]


def elimination(h: Tensor) -> tuple[Tensor, Tensor]:
    """The order of the columns [groups, d] and the upper Cholesky factor [groups, d, d] of the inverse of the damped
    Hessians `h` [groups, d, d] in that order."""
    order = h.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
    kind = h.dtype
    h = h.gather(1, order[:, :, None].expand_as(h)).gather(2, order[:, None].expand_as(h)).double()
    h = torch.linalg.cholesky(h)  # one name, so that at most two of them in float64 are in memory
    h = torch.cholesky_inverse(h)
    h = torch.linalg.cholesky(h, upper=True)
    return order, h.to(kind)


def eliminate(w: Tensor, scales: Tensor, levels: Tensor, by: tuple[Tensor, Tensor]) -> Tensor:
    """`compensate` for weights [groups, out, d] with scales [groups, out, 1] and levels [groups, out, k], by what
    `elimination` returned."""
    order, factor = by
    size = w.shape[2]
    w = w.gather(2, order[:, None].expand_as(w))
    scales_here, levels_here = scales.cpu(), levels.cpu().contiguous()
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        # Column by column is thousands of tiny operations, which a GPU starts more slowly than a CPU does them.
        block, block_factor = w[..., start:stop].cpu(), factor[:, start:stop, start:stop].cpu()
        errors = _compensate_block(block, scales_here, levels_here, block_factor).to(w.device)
        w[..., start:stop] = block.to(w.device)
        w[..., stop:] -= errors @ factor[:, start:stop, stop:]
    return w.gather(2, order.argsort(dim=1)[:, None].expand_as(w))


def _compensate_block(w: Tensor, scales: Tensor, levels: Tensor, factor: Tensor) -> Tensor:
    """`compensate` inside a block of columns, in place.

    Args:
        w: [groups, out, columns], changed.
        scales: [groups, out, 1].
        levels: [groups, out, k].
        factor: [groups, columns, columns], the block's part of the factor of `elimination`.

    Returns:
        Errors [groups, out, columns], in units of the factor's diagonal, which the columns after the block make up for.
    """
    errors = torch.empty_like(w)
    borders = (levels[..., 1:] + levels[..., :-1]) / 2
    low, high = ((levels[..., end] + beyond)[..., None] * scales for end, beyond in ((0, -0.499), (-1, 0.499)))
    for i in range(w.shape[-1]):
        column = w[..., i : i + 1]
        rounded = levels.gather(2, torch.searchsorted(borders, (column / scales).contiguous())).mul_(scales)
        error = (column - rounded) / factor[:, i : i + 1, i : i + 1]
        w[..., i + 1 :] -= error * factor[:, i : i + 1, i + 1 :]
        errors[..., i] = error[..., 0]
        column.clamp_(low, high)  # what is cut off is in the error as well
    return errors


def damped(hessian: Tensor) -> Tensor:
    """The Hessians [groups, d, d] with a share of their mean diagonal added to the diagonal, as in the paper."""
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    return hessian + torch.diag_embed(DAMPING * mean[:, None].expand(hessian.shape[:2]))
