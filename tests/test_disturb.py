"""Strong changes of training images: each against its formula, and what no labels may be used with."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from common.distillation.disturb import DRAWS, disturb

SIZE = 12
STILL = torch.tensor([0.9, 0, 0.9, 0, 0, 0, 0, 0.9, 0, 0, 0, 0, 0, 0, 0.9, 0, 0, 0.5])


@pytest.fixture
def images():
    return torch.rand(2, 4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).clamp(min=0.01)


def draws(**changed):
    """Draws that change nothing, but for those given as `_column=value`."""
    rows = STILL.repeat(4, 1)
    for name, value in changed.items():
        rows[:, int(name[1:])] = value
    return rows


def test_draws_above_every_chance_leave_an_image_as_it_is(images):
    torch.testing.assert_close(disturb(images[0], images[1], draws()), images[0])


def test_an_image_is_blended_with_its_partner(images):
    ours, theirs = images
    found = disturb(ours, theirs, draws(_0=0.2, _1=0.6))
    np.testing.assert_allclose(found.numpy(), 0.7 * ours.double() + 0.3 * theirs.double(), atol=1e-6)


def test_the_shrunk_partner_lies_inside_and_the_rest_is_kept(images):
    ours, theirs = images
    found = disturb(ours, theirs, draws(_2=0.1, _3=0.6, _4=0.1, _5=1.0, _6=0.0))
    height, width = 6, 3  # (.2 + .5 * .6) * 12 and (.2 + .5 * .1) * 12
    small = F.interpolate(theirs, (height, width), mode="bilinear", antialias=True)
    torch.testing.assert_close(found[..., :height, -width:], small)
    torch.testing.assert_close(found[..., height:, :], ours[..., height:, :])
    torch.testing.assert_close(found[..., :-width], ours[..., :-width])


def test_colours_change_by_gamma_saturation_and_gain(images):
    values = [0.1, 0.8, 0.3, 0.6, 0.2, 0.5, 0.9]
    found = disturb(images[0], None, draws(**{f"_{7 + i}": v for i, v in enumerate(values)}))
    x = images[0].double().numpy().clip(1e-3) ** np.exp(1.2 * 0.3)
    grey = x.mean(1, keepdims=True)
    gain = (1 + 1.2 * 0.1) * (1 + 0.8 * (np.array([0.2, 0.5, 0.9]) - 0.5))
    expected = (grey + 0.6 * (x - grey)) * gain[None, :, None, None]
    np.testing.assert_allclose(found.numpy(), expected.clip(0, 1), atol=1e-5)


def test_noise_has_the_drawn_deviation():
    grey = torch.full((4, 3, 64, 64), 0.5)
    noise = disturb(grey, None, draws(_14=0.1, _15=0.5, _16=0.3)) - 0.5
    assert float(noise.std()) == pytest.approx(0.03, rel=0.05)
    assert abs(float(noise.mean())) < 0.001


@pytest.mark.parametrize(("draw", "sign"), [(0.1, -1), (0.9, 1)])
def test_an_image_is_blurred_or_sharpened_by_its_difference_to_a_box_mean(images, draw, sign):
    found = disturb(images[0], None, draws(_17=draw))
    around = np.pad(images[0].double().numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    box = sum(around[..., i : i + SIZE, j : j + SIZE] for i in range(3) for j in range(3)) / 9
    x = images[0].double().numpy()
    np.testing.assert_allclose(found.numpy(), (x + sign * (x - box)).clip(0, 1), atol=1e-6)


def test_an_image_is_changed_alike_in_every_batch_and_stays_in_range(images):
    rows = torch.rand(4, DRAWS, generator=torch.Generator().manual_seed(1))
    together = disturb(images[0], images[1], rows)
    for i in range(4):
        alone = disturb(images[0, i : i + 1], images[1, i : i + 1], rows[i : i + 1])
        torch.testing.assert_close(alone[0], together[i])
    assert together.min() >= 0
    assert together.max() <= 1
    assert not torch.allclose(together, images[0], atol=0.01)


def test_where_labels_are_used_no_image_shows_another(images):
    rows = draws(_0=0.1, _1=0.9, _2=0.1, _3=0.9, _4=0.9)
    torch.testing.assert_close(disturb(images[0], None, rows), images[0])
    assert not torch.equal(disturb(images[0], images[1], rows), images[0])
