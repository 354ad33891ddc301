"""The YOLO11 adapter against Ultralytics itself, and what it refuses."""

import os
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hostile.forge import pickled_yolo11
from test_pickled_yolo import narrow, saved, with_activation
from torch import nn
from ultralytics import YOLO
from ultralytics.nn.modules import DFL, C3k2
from ultralytics.nn.tasks import DetectionModel, SegmentationModel
from ultralytics.utils.loss import E2ELoss, SegmentLoss26, v8DetectionLoss, v8SegmentationLoss
from ultralytics.utils.ops import process_mask

from common.checkpoints.read import load_tensors, save_tensors
from common.config.schema import QuantizationConfig
from common.detection.masks import paste, resize_masks
from common.detection.roi_losses import ellipses
from common.detection.types import Targets
from common.quantization import calibrate, load_quantized, plan_layers, quantize, save_quantized
from common.runtime.errors import UserError
from yolo11 import adapter
from yolo11.export import Expectation, as_detections
from yolo11.loss import losses

ROOT = Path(__file__).parents[2]
MICRO = ROOT / "tools/shapes/micro_yolo11.safetensors"
SHARED = Path(os.environ.get("ZSQDET_SHARED", ROOT.parent / "shared"))
REAL = SHARED / "weights/yolo11n.pt"
needs_real = pytest.mark.skipif(not REAL.is_file(), reason=f"needs the real YOLO11n at {REAL}")


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))


@needs_real
def test_a_real_checkpoint_computes_what_ultralytics_computes(images):
    reference = YOLO(str(REAL)).model.float().eval()
    module = adapter.load(REAL).build()
    with torch.no_grad():
        assert torch.equal(module(images)[0], reference(images)[0])


def test_the_box_integral_stays_in_float_whatever_the_settings_say(images):
    detector = adapter.load(MICRO)
    module = detector.build()
    bits = {"weight_bits": 8, "activation_bits": 8}
    config = QuantizationConfig(float_roles=[], layers={"model.*": bits}, rounding="nearest", letterbox_padding=False)
    plan = plan_layers(detector, module, config)
    floats = [entry.name for entry in plan if not entry.is_quantized]
    assert floats == ["model.23.dfl.conv"]
    calibrate(detector, module, quantize(module, plan, config), plan, [images], config)
    with pytest.raises(UserError, match=r"quantization.layers: '\*dfl\*' matches only model.23.dfl.conv [^\n]*remove"):
        plan_layers(detector, module, QuantizationConfig(layers={"*dfl*": bits}))


@needs_real
def test_roles_of_the_real_yolo11n():
    detector = adapter.load(REAL)
    roles = [p.role for p in detector.quantization_policy(detector.build())]
    counted = {role: roles.count(role) for role in sorted(set(roles))}
    assert counted == {"body": 52, "early": 10, "first": 1, "head": 18, "output": 7}


def crowd(number, size):
    """Boxes from a few pixels to most of the image, many of them over each other."""
    generator = torch.Generator().manual_seed(number)
    sides = 3 + (0.8 * size - 3) * torch.rand(number, 2, generator=generator) ** 2
    corner = (size - sides) * torch.rand(number, 2, generator=generator)
    labels = torch.randint(8, (number,), generator=generator)
    return Targets(torch.cat([corner, corner + sides], 1), labels)


def test_the_losses_of_each_image_and_their_gradient_are_ultralytics_own():
    """Its criterion gets one image at a time; a batch of all would be normalised by the boxes of all."""
    detector = adapter.load(MICRO)
    module = detector.build()
    module.args = SimpleNamespace(box=7.5, cls=0.5, dfl=1.5)  # the gains of the official training
    images = torch.rand(4, 3, 96, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = [crowd(12, 96), crowd(0, 96), crowd(1, 96), crowd(40, 96)]
    ours = torch.stack(list(detector.head_output(module, images, targets).losses.values()), 1)
    (gradient,) = torch.autograd.grad(ours.sum(), images)

    criterion, rows = v8DetectionLoss(module), []
    for image, target in zip(images, targets, strict=True):
        module.model[-1].training = True  # raw maps; its BatchNorms stay as they are
        raw = module(image[None])
        boxes = target.boxes / torch.tensor([128, 96, 128, 96])
        centres = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)
        labels = target.labels.float()
        batch = {"batch_idx": torch.zeros_like(labels), "cls": labels, "bboxes": centres}
        rows.append(criterion.loss(raw, batch)[0])
    reference = torch.stack(rows)
    assert (reference[[0, 2, 3]] > 0).all()
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
    (expected,) = torch.autograd.grad(reference.sum(), images)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_autocast_rounds_the_network_and_not_its_losses():
    generator = torch.Generator().manual_seed(0)
    maps = [torch.zeros(2, 1, n, n) for n in (12, 6, 3)]
    scores, boxes = torch.randn(2, 189, 8, generator=generator), torch.randn(2, 189, 4, 16, generator=generator)
    exact = losses(maps, scores, boxes, torch.Size((96, 96)), [crowd(3, 96), crowd(5, 96)])
    with torch.autocast("cpu", torch.bfloat16):
        found = losses(maps, scores, boxes, torch.Size((96, 96)), [crowd(3, 96), crowd(5, 96)])
    for name, value in exact.items():
        torch.testing.assert_close(found[name], value)


