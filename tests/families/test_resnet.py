"""torchvision's two-stage detectors: the same detections, losses against torchvision's own, rows that align."""

import copy
import pickle
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import yaml
from torch import nn
from torchvision.models import detection, get_model_weights
from torchvision.models.detection.roi_heads import fastrcnn_loss, maskrcnn_loss
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d

from common.checkpoints import download
from common.checkpoints.rcnn_architecture import MODELS
from common.checkpoints.read import save_tensors
from common.config.load import load_config
from common.config.schema import QuantizationConfig, SynthesisConfig, TrainingConfig
from common.detection import torchvision_parts
from common.detection.detector import build_detector, load_detector
from common.detection.masks import paste
from common.detection.roi_losses import (
    box_head_losses,
    ellipses,
    expected_weights,
    mask_loss,
    mask_proposals,
    match_proposals,
    rpn_losses,
)
from common.detection.roi_outputs import MASK_PROPOSALS, PROPOSALS
from common.detection.torchvision_parts import class_indices
from common.detection.types import Targets
from common.distillation.trainer import train
from common.quantization import calibrate, plan_layers, quantize
from common.quantization.hooks import watching
from common.runtime.errors import UserError
from common.runtime.files import sha256
from common.synthesis import ImageSet, synthesize
from resnet.adapter import _Parts
from resnet.models import build_module, recognise

CONFIGS = Path(__file__).parents[2] / "configs/resnet"
SIZE = 96
MICRO = {"model": "maskrcnn_micro", "outputs": 4, "frozen_batch_norm": False}


@pytest.fixture(scope="module")
def detector():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = build_detector("resnet", MICRO)
        found.state = found.build().state_dict()
    return found


@pytest.fixture(scope="module")
def module(detector):
    return detector.build()


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def target():
    return Targets(torch.tensor([[8.0, 8.0, 60.0, 70.0], [40.0, 30.0, 90.0, 88.0]]), torch.tensor([1, 3]))


def everything_is_drawn(module):
    """A copy whose samplers take all anchors and proposals, so that torchvision's losses are not random."""
    copied = copy.deepcopy(module)
    copied.rpn.fg_bg_sampler.batch_size_per_image = 10**7
    copied.roi_heads.fg_bg_sampler.batch_size_per_image = 10**7
    return copied


def random_boxes(count, generator):
    corners = torch.rand(count, 2, generator=generator) * 60
    return torch.cat([corners, corners + 5 + torch.rand(count, 2, generator=generator) * 30], 1)


def test_proposal_losses_are_torchvisions_where_nothing_is_sampled(module):
    generator = torch.Generator().manual_seed(0)
    rpn, anchors = everything_is_drawn(module).rpn, random_boxes(400, generator)
    objectness, deltas = torch.randn(400, generator=generator), torch.randn(400, 4, generator=generator)
    labels, matched = rpn.assign_targets_to_anchors([anchors], [{"boxes": target().boxes}])
    wanted = rpn.compute_loss(objectness[:, None], deltas, labels, rpn.box_coder.encode(matched, [anchors]))
    ours = rpn_losses(rpn, anchors, objectness, deltas, target())
    assert (labels[0] >= 1).sum() >= 2
    torch.testing.assert_close(ours["objectness"], wanted[0])
    torch.testing.assert_close(ours["rpn_box"], wanted[1])


def test_region_losses_are_torchvisions_where_nothing_is_sampled(module):
    generator = torch.Generator().manual_seed(3)
    heads = everything_is_drawn(module).roi_heads
    boxes = torch.cat([random_boxes(200, generator), target().boxes + 2, target().boxes])
    logits, deltas = torch.randn(204, 4, generator=generator), torch.randn(204, 16, generator=generator)
    labels, matched, _ = match_proposals(heads, boxes, target())
    assert {1, 3} <= set(labels.tolist())
    regression = heads.box_coder.encode([target().boxes[matched]], [boxes])
    wanted = fastrcnn_loss(logits, deltas, [labels], regression)
    ours = box_head_losses(heads, boxes, logits, deltas.unflatten(1, (4, 4)), target())
    torch.testing.assert_close(ours["class"], wanted[0])
    torch.testing.assert_close(ours["box"], wanted[1])


