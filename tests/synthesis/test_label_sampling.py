"""Adaptive label sampling on constructed cases, images of 100 pixels."""

import torch

from common.config.schema import LabelSamplingConfig
from common.detection.types import Detections, Targets
from common.synthesis.label_sampling import relabel

CONFIG = LabelSamplingConfig(confidence=0.2, overlap=0.35, min_area=0.01, max_area=0.85)
LEFT, RIGHT, BELOW = [0.0, 0.0, 40.0, 40.0], [50.0, 0.0, 90.0, 40.0], [0.0, 50.0, 40.0, 90.0]


def labels(*rows):
    return Targets(torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows]))


def found(*rows):
    if not rows:
        return Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    return Detections(
        torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows]), torch.tensor([r[2] for r in rows])
    )


def rows(targets):
    return [(box, label) for box, label in zip(targets.boxes.tolist(), targets.labels.tolist(), strict=True)]


def test_a_confident_detection_elsewhere_becomes_a_label():
    edited = relabel(labels((LEFT, 1)), found((LEFT, 0.9, 1), (RIGHT, 0.5, 7)), 100, CONFIG)
    assert rows(edited) == [(LEFT, 1), (RIGHT, 7)]


def test_a_detection_must_be_above_the_confidence():
    edited = relabel(labels((LEFT, 1)), found((RIGHT, 0.2, 7)), 100, CONFIG)
    assert rows(edited) == [(LEFT, 1)]


def test_a_detection_on_a_label_changes_neither_its_box_nor_its_class():
    shifted = [2.0, 2.0, 42.0, 42.0]
    edited = relabel(labels((LEFT, 1)), found((shifted, 0.9, 5)), 100, CONFIG)
    assert rows(edited) == [(LEFT, 1)]


def test_overlap_is_counted_from_the_threshold_on():
    # IoU of a box with its part of width w is w / 40: .325 is new, .375 is not.
    for width, new in ((13.0, True), (15.0, False)):
        part = [0.0, 0.0, width, 40.0]
        edited = relabel(labels((LEFT, 1)), found((part, 0.9, 2)), 100, CONFIG)
        assert len(edited.labels) == 1 + new


def test_an_unsupported_label_goes_when_the_image_has_others():
    edited = relabel(labels((LEFT, 1), (RIGHT, 2)), found((LEFT, 0.9, 1)), 100, CONFIG)
    assert rows(edited) == [(LEFT, 1)]


def test_support_does_not_ask_for_the_class():
    edited = relabel(labels((LEFT, 1), (RIGHT, 2)), found((LEFT, 0.9, 8), (RIGHT, 0.9, 9)), 100, CONFIG)
    assert rows(edited) == [(LEFT, 1), (RIGHT, 2)]


def test_an_only_label_stays_without_support():
    edited = relabel(labels((LEFT, 1)), found((RIGHT, 0.9, 2)), 100, CONFIG)
    assert rows(edited)[0] == (LEFT, 1)


def test_the_best_supported_label_stays_where_none_is_supported():
    near = [60.0, 0.0, 72.0, 40.0]  # IoU .3 with RIGHT, none with the others
    edited = relabel(labels((LEFT, 1), (RIGHT, 2), (BELOW, 3)), found((near, 0.9, 5)), 100, CONFIG)
    assert rows(edited) == [(RIGHT, 2), (near, 5)]


def test_an_image_without_detections_or_labels_is_left_as_it_is():
    both = labels((LEFT, 1), (RIGHT, 2))
    assert rows(relabel(both, found(), 100, CONFIG)) == rows(both)
    assert rows(relabel(both, found((BELOW, 0.1, 1)), 100, CONFIG)) == rows(both)
    empty = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert len(relabel(empty, found((LEFT, 0.9, 1)), 100, CONFIG).labels) == 0


def test_new_labels_lie_strictly_between_the_areas():
    small, least, enough = [60.0, 60.0, 69.0, 69.0], [60.0, 60.0, 70.0, 70.0], [60.0, 60.0, 71.0, 71.0]
    for box, new in ((small, False), (least, False), (enough, True)):
        assert len(relabel(labels((LEFT, 1)), found((box, 0.9, 2)), 100, CONFIG).labels) == 1 + new
    large = [1.0, 1.0, 99.0, 99.0]  # .96 of the image
    assert len(relabel(labels((LEFT, 1)), found((large, 0.9, 2)), 100, CONFIG).labels) == 1


def test_one_new_object_does_not_get_two_classes():
    edited = relabel(labels((LEFT, 1)), found((RIGHT, 0.5, 7), (RIGHT, 0.8, 3), (BELOW, 0.3, 4)), 100, CONFIG)
    assert rows(edited) == [(LEFT, 1), (RIGHT, 3), (BELOW, 4)]


def test_new_labels_are_cut_at_all_borders():
    edited = relabel(labels((LEFT, 1)), found(([60.0, 50.0, 130.0, 110.0], 0.9, 2)), 100, CONFIG)
    assert rows(edited)[1] == ([60.0, 50.0, 100.0, 100.0], 2)