def test_safetensors_of_another_family_are_refused(tmp_path):
    state, description = load_tensors(MICRO)
    save_tensors(tmp_path / "other.safetensors", state, description | {"family": "yolov5"})
    with pytest.raises(UserError, match=r"not a yolo11 detector \(family: yolov5\)"):
        adapter.load(tmp_path / "other.safetensors")


def test_weights_that_do_not_fit_their_architecture_are_refused(tmp_path):
    state, description = load_tensors(MICRO)
    state.pop("model.0.conv.weight")
    save_tensors(tmp_path / "cut.safetensors", state, description)
    with pytest.raises(UserError, match="do not fit this YOLO11"):
        adapter.load(tmp_path / "cut.safetensors")


@pytest.mark.parametrize("name", ["yolo11n.pt", "mine.pt"])
def test_a_missing_file_is_named_with_what_to_do(tmp_path, name, monkeypatch):
    monkeypatch.setattr("ultralytics.utils.ONLINE", False)
    with pytest.raises(UserError, match=f"{name} does not exist; (it can be downloaded when online|give the path)"):
        adapter.load(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_an_official_file_is_fetched_by_ultralytics_downloader_when_online(tmp_path, monkeypatch):
    asked = []

    def download(path):
        asked.append(path)
        Path(path).write_bytes(b"not a checkpoint")

    monkeypatch.setattr("ultralytics.utils.ONLINE", True)
    monkeypatch.setattr("ultralytics.utils.downloads.attempt_download_asset", download)
    with pytest.raises(UserError, match="not a PyTorch checkpoint"):
        adapter.load(tmp_path / "yolo11n.pt")
    assert asked == [tmp_path / "yolo11n.pt"]


def test_the_exported_module_decodes_what_ultralytics_decodes(images):
    detector = adapter.load(MICRO)
    with torch.no_grad():
        wanted = detector.build()(images)[0]
        (found,) = detector.export_module(detector.build())(images)
    assert torch.allclose(found, wanted, atol=1e-4)
    x = torch.randn(2, 64, 5, generator=torch.Generator().manual_seed(0)).double() * 300  # exp overflows without care
    with torch.no_grad():
        assert torch.allclose(Expectation(16).double()(x), DFL(16).double()(x), atol=1e-9)


@pytest.fixture
def segmentation(tmp_path):
    """A narrow segmentation model of Ultralytics, and the detector of its file."""

    def make(name):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = SegmentationModel(narrow(f"{name}-seg.yaml", max_channels=256), verbose=False).eval()
        model.end2end = hasattr(model.model[-1], "one2one_cv2")
        torch.save({"model": model}, tmp_path / "a.pt")
        model.args = SimpleNamespace(box=7.5, cls=0.5, dfl=1.5, overlap_mask=False, epochs=1)
        return model, adapter.load(tmp_path / "a.pt")

    return make


@pytest.mark.parametrize("name", ["yolo11n", "yolo26n"])
def test_the_losses_of_a_segmentation_model_are_ultralytics_own_on_each_image(segmentation, name):
    model, detector = segmentation(name)
    assert detector.has_masks
    images = torch.rand(3, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    targets = [crowd(3, 60), crowd(0, 60), crowd(5, 60)]
    targets = [Targets(t.boxes, t.labels % 2, ellipses(t.boxes, 64, 96)) for t in targets]
    ours = detector.head_output(detector.build(), images, targets).losses
    assert list(ours) == ["box", "mask", "cls", "l1" if name == "yolo26n" else "dfl"]
    assert (ours["mask"][[0, 2]] > 0).all()
    if name == "yolo26n":
        criterion, raw = E2ELoss(model, SegmentLoss26).one2one, model(images)[1]["one2one"]
    else:
        criterion, raw = v8SegmentationLoss(model), model(images)[1]
    for i, target in enumerate(targets):
        one = {k: [m[i : i + 1] for m in v] if k == "feats" else v[i : i + 1] for k, v in raw.items()}
        boxes = target.boxes / torch.tensor([96, 64, 96, 64])
        batch = {
            "batch_idx": torch.zeros(len(boxes)),
            "cls": target.labels.float(),
            "bboxes": torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1),
            "masks": resize_masks(target.masks, 16, 24).float(),
        }
        wanted = criterion.loss(one, batch)[0]
        torch.testing.assert_close(torch.stack([loss[i] for loss in ours.values()]), wanted[:4], rtol=1e-4, atol=1e-5)
    # A label without a mask has an ellipse.
    plain = detector.head_output(detector.build(), images, [Targets(t.boxes, t.labels) for t in targets]).losses
    assert all(torch.equal(plain[key], value) for key, value in ours.items())


def test_masks_are_where_ultralytics_has_them():
    """Blobs of some pixels to most of the image as prototypes, and boxes around them, inside and across the border."""
    y, x = torch.meshgrid(torch.arange(160.0), torch.arange(160.0), indexing="ij")
    centres = torch.tensor([[20.0, 30.0], [80, 90], [150, 20], [100, 140]])
    widths = torch.tensor([6.0, 40, 15, 25])
    distance = ((x - centres[:, 0, None, None]) ** 2 + (y - centres[:, 1, None, None]) ** 2).sqrt()
    prototypes = widths[:, None, None] - distance  # [4, 160, 160], above 0 inside of a disc
    boxes = torch.cat([centres - widths[:, None] - 1, centres + widths[:, None] + 2], 1) * 4
    rows = torch.cat([boxes, torch.ones(4, 2), torch.eye(4) * 3], 1)
    wanted = process_mask(prototypes, rows[:, 6:], boxes.clamp(0, 640), (640, 640), upsample=True).bool()
    (found,) = as_detections([rows], prototypes[None], 4.0)
    pasted = paste(found.masks, found.boxes, 640, 640)
    overlap = (pasted & wanted).sum((1, 2)) / (pasted | wanted).sum((1, 2))
    assert (overlap > torch.tensor([0.93, 0.98, 0.98, 0.98])).all()  # torchvision's pasting widens a box by a pixel
    (none,) = as_detections([rows[:0]], prototypes[None], 4.0)
    assert none.masks.shape[0] == 0


def test_a_segmentation_models_training_heads_are_dropped_and_the_rest_is_as_before(segmentation, images):
    model, detector = segmentation("yolo26n")
    module = detector.build()
    names = [name for name, _ in module.named_modules()]
    assert not any("one2one" in name or "semseg" in name for name in names)
    assert any("semseg" in name for name, _ in model.named_modules())
    roles = {p.name: p.role for p in detector.quantization_policy(module)}
    assert roles["model.23.proto.cv3.conv"] == roles["model.23.cv4.0.2"] == "output"
    assert roles["model.23.proto.upsample"] == roles["model.23.proto.feat_fuse.conv"] == "head"
    outputs = detector.export_module(detector.build())(images)
    assert [tuple(o.shape) for o in outputs] == [(2, 189, 38), (2, 32, 24, 24)]
    assert list(detector.export_outputs) == ["output0", "output1"]


def swapped(module):
    inside = module.model[6].m[0].m
    inside._modules = OrderedDict(reversed(inside._modules.items()))


COMPUTES_OTHERWISE = {
    "one more in a branch": (
        lambda m: m.model[-1].cv3[0].append(nn.ReLU()),
        r"model.23.cv3.0 has 0, 1, 2, 3 in it, and its YAML says 0, 1, 2;",
    ),
    "one more in a block": (lambda m: m.model[6].m[0].m.append(nn.Hardtanh()), "model.6.m.0.m has 0, 1, 2 in it"),
    "two that are swapped": (swapped, "model.6.m.0.m has 1, 0 in it, and its YAML says 0, 1;"),
    "a part that its class has not": (
        lambda m: m.model[0].add_module("more", nn.Identity()),
        "model.0 has conv, bn, act, more in it",
    ),
    "one whose name hides it": (
        lambda m: m.model[6].m[0].m._modules.update({"0.cv1": nn.ReLU()}),
        "model.6.m.0.m has a part that is named as none can be",
    ),
    "a setting in a tensor": (
        lambda m: setattr(m.model[2].m[0], "add", torch.tensor(not m.model[2].m[0].add)),
        "model.2.m.0 has add (True|False), and its YAML says (True|False)",
    ),
    "a setting of another kind": (
        lambda m: setattr(m.model[2].m[0], "add", "x"),
        "model.2.m.0 has add 'x', and its YAML says",
    ),
    "forward": (lambda m: setattr(m.model[0], "forward", m.model[0].forward_fuse), "model.0 has a function forward"),
    "another function": (
        lambda m: setattr(m.model[-1], "decode_bboxes", m.model[0].forward_fuse),
        "model.23 has a function decode_bboxes of its own, and its YAML says that of Detect",
    ),
    "forward of the network": (lambda m: setattr(m, "forward", m.model[0].forward), "the network has a function forw"),
    "strides in a list": (
        lambda m: setattr(m.model[-1], "stride", [8.0, 16.0, 64.0]),
        r"the head has strides \[8.0, 16.0, 64.0\], and its YAML says strides \[8, 16, 32\]",
    ),
    "a hook": (lambda m: m.model[4]._forward_hooks.update({0: "x"}), "model.4 has _forward_hooks, and its YAML"),
    "a hook before": (lambda m: m._forward_pre_hooks.update({0: "x"}), "the network has _forward_pre_hooks"),
    "the form of an activation": (
        lambda m: with_activation(nn.GELU("tanh"))(m),
        "model.0.act has approximate 'tanh', and its YAML says 'none'",
    ),
}


@pytest.mark.parametrize("kind", COMPUTES_OTHERWISE)
def test_modules_that_were_changed_to_compute_something_else_are_refused_by_name(kind, tmp_path):
    change, message = COMPUTES_OTHERWISE[kind]
    with pytest.raises(UserError, match=message) as caught:
        adapter.load(pickled_yolo11(tmp_path / "a.pt", lambda module: change(module) and None))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["models.other", "ultralytics.other", "torch.nn.modules.other"])