def test_the_mask_loss_is_torchvisions(module, images):
    heads, masks = module.roi_heads, ellipses(target().boxes, SIZE, SIZE)
    boxes = torch.cat([target().boxes + 3, target().boxes])
    chosen, labels, matched = mask_proposals(heads, boxes, target())
    with torch.no_grad():
        logits = _Parts(module, images[:1], module.backbone(images[:1])).mask_head([chosen])
    wanted = maskrcnn_loss(logits, [chosen], [masks], [target().labels], [matched])
    torch.testing.assert_close(mask_loss(logits, chosen, labels, matched, masks), wanted)


def test_weights_are_the_mean_of_what_the_random_sampler_draws(module):
    sampler = copy.deepcopy(module.rpn.fg_bg_sampler)
    sampler.batch_size_per_image, sampler.positive_fraction = 16, 0.5
    labels = torch.tensor([1.0] * 20 + [0.0] * 60 + [-1.0] * 10)
    drawn = torch.zeros(90)
    torch.manual_seed(0)
    for _ in range(4000):
        positive, negative = sampler([labels])
        drawn += (positive[0] | negative[0]) / 16
    weights = expected_weights(labels == 1, labels == 0, 16, 0.5)
    assert torch.allclose(drawn / 4000, weights, atol=0.004)
    assert float(weights.sum()) == pytest.approx(1)


def test_an_ellipse_has_its_boxs_centre_and_area():
    boxes = torch.tensor([[10.0, 20.0, 70.0, 50.0]])
    mask = ellipses(boxes, 96, 96)
    rows, columns = mask[0].nonzero(as_tuple=True)
    assert int(mask.sum()) == pytest.approx(torch.pi / 4 * 60 * 30, rel=0.01)
    assert (columns + 0.5).double().mean() == pytest.approx(40, abs=0.01)
    assert (rows + 0.5).double().mean() == pytest.approx(35, abs=0.01)
    assert (int(columns.min()), int(columns.max()), int(rows.min()), int(rows.max())) == (10, 69, 20, 49)


def test_a_students_rows_are_about_the_teachers_regions(detector, module, images):
    student = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in student.rpn.head.parameters():
            parameter.mul_(-1)  # it would propose something else by itself
    reference = detector.head_output(module, images)
    alone = detector.head_output(student, images)
    aligned = detector.head_output(student, images, None, reference.proposals)
    assert not torch.equal(alone.proposals.boxes, reference.proposals.boxes)
    for name in ("classes", "boxes", "masks"):
        torch.testing.assert_close(aligned.terms[name].values, reference.terms[name].values)
    assert reference.terms["classes"].values.shape == (2, PROPOSALS, 4)
    assert reference.terms["masks"].values.shape == (2, MASK_PROPOSALS * 28 * 28, 1)


def test_the_features_that_are_compared_are_the_levels_of_the_fpn(detector, module, images):
    found = {}
    with torch.no_grad(), watching(module, detector.feature_layers(module), outputs=found.__setitem__):
        levels = module.backbone(images)
    assert len(found) == len(levels) - 1 == 4  # the last level is a pooled one
    assert all(torch.equal(mine, level) for mine, level in zip(reversed(found.values()), levels.values(), strict=False))


