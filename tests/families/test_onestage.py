"""torchvision's one-stage detectors: its own losses for each image, its old and new files, what is refused.

That each of them detects as in torchvision is in test_what_loads.py.
"""

import argparse
import re

import pytest
import torch
from test_resnet import freeze, with_small_variances
from test_what_loads import make_smaller
from torchvision.models import detection

from common.checkpoints.rcnn_architecture import MOBILE
from common.checkpoints.read import save_tensors
from common.config.from_checkpoint import recognise
from common.config.load import load_config
from common.config.schema import EvaluationConfig
from common.detection import torchvision_parts
from common.detection.detector import load_detector
from common.detection.torchvision_parts import with_epsilon
from common.detection.types import Targets
from common.evaluation.resize import plan_batches, view
from common.reporting.info import describe
from common.runtime.errors import UserError
from common.runtime.files import sha256

SIZE = 64


@pytest.fixture
def of_torchvision(monkeypatch):
    make_smaller(monkeypatch)

    def build(name, **options):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return getattr(detection, name)(weights=None, weights_backbone=None, **options).eval()

    return build


@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn", "ssdlite320_mobilenet_v3_large"])
def test_the_losses_of_each_image_are_torchvisions_own_of_that_image_alone(of_torchvision, name, tmp_path):
    original = of_torchvision(name, num_classes=4)
    torch.save(original.state_dict(), tmp_path / "a.pth")
    detector = load_detector("onestage", tmp_path / "a.pth")
    images = torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[4.0, 6, 40, 50], [20, 20, 60, 44], [30, 2, 38, 9]])
    labels = [torch.tensor([0, 1, 2]), torch.zeros(0, dtype=torch.long), torch.tensor([2])]
    targets = [Targets(boxes[: len(k)], k) for k in labels]
    ours = detector.head_output(detector.build(), images, targets).losses

    sizes = (SIZE, SIZE)
    original.transform.min_size, original.transform.max_size, original.transform.fixed_size = (SIZE,), SIZE, sizes
    original.training = original.head.training = original.transform.training = True  # not the BatchNorms
    for i, target in enumerate(targets):
        wanted = original([images[i]], [{"boxes": target.boxes, "labels": target.labels + 1}])
        assert set(wanted) == set(ours)
        for loss, value in wanted.items():
            torch.testing.assert_close(ours[loss][i], value, rtol=1e-4, atol=1e-5)


def test_the_official_retinanet_has_names_of_an_older_version_and_frozen_batch_norms(of_torchvision, tmp_path):
    original = of_torchvision("retinanet_resnet50_fpn")
    freeze(original)
    state = original.state_dict()
    old = {re.sub(r"(_head\.conv)\.(\d)\.0\.", lambda m: f"{m[1]}.{2 * int(m[2])}.", k): t for k, t in state.items()}
    assert "head.regression_head.conv.6.bias" in old
    torch.save(old, tmp_path / "official.pth")
    detector = load_detector("onestage", tmp_path / "official.pth")
    assert detector.architecture["frozen_batch_norm"]
    assert (len(detector.class_names), detector.class_names[-1]) == (80, "toothbrush")
    module, images = detector.build(), torch.rand(1, 3, SIZE, SIZE)
    with torch.no_grad():
        levels = list(original.backbone(original.transform(list(images))[0].tensors).values())
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in state.items())
    assert len(levels) == len(detector.head_output(module, images).maps) == 5


@pytest.mark.parametrize(
    ("name", "resize", "size", "confidence"),
    [
        ("retinanet_resnet50_fpn", "shorter_side", 800, 0.05),
        ("fcos_resnet50_fpn", "shorter_side", 800, 0.2),
        ("ssdlite320_mobilenet_v3_large", "stretch", 320, 0.001),
    ],
)
def test_resizing_and_thresholds_are_torchvisions(of_torchvision, name, resize, size, confidence, tmp_path):
    original = of_torchvision(name, num_classes=3)
    torch.save(original.state_dict(), tmp_path / "a.pth")
    family, settings = recognise(tmp_path / "a.pth")
    found = settings["evaluation"]
    assert (family, found["resize"], found["image_size"]) == ("onestage", resize, size)
    assert found["confidence"] == original.score_thresh == confidence
    assert (found["iou"], found["max_detections"]) == (original.nms_thresh, original.detections_per_img)
    assert load_config(tmp_path / "a.pth").evaluation.resize == resize


