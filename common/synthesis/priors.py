"""What an image should look like to the detector: BatchNorm statistics and smoothness."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.detection.types import StatisticsLayer

# A channel scaled by less than this has lost its statistics in float32 after folding; its layer is left unfolded.
SMALLEST_SCALE = 1e-3
# Keeps the gradient of a square root finite for a channel that is constant; in units of the channel's variance.
VARIANCE_FLOOR = 1e-10


class _ChannelStatistics(torch.autograd.Function):
    """Mean and variance in one pass over the map; `torch.var_mean` takes four to twenty times as long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = torch.ops.aten.batch_norm_update_stats(x, None, None, 0.0)
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


class StatisticsPrior:
    """Compares the inputs of a module's BatchNorm layers with the statistics they were trained on.

    The module is changed for good: its weights are frozen, each BatchNorm is folded into its convolution, activations
    no longer work in place, and the named convolutions report their outputs. From those the statistics of the
    BatchNorm's input are recovered exactly, `x = mean + sigma * (y - beta) / gamma`, so that no BatchNorm is ever run.
    """

    terms = ("batch_norm", "first_batch_norm")

    def __init__(self, module: nn.Module, layers: Sequence[StatisticsLayer]) -> None:
        self.description = f"the statistics of {len(layers)} BatchNorms"
        module.eval().requires_grad_(False)
        part: Any
        for part in module.modules():
            if hasattr(part, "inplace"):
                part.inplace = False  # the map is needed again in the backward pass
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        references = []
        for index, layer in enumerate(layers):
            references.append(_fold(module, layer))
            module.get_submodule(layer.convolution).register_forward_hook(self._hook(index))
        self.sizes = [len(r[0]) for r in references]
        columns = [torch.cat(column) for column in zip(*references, strict=True)]
        self.centre, self.gain, self.variance, self.sigma = (c.float() for c in columns)
        falling = 1 / torch.arange(1, len(layers) + 1)
        self.depth_weights = falling / falling.sum()

    def _hook(self, index: int) -> Any:
        def remember(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._seen[index] = channel_statistics(output)

        return remember

    def to(self, device: torch.device) -> "StatisticsPrior":
        """Moves the references; the module is moved by its owner."""
        self.centre, self.gain = self.centre.to(device), self.gain.to(device)
        self.variance, self.sigma = self.variance.to(device), self.sigma.to(device)
        self.depth_weights = self.depth_weights.to(device)
        return self

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Error of the mean, and variance, of every channel's BatchNorm input in the last forward pass, [channels]."""
        seen = [self._seen[i] for i in range(len(self.sizes))]
        mean = torch.cat([m.float() for m, _ in seen])
        variance = torch.cat([v.float() for _, v in seen])
        return (mean - self.centre) * self.gain, variance * self.gain.square()

    def distances(self) -> tuple[Tensor, Tensor]:
        """Squared error of mean and of deviation, in units of the trained deviation, mean over channels; [layers]."""
        mean_error, variance = self.statistics()
        return self.relative(mean_error, variance)

    def relative(self, mean_error: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """`distances` of statistics from elsewhere, for instance pooled over several batches."""
        deviation = (variance / self.sigma.square() + VARIANCE_FLOOR).sqrt()
        wanted = self.variance.sqrt() / self.sigma
        return self._mean((mean_error / self.sigma).square()), self._mean((deviation - wanted).square())

    def _mean(self, values: Tensor) -> Tensor:
        return torch.stack([part.mean() for part in values.split(self.sizes)])

    def losses(self, kind: str) -> tuple[Tensor, Tensor]:
        """The loss over all layers and that of the first one, of the last forward pass; scalars.

        normalized: `distances`, mean and deviation added, averaged over layers with weights 1, 1/2, 1/3, ... in the
        order of `layers`. Early layers are few and their statistics say whether an image looks natural; in a plain
        mean the many late ones outvote them (measured in results/images.md). paper: unsquared L2 norms of the error of
        mean and of variance over the channels, summed over layers (arXiv 2507.16782, after DeepInversion).
        """
        if kind == "normalized":
            mean_error, deviation_error = self.distances()
            layers = mean_error + deviation_error
            return (layers * self.depth_weights).sum(), layers[0]
        mean_error, variance = self.statistics()
        layers = self._norm(mean_error) + self._norm(variance - self.variance)
        return layers.sum(), layers[0]

    def _norm(self, values: Tensor) -> Tensor:
        return torch.stack([torch.linalg.vector_norm(part) for part in values.split(self.sizes)])


class _Copy(nn.Module):
    """Keeps the convolution's output, which the gradient of its statistics needs, from being changed in place."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


def _fold(module: nn.Module, layer: StatisticsLayer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Folds one BatchNorm; returns centre and gain (float64, [C]) with `input - mean = (output - centre) * gain`, and
    the trained variance and deviation (with the layer's epsilon)."""
    convolution: Any = module.get_submodule(layer.convolution)
    norm: Any = module.get_submodule(layer.batch_norm)
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    sigma = (variance + norm.eps).sqrt()
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.double()
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.double()
    if gamma.abs().min() < SMALLEST_SCALE:
        return mean, torch.ones_like(mean), variance, sigma
    scale = gamma / sigma
    bias = torch.zeros_like(mean) if convolution.bias is None else convolution.bias.double()
    weight = convolution.weight.double() * scale.view(-1, 1, 1, 1)
    dtype = convolution.weight.dtype
    convolution.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    convolution.bias = nn.Parameter((beta + (bias - mean) * scale).to(dtype), requires_grad=False)
    module.set_submodule(layer.batch_norm, _Copy() if layer.overwritten else nn.Identity())
    return beta, sigma / gamma, variance, sigma


def total_variation(images: Tensor, kind: str) -> Tensor:
    """Roughness of images [B, 3, H, W], a scalar that depends on neither batch size nor, for noise, image size.

    normalized: mean absolute difference of horizontal and of vertical neighbours, averaged. paper: the sum of the
    Frobenius norms of the differences along both axes and both diagonals that a batch of 32 images of 640 pixels
    with the same mean square would have (arXiv 2507.16782, code; see presets.py).
    """
    across, down = images[..., 1:] - images[..., :-1], images[..., 1:, :] - images[..., :-1, :]
    if kind == "normalized":
        return (across.abs().mean() + down.abs().mean()) / 2
    falling = images[..., 1:, 1:] - images[..., :-1, :-1]
    rising = images[..., 1:, :-1] - images[..., :-1, 1:]
    differences = (across, down, falling, rising)
    published = 32 * 3 * 640 * 640
    return torch.stack([torch.linalg.vector_norm(d) * math.sqrt(published / d.numel()) for d in differences]).sum()
