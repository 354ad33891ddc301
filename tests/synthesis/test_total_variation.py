"""Total variation against its definition and its published value."""

import pytest
import torch

from common.synthesis.total_variation import total_variation


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
