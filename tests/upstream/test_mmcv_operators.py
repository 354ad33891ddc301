"""The stand-in for mmcv's compiled operators: known values, gradients, and what it refuses."""

import sys
from types import ModuleType

import pytest
import torch

from vit import ops

from mmcv.ops import batched_nms, nms, roi_align, soft_nms  # isort: skip  (after vit.ops)


def test_suppression_keeps_what_mmcvs_own_example_keeps():
    boxes = torch.tensor(
        [
            [49.1, 32.4, 51.0, 35.9],
            [49.3, 32.9, 51.0, 35.3],
            [49.2, 31.8, 51.0, 35.4],
            [35.1, 11.5, 39.1, 15.7],
            [35.6, 11.8, 39.3, 14.2],
            [35.3, 11.5, 39.9, 14.5],
            [35.2, 11.7, 39.7, 15.7],
        ]
    )
    scores = torch.tensor([0.9, 0.9, 0.5, 0.5, 0.5, 0.4, 0.3])
    kept, indices = nms(boxes, scores, 0.6)
    assert indices.tolist() == [0, 3, 4]  # IoU .81 with the fourth, .64 with the fifth
    assert kept[:, 4].tolist() == pytest.approx([0.9, 0.5, 0.5])


def test_an_offset_makes_sides_one_pixel_longer():
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]])  # IoU 0, or 1/2 where both are a pixel longer
    scores = torch.tensor([0.9, 0.8])
    assert nms(boxes, scores, 0.4, offset=0)[1].tolist() == [0, 1]
    assert nms(boxes, scores, 0.4, offset=1)[1].tolist() == [0]


def test_classes_do_not_suppress_each_other():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]] * 3)
    scores, classes = torch.tensor([0.5, 0.9, 0.7]), torch.tensor([0, 0, 1])
    _, indices = batched_nms(boxes, scores, classes, {"type": "nms", "iou_threshold": 0.5})
    assert indices.tolist() == [1, 2]


@pytest.mark.parametrize("aligned", [True, False])
def test_regions_of_a_ramp_have_the_values_of_its_formula(aligned):
    """Bilinear samples of a ramp are the ramp, and the mean of a bin's samples is its value at the bin's centre."""
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(20.0), indexing="ij")
    maps = (2 * x + 3 * y).expand(2, 1, 16, 20).clone()
    regions = torch.tensor([[0.0, 4.0, 6.0, 20.0, 22.0], [1.0, 8.0, 8.0, 24.0, 12.0]])
    pooled = roi_align(maps, regions, (2, 4), 0.5, 0, "avg", aligned)
    assert pooled.shape == (2, 1, 2, 4)
    shift = 0.5 if aligned else 0.0
    for i, (_, x1, y1, x2, y2) in enumerate((regions * 0.5).tolist()):
        for row in range(2):
            for column in range(4):
                centre_x = x1 + (column + 0.5) * (x2 - x1) / 4 - shift
                centre_y = y1 + (row + 0.5) * (y2 - y1) / 2 - shift
                assert pooled[i, 0, row, column].item() == pytest.approx(2 * centre_x + 3 * centre_y, rel=1e-5)


def test_the_gradient_of_roi_align_is_right():
    maps = torch.rand(2, 3, 8, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    regions = torch.tensor([[0.0, 1.2, 2.1, 12.0, 9.0], [1.0, 0.0, 0.0, 17.0, 15.5]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m: roi_align(m, regions, (3, 2), 0.5, 2, "avg", True), (maps,))


def test_half_precision_maps_are_pooled_at_float_precision():
    maps = torch.rand(1, 4, 12, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    regions = torch.tensor([[0.0, 1.7, 2.3, 40.9, 37.1]])
    half = roi_align(maps, regions, (7, 7), 0.25, 0, "avg", True)
    exact = roi_align(maps.float(), regions, (7, 7), 0.25, 0, "avg", True)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, exact.bfloat16())


def test_any_other_operator_is_refused_when_it_is_called():
    boxes, scores = torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.tensor([0.9])
    with pytest.raises(NotImplementedError, match="operator softnms needs mmcv with its compiled operators"):
        soft_nms(boxes, scores, 0.3)
    with pytest.raises(NotImplementedError, match="pool_mode='max'"):
        roi_align(torch.zeros(1, 1, 4, 4), torch.tensor([[0.0, 0.0, 0.0, 2.0, 2.0]]), (1, 1), 1.0, 0, "max", True)


def test_real_operators_win(monkeypatch):
    real = ModuleType(ops.NAME)
    monkeypatch.setitem(sys.modules, ops.NAME, real)
    assert ops.install() is real
    monkeypatch.delitem(sys.modules, ops.NAME)
    monkeypatch.setattr(ops, "find_spec", lambda name: object())
    with pytest.raises(ModuleNotFoundError):  # it is asked for by name, and here there is none
        ops.install()
