"""Losses of images beside the detector's own.

- The BatchNorm statistics loss of DeepInversion (arXiv 1912.08795) and ZeroQ (arXiv 2001.00281).
- Patch similarity entropy, for transformers, which have no BatchNorm (PSAQ-ViT, arXiv 2203.02250). Noise has the same
  similarity between all patches; an image with foreground and background does not. The density of the similarities is a
  Gaussian kernel estimate, its differential entropy is maximized.
- Total variation.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from common.detection.types import AttentionLayer, StatisticsLayer

# Below this |gamma| float32 cannot recover a channel's statistics from the folded output; the layer stays unfolded.
SMALLEST_GAMMA = 1e-3
VARIANCE_EPS = 1e-10  # keeps the gradient of sqrt finite for a constant channel; relative to the trained variance

# BANDWIDTH, POINTS and DENSITY_EPS are those of the published code.
BANDWIDTH = 0.01  # of the Gaussian kernel
POINTS = 10  # grid of the density estimate, from the smallest similarity to the largest
DENSITY_EPS = 1e-4  # added to the density, so that its logarithm is finite
CHUNK = 2**22  # most similarities in memory at once; the backward pass recomputes them (gradient checkpointing)
PUBLISHED_SHAPE = (32, 3, 640, 640)  # of the batch whose value the published loss weights are for


class _ChannelStatistics(torch.autograd.Function):
    """Mean and biased variance in one pass over the feature map; `torch.var_mean` is 4 to 20 times slower."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ones = (
            None if x.dtype == torch.float32 else x.new_ones(x.shape[1], dtype=torch.float32)
        )  # statistics in float32
        mean, variance = torch.ops.aten.batch_norm_update_stats(x, ones, ones, 0.0)
        ctx.save_for_backward(x, mean)
        return mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        of_mean, of_variance = gradients
        count = x.numel() // x.shape[1]
        # d mean / dx = 1/n and d variance / dx = 2 (x - mean) / n: an affine map per channel, hence one normalisation.
        # Some versions of torch refuse eps=0; a half and a half are exactly one.
        half = torch.full_like(mean, 0.5)
        return F.batch_norm(x, mean, half, of_variance * (2 / count), of_mean / count, eps=0.5)


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of a map [B, C, H, W] over the rest, [C] each, differentiable."""
    mean, variance = _ChannelStatistics.apply(x)
    return mean, variance


class BatchNormLoss:
    """Compares the batch statistics of every BatchNorm input with the running statistics.

    The module is modified in place: weights are frozen, each BatchNorm is folded into its convolution, activations are
    no longer in-place, and a forward hook reads the convolutions' outputs y. The input x of the BatchNorm is recovered
    from them, `x = running_mean + sigma * (y - beta) / gamma`, so that BatchNorm itself never runs.
    """

    terms = ("batch_norm", "first_batch_norm")

    def __init__(self, module: nn.Module, layers: Sequence[StatisticsLayer]) -> None:
        self.description = f"statistics of {len(layers)} BatchNorm layers"
        module.eval().requires_grad_(False)
        part: Any
        for part in module.modules():
            if hasattr(part, "inplace"):
                part.inplace = False  # the backward pass needs the convolution's output
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        references = []
        for index, layer in enumerate(layers):
            references.append(_fold(module, layer))
            module.get_submodule(layer.convolution).register_forward_hook(self._hook(index))
        self.sizes = [len(r[0]) for r in references]
        columns = [torch.cat(column) for column in zip(*references, strict=True)]
        self.offset, self.gain, self.variance, self.sigma = (c.float() for c in columns)
        falling = 1 / torch.arange(1, len(layers) + 1)
        shares = falling / falling.sum()
        self.weights = torch.cat([(s / n).expand(n) for s, n in zip(shares, self.sizes, strict=True)])  # [all channels]

    def _hook(self, index: int) -> Any:
        def remember(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._seen[index] = channel_statistics(output)

        return remember

    def to(self, device: torch.device) -> "BatchNormLoss":
        """Moves the running statistics to `device`; the caller moves the module."""
        self.offset, self.gain = self.offset.to(device), self.gain.to(device)
        self.variance, self.sigma = self.variance.to(device), self.sigma.to(device)
        self.weights = self.weights.to(device)
        return self

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Of every BatchNorm input in the last forward pass: error of the mean, and variance; [all channels] each."""
        seen = [self._seen[i] for i in range(len(self.sizes))]
        mean = torch.cat([m.float() for m, _ in seen])
        variance = torch.cat([v.float() for _, v in seen])
        return (mean - self.offset) * self.gain, variance * self.gain.square()

    def distances(self) -> tuple[Tensor, Tensor]:
        """Squared errors of mean and standard deviation over the running variance, channel means; [layers] each."""
        return self.relative(*self.statistics())

    def relative(self, mean_error: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """As `distances`, from given statistics [all channels], for instance those of several batches together."""
        of_mean, of_deviation = self._errors(mean_error, variance)
        return self._mean(of_mean), self._mean(of_deviation)

    def _errors(self, mean_error: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Of each channel [all channels]."""
        deviation = (variance / self.sigma.square() + VARIANCE_EPS).sqrt()
        wanted = self.variance.sqrt() / self.sigma
        return (mean_error / self.sigma).square(), (deviation - wanted).square()

    def _mean(self, values: Tensor) -> Tensor:
        return torch.stack([part.mean() for part in values.split(self.sizes)])

    def losses(self, kind: str) -> tuple[Tensor, Tensor]:
        """The loss over all layers, and that of the first layer alone, for the last forward pass; scalars.

        normalized: squared errors of mean and standard deviation (`distances`), averaged over layers with weights
        1, 1/2, 1/3, ... in the order of `layers`: the few early layers decide how natural an image looks, and a plain
        mean is dominated by the many deep ones.
        paper: L2 norms, not squared, of the errors of mean and variance over channels, summed over layers (as
        DeepInversion).
        """
        if kind == "normalized":
            of_mean, of_deviation = self._errors(*self.statistics())
            channels = of_mean + of_deviation
            return (channels * self.weights).sum(), channels[: self.sizes[0]].mean()
        mean_error, variance = self.statistics()
        layers = self._norm(mean_error) + self._norm(variance - self.variance)
        return layers.sum(), layers[0]

    def _norm(self, values: Tensor) -> Tensor:
        return torch.stack([torch.linalg.vector_norm(part) for part in values.split(self.sizes)])


class _Copy(nn.Module):
    """Replaces a folded BatchNorm whose output is overwritten in place: the hook needs the values before that."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


def _fold(module: nn.Module, layer: StatisticsLayer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Folds a BatchNorm into its convolution, in place.

    Returns:
        offset, gain: [C] with `input - running_mean = (output - offset) * gain`, output being the folded convolution's.
        variance, sigma: [C] running variance, and sqrt(running variance + eps). All float64.
    """
    convolution: Any = module.get_submodule(layer.convolution)
    norm: Any = module.get_submodule(layer.batch_norm)
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    sigma = (variance + norm.eps).sqrt()
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.double()
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.double()
    if gamma.abs().min() < SMALLEST_GAMMA:
        return mean, torch.ones_like(mean), variance, sigma
    scale = gamma / sigma
    bias = torch.zeros_like(mean) if convolution.bias is None else convolution.bias.double()
    weight = convolution.weight.double() * scale.view(-1, 1, 1, 1)
    dtype = convolution.weight.dtype
    convolution.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    convolution.bias = nn.Parameter((beta + (bias - mean) * scale).to(dtype), requires_grad=False)
    module.set_submodule(layer.batch_norm, _Copy() if layer.overwritten else nn.Identity())
    return beta, sigma / gamma, variance, sigma


class PatchSimilarityLoss:
    """Reads the attention output of each block (softmax times values) by hooks. The module's weights are frozen."""

    terms = ("patch_similarity",)

    def __init__(self, module: nn.Module, layers: Sequence[AttentionLayer]) -> None:
        module.eval().requires_grad_(False)
        self.description = f"patch similarity entropy of {len(layers)} blocks (no BatchNorm)"
        self._layers = list(layers)
        self._images = dict.fromkeys(range(len(layers)), 0)
        self._seen: dict[int, Tensor] = {}
        for index, layer in enumerate(layers):
            module.get_submodule(layer.block).register_forward_pre_hook(self._count(index))
            module.get_submodule(layer.projection).register_forward_pre_hook(self._remember(index))

    def _count(self, index: int) -> Any:
        def count(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._images[index] = len(inputs[0])

        return count

    def _remember(self, index: int) -> Any:
        def remember(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._seen[index] = inputs[0]

        return remember

    def to(self, device: torch.device) -> "PatchSimilarityLoss":
        """Nothing to move; as `BatchNormLoss.to`."""
        return self

    def entropies(self, kind: str) -> Tensor:
        """Patch similarity entropy of each block and image in the last forward pass, [blocks, B].

        normalized: over all patches, grid of each image by itself.
        paper: as the published code, which was written for ViT and DeiT: without the first patch of every window (their
        class token), and with one grid for the whole batch.
        """
        found = []
        for i, layer in enumerate(self._layers):
            heads = self._seen[i].float().unflatten(-1, (layer.heads, -1)).mean(-2)
            patches = heads.unflatten(0, (self._images[i], -1))  # [B, windows, N, d]
            if kind == "paper":
                patches = patches[:, :, 1:]
            found.append(similarity_entropy(patches, shared_grid=kind == "paper"))
        return torch.stack(found)

    def losses(self, kind: str) -> tuple[Tensor, ...]:
        """The negative entropy, mean over images; over blocks the mean (normalized) or the sum (paper); one scalar."""
        blocks = -self.entropies(kind).mean(1)
        return (blocks.mean() if kind == "normalized" else blocks.sum(),)


def similarity_entropy(patches: Tensor, shared_grid: bool) -> Tensor:
    """Differential entropy of the cosine similarities of all pairs of patches in a window, pooled over windows; [B].

    Never synchronizes with the device and holds at most CHUNK similarities at a time.

    Args:
        patches: [B, windows, N, d].
        shared_grid: whether all images use one grid for the density, from the smallest to the largest of all.
    """
    count, _, size, _ = patches.shape
    units = F.normalize(patches, dim=-1).split(max(CHUNK // (count * size * size), 1), 1)
    with torch.no_grad():
        bounds = [_similarities(part).aminmax(dim=1) for part in units]
        low = torch.stack([b.min for b in bounds]).amin(0)
        high = torch.stack([b.max for b in bounds]).amax(0)
        if shared_grid:
            low, high = low.min().expand(count), high.max().expand(count)
        points = low[:, None] + (high - low)[:, None] * torch.linspace(0, 1, POINTS, device=low.device)  # [B, POINTS]
    sums: Any = [
        checkpoint(_kernel_sums, part, points, use_reentrant=False, preserve_rng_state=False) for part in units
    ]
    pairs = patches.shape[1] * size * size
    density = torch.stack(sums).sum(0) / (pairs * math.sqrt(2 * math.pi) * BANDWIDTH) + DENSITY_EPS
    return torch.trapezoid(-density * density.log(), points, dim=1)


def _similarities(units: Tensor) -> Tensor:
    """Cosine similarities of unit vectors [B, windows, N, d], [B, windows * N * N]."""
    return (units @ units.transpose(-1, -2)).flatten(1)


def _kernel_sums(units: Tensor, points: Tensor) -> Tensor:
    """The unnormalized kernel density at each grid point, [B, POINTS]."""
    similarities = _similarities(units)
    scaled = [(similarities - point[:, None]) / BANDWIDTH for point in points.unbind(1)]
    return torch.stack([(-x.square() / 2).exp().sum(1) for x in scaled], 1)


class _TotalVariation(torch.autograd.Function):
    """The normalized one with its gradient, in half the passes over the images that autograd takes."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        total = images.new_zeros(())
        gradient = torch.zeros_like(images) if ctx.needs_input_grad[0] else None
        for axis in (2, 3):
            length = images.shape[axis] - 1
            difference = images.narrow(axis, 1, length) - images.narrow(axis, 0, length)
            total += difference.abs().mean() / 2
            if gradient is not None:
                share = difference.sign_().mul_(0.5 / difference.numel())
                gradient.narrow(axis, 1, length).add_(share)
                gradient.narrow(axis, 0, length).sub_(share)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0]


def total_variation(images: Tensor, kind: str) -> Tensor:
    """Total variation of images [B, 3, H, W], a scalar that depends on neither batch size nor, for noise, resolution.

    normalized: the mean absolute difference of neighbouring pixels, horizontal and vertical averaged.
    paper: the sum of the Frobenius norms of the differences along both axes and both diagonals (DeepInversion, arXiv
    1912.08795; arXiv 2507.16782), rescaled to a batch of PUBLISHED_SHAPE.
    """
    if kind == "normalized":
        value: Tensor = _TotalVariation.apply(images)
        return value
    across, down = images[..., 1:] - images[..., :-1], images[..., 1:, :] - images[..., :-1, :]
    falling = images[..., 1:, 1:] - images[..., :-1, :-1]
    rising = images[..., 1:, :-1] - images[..., :-1, 1:]
    differences = (across, down, falling, rising)
    published = math.prod(PUBLISHED_SHAPE)
    return torch.stack([torch.linalg.vector_norm(d) * math.sqrt(published / d.numel()) for d in differences]).sum()
