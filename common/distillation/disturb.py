"""Strong changes of training images, so that the student follows the teacher on more than the images there are.

A student that has to agree with its teacher needs no labels, and what the two are shown need not look real: blends of
images and strange colours keep a long training from learning a few images by heart ("function matching", Beyer et al.
2022, arXiv 2106.05237).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

DRAWS = 18  # random numbers for each image
NOISE = 0.06  # largest standard deviation of the noise
PASTED = (0.2, 0.7)  # sides of a pasted image, in sides of the image


def disturb(images: Tensor, partners: Tensor | None, draws: Tensor) -> Tensor:
    """Each image by itself: blended with its partner, the partner pasted in, other colours, noise, blur; all at random.

    Args:
        images: [B, 3, H, W] in [0, 1].
        partners: another image for each, of the same shape; None where labels are used, which would not fit any more:
            nothing is blended or pasted.
        draws: [B, 18] in [0, 1), random, on the CPU.

    Returns:
        Images of the same shape in [0, 1].
    """
    if partners is not None:
        images = _blended(images, partners, draws[:, :2])
        pasted = [_with(*given) for given in zip(images, partners, draws[:, 2:7].tolist(), strict=True)]
        images = torch.stack(pasted)
    images = _coloured(images, draws[:, 7:14])
    images = _noisy(images, draws[:, 14:17])
    return _sharpened(images, draws[:, 17]).clamp(0, 1)


def _blended(images: Tensor, partners: Tensor, draws: Tensor) -> Tensor:
    """Half of the images, up to one to one."""
    share = torch.where(draws[:, 0] < 0.5, draws[:, 1] / 2, 0.0)
    return torch.lerp(images, partners, _for_each(share, images))


def _with(image: Tensor, partner: Tensor, draws: Sequence[float]) -> Tensor:
    """The image [3, H, W] with its partner, shrunk, somewhere in it; half of the images."""
    use, *sides, right, down = draws
    if use >= 0.5:
        return image
    height, width = image.shape[1:]
    low, high = PASTED
    h, w = (max(round(side * (low + (high - low) * d)), 1) for side, d in zip((height, width), sides, strict=True))
    top, left = round((height - h) * down), round((width - w) * right)
    image = image.clone()
    small = F.interpolate(partner[None], (h, w), mode="bilinear", antialias=True)[0]
    image[:, top : top + h, left : left + w] = small
    return image


def _coloured(images: Tensor, draws: Tensor) -> Tensor:
    """Gamma .55 to 1.8, saturation 0 to 2, brightness .4 to 1.6, each colour .6 to 1.4 times; four images of five."""
    change = (draws[:, 0] < 0.8).float()
    gamma = torch.exp(1.2 * change * (draws[:, 1] - 0.5))
    saturation = 1 + change * (2 * draws[:, 2] - 1)
    gain = (1 + 1.2 * change * (draws[:, 3] - 0.5))[:, None] * (1 + 0.8 * change[:, None] * (draws[:, 4:] - 0.5))
    images = images.clamp(min=1e-3) ** _for_each(
        gamma, images
    )  # the power of zero has no finite gradient, nor needs one
    grey = images.mean(1, keepdim=True)
    return torch.lerp(grey, images, _for_each(saturation, images)) * _for_each(gain, images)


def _noisy(images: Tensor, draws: Tensor) -> Tensor:
    """White noise, half of the images."""
    deviation = torch.where(draws[:, 0] < 0.5, NOISE * draws[:, 1], 0.0)
    noise = []
    for seed in draws[:, 2].tolist():
        generator = torch.Generator(images.device).manual_seed(int(seed * 2**31))
        noise.append(torch.randn(images.shape[1:], generator=generator, device=images.device))
    return images + _for_each(deviation, images) * torch.stack(noise)


def _sharpened(images: Tensor, draws: Tensor) -> Tensor:
    """Three images of ten blurred with a box of three pixels, two of ten sharpened by as much."""
    amount = torch.where(draws < 0.3, -1.0, torch.where(draws > 0.8, 1.0, 0.0))
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3, 1)
    return images + _for_each(amount, images) * (images - blurred)


def _for_each(values: Tensor, images: Tensor) -> Tensor:
    """[B] or [B, 3] -> [B, 1 or 3, 1, 1] on the images' device."""
    return values.reshape(len(values), -1, 1, 1).to(images.device, non_blocking=True)
