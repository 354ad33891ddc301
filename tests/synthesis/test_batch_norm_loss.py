"""The BatchNorm statistics loss against a float64 reference."""

import copy

import pytest
import torch
from torch import nn
from toy.adapter import ToyDetector

from common.synthesis.batch_norm_loss import BatchNormLoss, channel_statistics


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
