"""The BatchNorm statistics loss of DeepInversion (arXiv 1912.08795) and ZeroQ (arXiv 2001.00281)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.detection.types import StatisticsLayer

# Below this |gamma| float32 cannot recover a channel's statistics from the folded output; the layer stays unfolded.
SMALLEST_GAMMA = 1e-3
VARIANCE_EPS = 1e-10  # keeps the gradient of sqrt finite for a constant channel; relative to the trained variance


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