def test_stretched_images_have_both_sides_of_that_size_and_boxes_come_back():
    config = EvaluationConfig(resize="stretch", image_size=64, batch_size=2)
    batches = plan_batches([(30, 60), (50, 20), (10, 10)], config, 32)
    assert [(b.indices, b.height, b.width) for b in batches] == [((0, 1), 64, 64), ((2,), 64, 64)]
    shown, placement = view(torch.full((3, 30, 60), 255, dtype=torch.uint8), config, batches[0])
    assert shown.shape == (3, 64, 64)
    torch.testing.assert_close(placement.back(torch.tensor([[0.0, 32, 64, 64]])), torch.tensor([[0.0, 15, 60, 30]]))


def test_what_has_no_batch_norm_or_is_something_else_is_refused_in_one_line(tmp_path):
    torch.save({"backbone.scale_weight": torch.zeros(512)}, tmp_path / "ssd300.pth")
    with pytest.raises(
        UserError, match=r"ssd300.pth: an SSD300 of torchvision, which has no BatchNorm.*give an SSDlite"
    ):
        load_detector("onestage", tmp_path / "ssd300.pth")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth: no RetinaNet, FCOS or SSDlite of torchvision"):
        load_detector("onestage", tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"does not exist; .* one of the official names retinanet_resnet50_fpn_coco"):
        load_detector("onestage", tmp_path / "missing.pth")


FROZEN = ["maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn"]


def frozen(of_torchvision, model, epsilon, outputs):
    """A detector whose epsilon counts, and the family it belongs to."""
    original = of_torchvision(model, num_classes=outputs)
    with_small_variances(original)
    freeze(original, epsilon)
    return original, "onestage" if model.startswith("retinanet") else "resnet"