@pytest.mark.parametrize("name", MODELS)
def test_each_of_torchvisions_models_has_a_configuration_that_names_its_official_file(name):
    table = yaml.safe_load((CONFIGS.parent / "tables/models.yaml").read_text())["models"]
    model = table.get(name, f"configs/resnet/{name}.yaml")  # MobileNetV3's has a shorter name there
    file, words = (model, []) if isinstance(model, str) else (model["config"], [f"weights={model['weights']}"])
    config = load_config(CONFIGS.parents[1] / file, words)
    original = getattr(detection, name)(weights=None, weights_backbone=None)
    heads, transform = original.roi_heads, original.transform
    official = get_model_weights(name).COCO_V1.url
    assert config.weights.name == official.rpartition("/")[2]
    settings = config.evaluation
    assert settings.resize == "shorter_side"
    assert (settings.image_size, settings.longest_side) == (transform.min_size[0], transform.max_size)
    assert (settings.confidence, settings.iou) == (heads.score_thresh, heads.nms_thresh)
    assert settings.max_detections == heads.detections_per_img


@pytest.mark.parametrize(("name", "frozen", "count"), [(MODELS[0], True, 53), (MODELS[1], False, 53 + 8)])
def test_every_batch_norm_of_backbone_and_fpn_counts_frozen_ones_as_well(name, frozen, count):
    detector = build_detector("resnet", {"model": name, "outputs": 91, "frozen_batch_norm": frozen})
    module = detector.build()
    layers = detector.statistics_layers(module)
    assert len(layers) == count
    assert (layers[0].convolution, layers[0].batch_norm) == ("backbone.body.conv1", "backbone.body.bn1")
    for layer in layers:
        features = module.get_submodule(layer.batch_norm).num_features
        assert features == module.get_submodule(layer.convolution).out_channels


def test_filling_counts_for_nothing(detector, module, images):
    output = detector.head_output(module, images)
    valid = output.proposals.valid
    assert (output.terms["classes"].confidence[~valid] == 0).all()
    assert valid.any(1).all()


def test_coco_has_eighty_classes_at_the_outputs_of_their_ids():
    names, outputs = class_indices(91)
    assert (len(names), outputs[0], outputs[-1]) == (80, 1, 90)
    assert dict(zip(names, outputs, strict=True))["toothbrush"] == 90
    assert 12 not in outputs  # an id that COCO never used
    assert len(class_indices(21)[0]) == 20


@pytest.mark.parametrize("name", [MODELS[0], MODELS[4]])  # the others: test_what_loads.py
def test_official_files_are_recognised_and_detect_as_in_torchvision(name, tmp_path, monkeypatch):
    """With random weights; the v1 files of ResNet-50 have frozen BatchNorms with an epsilon of 0."""
    torch.manual_seed(0)
    original = getattr(detection, name)(weights=None, weights_backbone=None).eval()
    frozen = not name.endswith("_v2")
    if frozen:
        with_small_variances(original)
        freeze(original, 1e-5 if "mobilenet" in name else 0.0)
    torch.save(original.state_dict(), tmp_path / "weights.pth")
    part = sha256(tmp_path / "weights.pth")[:8]
    monkeypatch.setattr(torchvision_parts, "official_files", lambda kinds: ("", {"official.pth": part}))
    loaded = load_detector("resnet", tmp_path / "weights.pth")
    assert loaded.architecture == {"model": name, "outputs": 91, "frozen_batch_norm": frozen}
    module, batch = loaded.build(), torch.rand(1, 3, 128, 160)
    original.transform.min_size, original.transform.max_size = (128,), 160  # so that it resizes nothing
    original.roi_heads.score_thresh = 0.011
    with torch.no_grad():
        wanted = original(list(batch))[0]
    (found,) = loaded.detect(module, batch, 0.011, original.roi_heads.nms_thresh, 100)
    outputs = torch.tensor(class_indices(91)[1])
    kept = torch.isin(wanted["labels"], outputs)
    assert len(found.labels) == int(kept.sum()) > 0
    assert torch.equal(outputs[found.labels], wanted["labels"][kept])
    torch.testing.assert_close(found.scores, wanted["scores"][kept], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.boxes, wanted["boxes"][kept], rtol=1e-3, atol=1e-2)
    if "masks" in wanted:
        pasted = paste(found.masks, found.boxes, 128, 160)
        assert (pasted == (wanted["masks"][kept, 0] > 0.5)).float().mean() > 0.999


