"""The losses of synthesis (BatchNorm statistics, total variation, patch similarity) against float64 references."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from toy.adapter import ToyDetector

from common.detection.types import AttentionLayer
from common.synthesis import losses
from common.synthesis.losses import (
    BatchNormLoss,
    PatchSimilarityLoss,
    channel_statistics,
    similarity_entropy,
    total_variation,
)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_statistics_and_their_gradient_are_exact(layout):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(3, 5, 7, 6, generator=generator) * 2 + 3).contiguous(memory_format=layout).requires_grad_()
    weights = torch.randn(2, 5, generator=generator)
    exact = x.detach().double().requires_grad_()
    got = channel_statistics(x)
    wanted = exact.mean((0, 2, 3)), exact.var((0, 2, 3), correction=0)
    for value, reference in zip(got, wanted, strict=True):
        assert torch.allclose(value.double(), reference, rtol=1e-6)
    for mean, variance in (got, wanted):
        (mean * weights[0] + variance.sqrt() * weights[1]).sum().backward()
    assert x.grad.stride() == x.stride()
    assert torch.allclose(x.grad.double(), exact.grad, rtol=1e-4, atol=1e-8)


def unfolded(detector, module, images, kind):
    """The same losses by hooks on the BatchNorm layers of the untouched module, in float64."""
    module = copy.deepcopy(module).double()
    inputs = []
    norms = [module.get_submodule(layer.batch_norm) for layer in detector.statistics_layers(module)]
    for norm in norms:
        norm.register_forward_hook(lambda _, args, __: inputs.append(args[0]))
    module(images)
    losses = []
    for norm, x in zip(norms, inputs, strict=True):
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        if kind == "paper":
            losses.append((mean - norm.running_mean).norm() + (variance - norm.running_var).norm())
        else:
            sigma = (norm.running_var + norm.eps).sqrt()
            deviation = variance.sqrt() - norm.running_var.sqrt()
            losses.append((((mean - norm.running_mean) / sigma) ** 2 + (deviation / sigma) ** 2).mean())
    total = torch.stack(losses)
    falling = torch.tensor([1 / (i + 1) for i in range(len(losses))])
    return total.sum() if kind == "paper" else (total * falling).sum() / falling.sum(), losses[0]


@pytest.mark.parametrize("kind", ["normalized", "paper"])
@pytest.mark.parametrize("smallest_scale", [None, -0.01, 1e-6, 0.0])
def test_folded_losses_and_gradients_equal_the_unfolded_ones(kind, smallest_scale):
    detector = ToyDetector()
    module = detector.build()
    module.blocks[0].conv.bias = nn.Parameter(torch.linspace(-1, 1, 8))
    if smallest_scale is not None:
        module.blocks[1].bn.weight.data[2] = smallest_scale
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    exact = images.detach().double().requires_grad_()
    wanted = unfolded(detector, module, exact, kind)
    loss = BatchNormLoss(module, detector.statistics_layers(module))
    module(images)
    got = loss.losses(kind)
    for value, reference in zip(got, wanted, strict=True):
        assert value.item() == pytest.approx(reference.item(), rel=1e-5)
    (got[0] + 0.3 * got[1]).backward()
    (wanted[0] + 0.3 * wanted[1]).backward()
    assert (images.grad - exact.grad).abs().max() < 1e-4 * exact.grad.abs().max()


def test_folding_keeps_the_output_and_freezes_the_weights():
    detector = ToyDetector()
    module, untouched = detector.build(), detector.build()
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    BatchNormLoss(module, detector.statistics_layers(module))
    output = module(images)
    assert torch.allclose(output, untouched(images), atol=1e-5)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in module.modules())
    output.sum().backward()
    assert images.grad is not None
    assert all(not p.requires_grad and p.grad is None for p in module.parameters())


def test_activations_that_work_in_place_do_not_disturb_the_statistics():
    detector = ToyDetector()
    module = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.SiLU(inplace=True), nn.Conv2d(4, 4, 1))
    layer = type(detector.statistics_layers(module)[0])("0", "1")
    loss = BatchNormLoss(module, [layer])
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    module(images)
    loss.losses("normalized")[0].backward()
    assert images.grad.isfinite().all()


def test_statistics_of_the_training_data_have_no_distance():
    detector = ToyDetector()
    module = detector.build().train()
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for block in module.blocks:
        block.bn.momentum = None  # cumulative: the statistics of this one batch
        block.bn.reset_running_stats()
    module(images)
    for block in module.blocks:  # torch keeps the unbiased variance, the losses compare the biased one
        count = 4 * {0: 256, 1: 64, 2: 16}[list(module.blocks).index(block)]
        block.bn.running_var.mul_((count - 1) / count)
    # Later layers saw the batch's own normalisation, as they do again in eval mode with its statistics.
    loss = BatchNormLoss(module, detector.statistics_layers(module))
    module(images)
    assert loss.losses("normalized")[0] < 1e-4
    module(images * 0.5)
    assert loss.losses("normalized")[0] > 1e-2


def test_statistics_of_bfloat16_maps_are_float32():
    x = (torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(0)) + 3).bfloat16()
    mean, variance = channel_statistics(x)
    rows = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, rows.mean(1).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance, rows.var(1, correction=0).float(), rtol=1e-5, atol=0)


def reference(patches, shared_grid, points=10, h=0.01):
    """Entropies [B] of patches [B][windows] of [N, d], by loops."""
    similarities = []
    for image in patches:
        found = []
        for window in image:
            for a in window:
                for b in window:
                    found.append(float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)))
        similarities.append(np.array(found))
    entropies = []
    for own in similarities:
        scope = np.concatenate(similarities) if shared_grid else own
        x = np.linspace(scope.min(), scope.max(), points)
        p = np.array([np.mean(np.exp(-((v - own) ** 2) / (2 * h * h))) / math.sqrt(2 * math.pi * h * h) for v in x])
        y = -(p + 1e-4) * np.log(p + 1e-4)
        entropies.append(sum((x[i + 1] - x[i]) * (y[i] + y[i + 1]) / 2 for i in range(points - 1)))
    return np.array(entropies)


def patches(seed=0, images=3, windows=4, size=5, channels=6):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.2, 2, images).view(-1, 1, 1, 1)
    common = torch.randn(images, 1, 1, channels, generator=generator, dtype=torch.float64)
    return common + spread * torch.randn(images, windows, size, channels, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("chunk", [2**22, 60, 1])
@pytest.mark.parametrize("shared_grid", [False, True])
def test_the_entropy_is_that_of_the_formula(shared_grid, chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    x = patches()
    assert similarity_entropy(x, shared_grid).numpy() == pytest.approx(reference(x.numpy(), shared_grid), rel=1e-6)


@pytest.mark.parametrize("chunk", [2**22, 60])
def test_the_gradient_is_that_of_finite_differences_with_the_points_held(chunk, monkeypatch):
    """The ends of the range are constants, as in the published code; the pairs of a patch with itself never move."""
    monkeypatch.setattr(losses, "CHUNK", chunk)
    monkeypatch.setattr(losses, "BANDWIDTH", 0.1)
    x = patches(seed=1, windows=2).requires_grad_()
    extremes = torch.tensor([[1.0, 0.0], [1.0, 1e-3], [-1.0, 0.0]], dtype=torch.float64)  # fix the range at [-1, 1]
    anchor = extremes[None, None].expand(3, 1, 3, 2)

    def entropy(values):
        flat = torch.cat([values[..., :3, :2], anchor], 1)
        return similarity_entropy(flat, shared_grid=False)

    assert torch.autograd.gradcheck(entropy, (x,), atol=1e-5)


def test_each_image_by_itself_does_not_depend_on_its_batch():
    x = patches()
    whole = similarity_entropy(x, shared_grid=False)
    assert torch.allclose(whole, torch.cat([similarity_entropy(one[None], shared_grid=False) for one in x]))
    assert not torch.allclose(whole, similarity_entropy(x, shared_grid=True))


class Block(nn.Module):
    """Attention that gathers half of the image in each of two windows; its values are the tokens."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, tokens):
        return self.proj(tokens.reshape(-1, tokens.shape[1] // 2, tokens.shape[2])).reshape(tokens.shape)


@pytest.mark.parametrize("kind", ["normalized", "paper"])
def test_the_prior_takes_the_mean_of_heads_and_is_blind_to_the_projection(kind):
    module = nn.Sequential(Block(), Block())
    prior = PatchSimilarityLoss(module, [AttentionLayer(f"{i}", f"{i}.proj", 2) for i in range(2)])
    tokens = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    module(tokens)
    with torch.no_grad():
        inputs = [tokens, module[0](tokens)]
    expected = []
    for x in inputs:
        windows = x.detach().double().reshape(3, 2, 4, 2, 2).mean(3)  # image, window, token, head, channel -> no head
        windows = windows[:, :, 1:] if kind == "paper" else windows
        expected.append(reference(windows.numpy(), kind == "paper").mean())
    wanted = -np.mean(expected) if kind == "normalized" else -np.sum(expected)
    module(tokens)
    (loss,) = prior.losses(kind)
    assert loss.item() == pytest.approx(wanted, rel=1e-3)
    loss.backward()
    assert tokens.grad.abs().max() > 0
    assert all(p.grad is None for p in module.parameters())


def test_steps_along_the_gradient_raise_the_entropy():
    x = patches(seed=2).requires_grad_()
    before = similarity_entropy(x, shared_grid=False).detach()
    optimizer = torch.optim.Adam([x], lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        (-similarity_entropy(x, shared_grid=False).sum()).backward()
        optimizer.step()
    assert (similarity_entropy(x, shared_grid=False) > before + 0.01).all()


def test_total_variation_has_its_published_value_for_noise():
    # 10228.8 is printed in the published code for its first iteration with 32 images of uniform noise at 640 pixels.
    noise = torch.rand(2, 3, 320, 320, generator=torch.Generator().manual_seed(0))
    assert total_variation(noise, "paper").item() == pytest.approx(10228.8, rel=5e-3)


@pytest.mark.parametrize("kind", ["normalized", "paper"])
def test_total_variation_is_a_mean_over_images(kind):
    images = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    once, twice = (total_variation(images.repeat(n, 1, 1, 1), kind) for n in (1, 3))
    assert once.item() == pytest.approx(twice.item(), rel=1e-6)
    assert total_variation(torch.ones(1, 3, 8, 8), kind) == 0


def test_normalized_total_variation_is_the_mean_absolute_difference():
    ramp = torch.arange(10.0).expand(1, 3, 10, 10) / 10
    assert total_variation(ramp, "normalized").item() == pytest.approx(0.05)  # .1 across, 0 down


def test_the_gradient_of_normalized_total_variation_is_that_of_its_formula():
    images = torch.rand(2, 3, 7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    formula = ((images[..., 1:] - images[..., :-1]).abs().mean() + images.diff(dim=2).abs().mean()) / 2
    value = total_variation(images, "normalized")
    expected, found = (torch.autograd.grad(3 * x, images)[0] for x in (formula, value))
    assert value.item() == pytest.approx(formula.item(), rel=1e-12)
    torch.testing.assert_close(found, expected)