@torch.no_grad()
def assert_as_before(loaded, original):
    batch = torch.rand(1, 3, 64, 64)
    for found, wanted in zip(loaded.build().backbone(batch).values(), original.backbone(batch).values(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("model", [*FROZEN, MOBILE[0]])
@pytest.mark.parametrize(("epsilon", "outputs"), [(0.0, 91), (1e-5, 3)])
def test_the_epsilon_of_frozen_batch_norms_can_be_given_and_must_be_where_nothing_says_it(
    of_torchvision, model, epsilon, outputs, tmp_path
):
    original, family = frozen(of_torchvision, model, epsilon, outputs)
    torch.save(original.state_dict(), tmp_path / "best.pth")
    named = {"model": model} if model in MOBILE else {}
    assert_as_before(load_detector(family, tmp_path / "best.pth", {"frozen_epsilon": epsilon} | named), original)
    if model in MOBILE:  # torchvision never changes it
        load_detector(family, tmp_path / "best.pth", named)
        return
    with pytest.raises(UserError, match=r"best.pth: does not say the epsilon .* set detector.frozen_eps") as said:
        load_detector(family, tmp_path / "best.pth")
    assert "\n" not in str(said.value)
    about = describe(tmp_path / "best.pth")
    assert (about["family"], about["needs a setting"][:20]) == (family, "does not say the eps")


@pytest.mark.parametrize("model", FROZEN)
@pytest.mark.parametrize(
    ("arguments", "epsilon"),
    [
        ({"weights": "COCO_V1", "weights_backbone": None}, 0.0),
        ({"weights": None, "weights_backbone": "IMAGENET1K_V1"}, 1e-5),
        ({"pretrained": True}, 0.0),
        ({"pretrained": False}, 1e-5),
    ],
)
def test_torchvisions_reference_training_says_the_epsilon_of_frozen_batch_norms(
    of_torchvision, model, arguments, epsilon, tmp_path
):
    original, family = frozen(of_torchvision, model, epsilon, 91)
    content = {"model": original.state_dict(), "args": argparse.Namespace(model=model, **arguments), "epoch": 25}
    torch.save(content, tmp_path / "model_25.pth")
    assert_as_before(load_detector(family, tmp_path / "model_25.pth"), original)


@pytest.mark.parametrize("model", [*FROZEN, MOBILE[0]])
def test_a_file_that_was_trained_as_another_model_of_the_same_tensors_is_refused(of_torchvision, model, tmp_path):
    original, family = frozen(of_torchvision, model, 0.0, 91)
    content = {"model": original.state_dict(), "args": argparse.Namespace(model="keypointrcnn_resnet50_fpn")}
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match=rf"a.pth: says that it was trained as 'keypoint.*', but has .* of {model}"):
        load_detector(family, tmp_path / "a.pth")


@pytest.mark.parametrize("model", FROZEN)
def test_the_official_file_is_known_by_its_sum_and_has_the_epsilon_of_torchvision(
    of_torchvision, model, tmp_path, monkeypatch
):
    original, family = frozen(of_torchvision, model, 0.0, 91)
    torch.save(original.state_dict(), tmp_path / "renamed.pth")
    part = sha256(tmp_path / "renamed.pth")[:8]
    monkeypatch.setattr(torchvision_parts, "official_files", lambda kinds: ("", {"a.pth": part}))
    assert_as_before(load_detector(family, tmp_path / "renamed.pth"), original)


@pytest.mark.parametrize(("model", "side", "proposals"), [(MOBILE[0], 320, 150), (MOBILE[1], 800, 1000)])
def test_of_two_models_with_the_same_tensors_the_file_or_the_configuration_says_which(
    of_torchvision, model, side, proposals, tmp_path
):
    state, other = of_torchvision(model, num_classes=3).state_dict(), MOBILE[1 - MOBILE.index(model)]
    torch.save({"model": state, "args": argparse.Namespace(model=model)}, tmp_path / "model_25.pth")
    torch.save(state, tmp_path / "best.pth")
    loaded = load_detector("resnet", tmp_path / "model_25.pth")
    assert loaded.build().rpn.pre_nms_top_n() == proposals
    assert recognise(tmp_path / "model_25.pth")[1]["evaluation"]["image_size"] == side
    config = load_config(tmp_path / "best.pth", [f"detector.model={model}"])
    assert config.evaluation.image_size == side
    assert load_detector("resnet", config.weights, config.detector.given).architecture == loaded.architecture
    about = {"family": "resnet", "architecture": loaded.architecture}
    save_tensors(tmp_path / "own.safetensors", loaded.state, about)
    assert load_config(tmp_path / "own.safetensors").evaluation.image_size == side
    with pytest.raises(UserError, match=rf"best.pth: the tensors of {MOBILE[0]} and of {MOBILE[1]}; set detector.mod"):
        load_detector("resnet", tmp_path / "best.pth")
    with pytest.raises(UserError, match=f"detector.model: found {other}, but .*model_25.pth is a {model}; leave it"):
        load_detector("resnet", tmp_path / "model_25.pth", {"model": other})


def test_a_model_that_is_given_for_other_tensors_is_refused(of_torchvision, tmp_path):
    torch.save(of_torchvision("fasterrcnn_resnet50_fpn").state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match=f"detector.model: found {MOBILE[0]}, but .*a.pth is another network; leave"):
        load_detector("resnet", tmp_path / "a.pth", {"model": MOBILE[0]})


OLD_NAMES = (  # as torchvision's files before 0.14 have them, and today's names
    (r"backbone\.fpn\.(inner|layer)_blocks\.(\d)\.0\.", r"backbone.fpn.\1_blocks.\2."),
    (r"rpn\.head\.conv\.0\.0\.", "rpn.head.conv."),
    (r"roi_heads\.mask_head\.(\d)\.0\.", lambda m: f"roi_heads.mask_head.mask_fcn{int(m[1]) + 1}."),
    (r"(head\.\w+_head\.conv)\.(\d)\.0\.", lambda m: f"{m[1]}.{2 * int(m[2])}."),
)


@pytest.mark.parametrize("model", [*FROZEN, "fasterrcnn_resnet50_fpn"])
def test_a_file_of_an_older_torchvision_is_read_as_torchvision_reads_it(of_torchvision, model, tmp_path):
    family = "onestage" if model.startswith("retina") else "resnet"
    original = of_torchvision(model, num_classes=91)
    old = dict(original.state_dict())
    for pattern, name in OLD_NAMES:
        old = {re.sub(pattern, name, key): tensor for key, tensor in old.items()}
    assert old.keys() != original.state_dict().keys()
    of_torchvision(model, num_classes=91).load_state_dict(old)  # all keys match
    torch.save(old, tmp_path / "old.pth")
    module = load_detector(family, tmp_path / "old.pth").build()
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in original.state_dict().items())
    torch.save(old | dict(original.state_dict()), tmp_path / "both.pth")
    with pytest.raises(
        UserError, match=r"both.pth: has .* twice, under an older name as well; give the file as it was"
    ):
        load_detector(family, tmp_path / "both.pth")


