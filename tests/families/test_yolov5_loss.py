"""YOLOv5's loss against a plain reference: loops over levels, boxes, anchors and cells, in float64."""

import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from common.detection.types import Targets
from yolov5.loss import losses
from yolov5.model import AnchorHead

COCO_ANCHORS = [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119], [116, 90, 156, 198, 373, 326]]
STRIDES = (8, 16, 32)


def make_head(num_classes, anchors=COCO_ANCHORS, strides=STRIDES):
    head = AnchorHead(num_classes, anchors, [4] * len(anchors))
    head.anchors /= torch.tensor(strides).view(-1, 1, 1)
    return head


def make_maps(num_classes, height, width, batch=1, strides=STRIDES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(batch, 3 * (5 + num_classes), height // s, width // s) for s in strides]
    return [(torch.randn(size, generator=generator) * 1.5).requires_grad_() for size in sizes]


def ciou(box, other):
    """1 - CIoU's loss of two boxes given as centre and size (Zheng et al. 2020, eq. 10 and 11)."""
    (x, y, w, h), (x2, y2, w2, h2) = box, other
    across = max(min(x + w / 2, x2 + w2 / 2) - max(x - w / 2, x2 - w2 / 2), torch.zeros(()).double())
    down = max(min(y + h / 2, y2 + h2 / 2) - max(y - h / 2, y2 - h2 / 2), torch.zeros(()).double())
    union = w * h + w2 * h2 - across * down + 1e-7
    iou = across * down / union
    width = max(x + w / 2, x2 + w2 / 2) - min(x - w / 2, x2 - w2 / 2)
    height = max(y + h / 2, y2 + h2 / 2) - min(y - h / 2, y2 - h2 / 2)
    distance = ((x - x2) ** 2 + (y - y2) ** 2) / (width**2 + height**2 + 1e-7)
    shape = 4 / math.pi**2 * (torch.atan(w2 / h2) - torch.atan(w / h)) ** 2
    alpha = (shape / (shape - iou + 1 + 1e-7)).detach()
    return iou - distance - alpha * shape


def cells_of(x, y, columns, rows):
    """The cell of a centre and the nearer neighbours left, up, right and down of it, in the order that YOLOv5 has."""
    yield 0, int(x), int(y)
    if x % 1 < 0.5 and x > 1:
        yield 1, int(x - 0.5), int(y)
    if y % 1 < 0.5 and y > 1:
        yield 2, int(x), int(y - 0.5)
    if (columns - x) % 1 < 0.5 and columns - x > 1:
        yield 3, int(x + 0.5), int(y)
    if (rows - y) % 1 < 0.5 and rows - y > 1:
        yield 4, int(x), int(y + 0.5)


def reference(maps, target, num_classes, balance, anchors=COCO_ANCHORS, strides=STRIDES):
    """box, objectness and class of one image, from the formulas of utils/loss.py of YOLOv5 v7.0. Maps [1, C, h, w]."""
    box_loss = objectness_loss = class_loss = torch.zeros(()).double()
    for raw, row, stride, weight in zip(maps, anchors, strides, balance, strict=True):
        _, _, rows, columns = raw.shape
        grid = raw[0].double().view(3, 5 + num_classes, rows, columns)
        pairs = []
        for t, (x1, y1, x2, y2) in enumerate((target.boxes / stride).tolist()):
            for a in range(3):
                ratios = (x2 - x1) / (row[2 * a] / stride), (y2 - y1) / (row[2 * a + 1] / stride)
                if max(max(r, 1 / r) for r in ratios) < 4:
                    x, y = (x1 + x2) / 2, (y1 + y2) / 2
                    for order, i, j in cells_of(x, y, columns, rows):
                        pairs.append((order, a, t, min(i, columns - 1), min(j, rows - 1), (x, y, x2 - x1, y2 - y1)))
        wanted = torch.zeros(3, rows, columns).double()
        for _, a, t, i, j, (x, y, w, h) in sorted(pairs, key=lambda pair: pair[:3]):
            logits = grid[a, :, j, i]
            px, py = (2 * logits[k].sigmoid() - 0.5 for k in (0, 1))
            pw, ph = ((2 * logits[2 + k].sigmoid()) ** 2 * row[2 * a + k] / stride for k in (0, 1))
            other = [torch.tensor(v).double() for v in (x - i, y - j, w, h)]
            overlap = ciou((px, py, pw, ph), other)
            box_loss = box_loss + (1 - overlap) / len(pairs)
            wanted[a, j, i] = max(float(overlap.detach()), 0)
            if num_classes > 1:
                hot = torch.zeros(num_classes).double()
                hot[target.labels[t]] = 1
                class_loss = class_loss + binary_cross_entropy_with_logits(logits[5:], hot) / len(pairs)
        objectness_loss = objectness_loss + weight * binary_cross_entropy_with_logits(grid[:, 4], wanted)
    share, pixels = 3 / len(maps), maps[0].shape[2] * maps[0].shape[3] * strides[0] ** 2
    return {
        "box": 0.05 * share * box_loss,
        "objectness": share * pixels / 640**2 * objectness_loss,
        "class": 0.5 * share * num_classes / 80 * class_loss,
    }


def crowd(count, height, width, num_classes, seed):
    """Boxes of all sizes, many on top of each other, at the border and over it."""
    generator = torch.Generator().manual_seed(seed)
    number = torch.rand(count, 4, generator=generator)
    sides = torch.exp(math.log(4) + number[:, 2:] * math.log(min(height, width) / 4))
    centres = number[:, :2] * torch.tensor([width, height])
    centres[: count // 3] = centres[0].clone()
    centres[-2:] = torch.tensor([[width - 0.5, height - 0.5], [0.5, 0.5]])
    labels = torch.randint(num_classes, (count,), generator=generator)
    return Targets(torch.cat([centres - sides / 2, centres + sides / 2], 1), labels)


@pytest.mark.parametrize("num_classes", [1, 2, 7])
@pytest.mark.parametrize(("height", "width"), [(64, 96), (160, 160)])
def test_losses_and_gradients_are_those_of_the_formulas(height, width, num_classes):
    maps = make_maps(num_classes, height, width, batch=3)
    none = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    targets = [crowd(14, height, width, num_classes, seed=1), none, crowd(5, height, width, num_classes, seed=2)]
    ours = losses(make_head(num_classes), maps, STRIDES, targets)
    rows = [reference([m[i : i + 1] for m in maps], t, num_classes, (4, 1, 0.4)) for i, t in enumerate(targets)]
    for name in ("box", "objectness", "class"):
        wanted = torch.stack([row[name] for row in rows])
        assert (wanted[[0, 2]] > 0).all() or (name, num_classes) == ("class", 1)
        torch.testing.assert_close(ours[name].double(), wanted, rtol=1e-5, atol=1e-6)
        if not wanted.requires_grad:  # the class loss of a detector with one class
            assert not ours[name].requires_grad
            continue
        got, right = (
            torch.autograd.grad(v.sum(), maps, retain_graph=True, allow_unused=True) for v in (ours[name], wanted)
        )
        for a, b in zip(got, right, strict=True):
            assert (a is None) == (b is None) or not (a if b is None else b).any()
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_fourth_level_is_balanced_and_shared_as_in_the_large_detectors():
    strides = (8, 16, 32, 64)
    anchors = [*COCO_ANCHORS, [436, 615, 739, 380, 925, 792]]
    maps = make_maps(3, 128, 128, strides=strides)
    target = crowd(8, 128, 128, 3, seed=3)
    ours = losses(make_head(3, anchors, strides), maps, strides, [target])
    wanted = reference(maps, target, 3, (4, 1, 0.25, 0.06), anchors, strides)
    for name, value in wanted.items():
        torch.testing.assert_close(ours[name][0].double(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [160, 320, 640])
def test_the_weight_of_objectness_grows_with_the_area_of_the_image(size):
    maps = [torch.full((1, 21, size // s, size // s), -2.0) for s in STRIDES]
    none = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    found = losses(make_head(2), maps, STRIDES, [none])
    nothing_there = math.log1p(math.exp(-2))
    assert float(found["objectness"]) == pytest.approx((size / 640) ** 2 * 5.4 * nothing_there, rel=1e-5)
    assert float(found["box"]) == float(found["class"]) == 0


def test_a_box_without_extent_matches_nothing_and_makes_no_nan():
    maps = make_maps(2, 64, 64)
    flat = Targets(torch.tensor([[20.0, 20.0, 20.0, 20.0], [8.0, 8.0, 30.0, 8.0]]), torch.tensor([0, 1]))
    found = losses(make_head(2), maps, STRIDES, [flat])
    sum(value.sum() for value in found.values()).backward()
    assert found["box"].item() == found["class"].item() == 0
    assert all(torch.isfinite(m.grad).all() for m in maps)