def test_a_block_of_another_package_is_not_taken_for_the_one_of_that_name(where, tmp_path, monkeypatch):
    kind = type("C3k2", (C3k2,), {"__module__": where})
    for i in range(1, where.count(".") + 2):
        name = ".".join(where.split(".")[:i])
        monkeypatch.setitem(sys.modules, name, sys.modules.get(name, ModuleType(name)))
    sys.modules[where].C3k2 = kind
    path = pickled_yolo11(tmp_path / "a.pt", lambda module: setattr(module.model[2], "__class__", kind))
    with pytest.raises(UserError, match=f"model.2 is a {where}.C3k2, and its YAML says a C3k2"):
        adapter.load(path)


def test_the_head_that_detects_is_compared_where_there_are_two(tmp_path):
    model = DetectionModel(narrow("yolo26n.yaml"), verbose=False).eval()
    model.end2end = True
    saved(model, tmp_path / "a.pt")
    model.model[-1].one2one_cv2[0].append(nn.ReLU())
    with pytest.raises(UserError, match=r"model.23.cv2.0 has 0, 1, 2, 3 in it, and its YAML says 0, 1, 2;"):
        saved(model, tmp_path / "a.pt")


def double_bins(module):
    module.model[-1].dfl.conv.weight.data.mul_(2)


def test_other_bins_than_those_that_an_export_has_are_refused_however_they_arrive(tmp_path):
    name = "model.23.dfl.conv.weight"
    message = rf"{name} holds other bins than 0, 1, 2, ..., which no training changes"
    state, about = load_tensors(MICRO)
    save_tensors(tmp_path / "a.safetensors", state | {name: state[name] * 2}, about)
    with pytest.raises(UserError, match=message):
        adapter.load(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=message):
        adapter.load(pickled_yolo11(tmp_path / "a.pt", double_bins))
    detector = adapter.load(MICRO)
    module, config = detector.build(), QuantizationConfig(rounding="nearest", batch_norm_correction=False)
    plan = plan_layers(detector, module, config)
    student = quantize(module, plan, config)
    calibrate(detector, module, student, plan, [torch.rand(1, 3, 64, 64)], config)
    double_bins(student)
    (tmp_path / "q").mkdir()
    save_quantized(tmp_path / "q", student, plan, "yolo11", detector.architecture, config)
    with pytest.raises(UserError, match=message):
        load_quantized(tmp_path / "q")