def with_small_variances(module):
    """Every BatchNorm as it is, and every fourth channel so that an epsilon of 1e-5 counts."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_var[::4], part.weight.data[::4] = 1e-5, 3e-3


def freeze(module, epsilon=0.0):
    """Replaces every BatchNorm by a frozen one; torchvision's official models with ResNet-50 have an epsilon of 0."""
    for parent in list(module.modules()):
        for name, part in list(parent.named_children()):
            if isinstance(part, nn.BatchNorm2d):
                frozen = FrozenBatchNorm2d(part.num_features, eps=epsilon)
                state = {k: v for k, v in part.state_dict().items() if k != "num_batches_tracked"}
                frozen.load_state_dict(state)
                setattr(parent, name, frozen)


def test_images_enter_the_network_as_torchvisions_own_transform_hands_them_over(detector, module):
    """Its normalisation and its padding, at a size that it resizes nothing of; with the same gradient to the pixels."""
    pictures = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(4))
    leaf, own = pictures.clone().requires_grad_(), pictures.clone().requires_grad_()
    transform = GeneralizedRCNNTransform(64, 96, module.transform.image_mean, module.transform.image_std).eval()
    objectness, _ = module.rpn.head(list(module.backbone(transform(list(leaf))[0].tensors).values()))
    wanted = torch.cat([level.permute(0, 2, 3, 1).flatten(1) for level in objectness], 1)
    found = detector.head_output(module, own).terms["objectness"].values[..., 0]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    wanted.square().sum().backward()
    found.square().sum().backward()
    torch.testing.assert_close(own.grad, leaf.grad, rtol=1e-4, atol=1e-7)


def test_a_detector_of_pascal_voc_has_its_twenty_classes(tmp_path):
    torch.manual_seed(0)
    original = detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=21)
    torch.save(original.state_dict(), tmp_path / "voc.pth")
    loaded = load_detector("resnet", tmp_path / "voc.pth", {"model": "fasterrcnn_mobilenet_v3_large_320_fpn"})
    assert (loaded.architecture["outputs"], loaded.class_names[0], loaded.class_names[19]) == (
        21,
        "aeroplane",
        "tvmonitor",
    )
    (found,) = loaded.detect(loaded.build(), torch.rand(1, 3, 64, 64), 0.01, 0.5, 100)
    assert len(found.labels)
    assert set(found.labels.tolist()) <= set(range(20))


def test_anything_else_is_refused_in_one_line(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth: none of torchvision's"):
        load_detector("resnet", tmp_path / "other.pth")
    (tmp_path / "harm.pth").write_bytes(pickle.dumps(print, protocol=2))
    with pytest.raises(UserError, match=r"harm\.pth: refused, its pickle asks for __builtin__\.print"):
        load_detector("resnet", tmp_path / "harm.pth")
    with pytest.raises(
        UserError, match="does not exist; give the path of a checkpoint, or one of the official names mask"
    ):
        load_detector("resnet", tmp_path / "missing.pth")
    assert recognise({"fc.weight": torch.zeros(1)}) is None


@pytest.mark.parametrize("kind", ["backbone", "anchors", "levels", "classes of masks"])
def test_what_cannot_be_rebuilt_from_a_state_dict_is_refused_with_the_reason(kind, tmp_path):
    """vision 978: another backbone or other anchors."""
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    options = {"num_classes": 5}
    if kind == "anchors":
        options["rpn_anchor_generator"] = AnchorGenerator(((32, 48),) * 5, ((0.5, 1.0),) * 5)
    name = "resnet34" if kind == "backbone" else "resnet50"
    levels = [2, 3, 4] if kind == "levels" else [1, 2, 3, 4]
    backbone = resnet_fpn_backbone(backbone_name=name, weights=None, returned_layers=levels)
    state = detection.FasterRCNN(backbone, **options).state_dict()
    if kind == "classes of masks":
        state["roi_heads.box_predictor.bbox_pred.bias"] = torch.zeros(40)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"do not fit torchvision's fasterrcnn.*other backbones and anchors") as caught:
        load_detector("resnet", tmp_path / "other.pth")
    assert "\n" not in str(caught.value)