@pytest.mark.parametrize("arguments", [{"weights": torch.ones(3)}, {"pretrained": [1]}, {"weights": "DEFAULT"}])
def test_an_epsilon_that_the_training_contradicts_is_refused_whatever_its_arguments_are(
    of_torchvision, arguments, tmp_path
):
    original, family = frozen(of_torchvision, FROZEN[0], 0.0, 3)
    torch.save({"model": original.state_dict(), "args": {"model": FROZEN[0], **arguments}}, tmp_path / "a.pth")
    assert_as_before(load_detector(family, tmp_path / "a.pth"), original)
    with pytest.raises(UserError, match=r"detector.frozen_epsilon: found 1e-05, but .*a.pth says 0; leave it out"):
        load_detector(family, tmp_path / "a.pth", {"frozen_epsilon": 1e-5})


def test_a_resnet_50_that_is_given_as_a_backbone_is_asked_for_its_epsilon_as_well(of_torchvision, tmp_path):
    original, _ = frozen(of_torchvision, "fasterrcnn_resnet50_fpn", 0.0, 3)
    torch.save(original.state_dict(), tmp_path / "a.pth")
    architecture = {"model": "fasterrcnn", "frozen_batch_norm": True}
    asked = tmp_path / "a.pth", original.state_dict(), {}
    with pytest.raises(UserError, match="does not say the epsilon of its frozen BatchNorms"):
        with_epsilon(architecture, {"backbone": "resnet50"}, *asked, "fasterrcnn_resnet50_fpn")
    assert with_epsilon(architecture, {"backbone": "regnety_004"}, *asked, None) == architecture


def test_a_threshold_of_the_training_that_is_built_otherwise_is_refused(of_torchvision, tmp_path):
    state = of_torchvision(MOBILE[0], num_classes=3).state_dict()
    for threshold in (0.05, 0.5):
        arguments = argparse.Namespace(model=MOBILE[0], rpn_score_thresh=threshold)
        torch.save({"model": state, "args": arguments}, tmp_path / f"{threshold}.pth")
    load_detector("resnet", tmp_path / "0.05.pth")
    with pytest.raises(UserError, match=r"0.5.pth: was trained with rpn_score_thresh 0.5; .* is built with 0.05"):
        load_detector("resnet", tmp_path / "0.5.pth")


def test_of_two_states_in_one_file_the_averaged_one_is_taken_and_others_are_refused(of_torchvision, tmp_path):
    state = of_torchvision("fcos_resnet50_fpn").state_dict()
    averaged = {f"module.{name}": t + 1 if t.is_floating_point() else t for name, t in state.items()}
    torch.save({"model": state, "model_ema": {"n_averaged": torch.tensor(5), **averaged}}, tmp_path / "a.pth")
    found = load_detector("onestage", tmp_path / "a.pth").state
    assert all(torch.equal(found[name], averaged[f"module.{name}"]) for name in state)
    torch.save({"model": state, "state_dict": state}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a.pth: holds two states, under model and state_dict; give a file with one"):
        load_detector("onestage", tmp_path / "a.pth")


def test_an_epsilon_of_no_frozen_batch_norm_is_refused(of_torchvision, tmp_path):
    torch.save(of_torchvision("fasterrcnn_resnet50_fpn").state_dict(), tmp_path / "a.pth")
    with pytest.raises(
        UserError, match=r"detector.frozen_epsilon: found, but no BatchNorm of .*a.pth is frozen; leave"
    ):
        load_detector("resnet", tmp_path / "a.pth", {"frozen_epsilon": 0.0})