def test_both_stages_run_and_leave_the_teacher_as_it_was(detector, tmp_path):
    """Images out of the detector, a W4A4 copy calibrated and trained on them."""
    save_tensors(tmp_path / "micro.safetensors", detector.state, {"family": "resnet", "architecture": MICRO})
    loaded = load_detector("resnet", tmp_path / "micro.safetensors")
    config = SynthesisConfig(
        num_images=4, image_size=64, batch_size=2, low_resolution_size=64, low_resolution_iterations=2, iterations=2,
        directory=tmp_path / "sets",
    )  # fmt: skip
    made = ImageSet(synthesize(loaded, config, seed=0, device=torch.device("cpu"), weights_sha256="0" * 64))
    teacher = loaded.build()
    before = copy.deepcopy(teacher.state_dict())
    settings = QuantizationConfig(weight_bits=4, activation_bits=4)
    plan = plan_layers(loaded, teacher, settings)
    student = quantize(teacher, plan, settings)
    batch, _ = made.batch(range(4), torch.device("cpu"))
    report = calibrate(loaded, teacher, student, plan, [batch], settings)
    errors = {row["name"]: row["output_error"] for row in report.layers if "output_error" in row}
    assert "roi_heads.mask_head.0.0" in errors
    assert all(0 < error < float("inf") for error in errors.values())
    training = TrainingConfig(epochs=1, batch_size=3, task_weight=0.1, holdout=0.2)
    train(loaded, teacher, student, made, training, seed=0, device=torch.device("cpu"), directory=tmp_path / "train")
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(torch.isfinite(value).all() for value in student.state_dict().values())


def test_the_published_code_leaves_the_last_block_the_finest_level_and_all_heads_in_float():
    module = build_module({"model": "maskrcnn_resnet50_fpn", "outputs": 91, "frozen_batch_norm": True})
    detector = build_detector("resnet", {"model": "maskrcnn_resnet50_fpn", "outputs": 91, "frozen_batch_norm": True})
    paper = QuantizationConfig(preset="paper", weight_bits=4, activation_bits=4)
    rounded = [entry.name for entry in plan_layers(detector, module, paper) if entry.weight_bits < 32]
    convolutions = [n for n, m in module.backbone.named_modules(prefix="backbone") if isinstance(m, nn.Conv2d)]
    left = (
        "backbone.body.conv1",
        "backbone.body.layer4.2.",
        "backbone.fpn.inner_blocks.0.",
        "backbone.fpn.layer_blocks.0.",
    )
    assert rounded == [name for name in convolutions if not name.startswith(left)]
    assert len(rounded) == 55
    default = plan_layers(detector, module, QuantizationConfig())
    assert [entry.name for entry in default if entry.weight_bits == 32] == [
        "backbone.body.conv1", "rpn.head.cls_logits", "rpn.head.bbox_pred", "roi_heads.box_predictor.cls_score",
        "roi_heads.box_predictor.bbox_pred", "roi_heads.mask_predictor.mask_fcn_logits",
    ]  # fmt: skip
    assert {"roi_heads.mask_predictor.conv5_mask", "roi_heads.box_head.fc6"} <= {e.name for e in default}


def test_an_official_file_that_is_missing_is_fetched_from_torchvisions_address(tmp_path, monkeypatch):
    asked = []

    def no_network(url, path, hash_prefix):
        asked.append((url, hash_prefix))
        raise URLError("no route to host")

    monkeypatch.setattr(download, "download_url_to_file", no_network)
    official = detection.MaskRCNN_ResNet50_FPN_Weights.COCO_V1.url
    name = official.rpartition("/")[2]
    with pytest.raises(UserError, match=r"cannot be fetched \(no route to host\)") as caught:
        load_detector("resnet", tmp_path / name)
    assert asked == [(official, "bf2d0c1e")]
    assert "\n" not in str(caught.value)
