"""The table of docs/your-own-checkpoint.md that says what loads: each model is built by its upstream, small and with
random weights, saved as that saves it, and taken through every stage; what does not load says why in one line."""

import functools
from pathlib import Path

import pytest
import timm
import torch
from hostile.forge import MICRO
from test_pickled_yolo import narrow, p6
from test_resnet import freeze
from test_yolov5 import description, write_checkpoint
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.rpn import AnchorGenerator, RPNHead
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool
from ultralytics.nn import tasks
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.ops import process_mask

from common.checkpoints.rcnn_architecture import MOBILE
from common.cli import main
from common.config.from_checkpoint import recognise
from common.config.schema import QuantizationConfig
from common.deployment.graph import Shape, export_graph
from common.detection import roi_outputs
from common.detection.detector import ExportableDetector, build_detector, has_masks, load_detector
from common.detection.masks import paste
from common.detection.roi_outputs import two_stage_output
from common.detection.torchvision_parts import OneImage
from common.detection.types import Targets
from common.quantization import calibrate, find_placement, plan_layers, quantize
from common.runtime.errors import UserError
from resnet import adapter as resnet_adapter
from vit import adapter as vit_adapter
from yolov5.model import YoloV5

PAGE = Path(__file__).parents[2] / "docs/your-own-checkpoint.md"
SIZE, SMALLER = 64, 32  # pixels; the smaller size for two-stage detectors, whose strides allow it
COLUMNS = ("synthesize", "quantize", "distil", "evaluate", "export")
CONFIDENCE, DETECTIONS = 0.02, 10
SIZES = {"min_size": SMALLER, "max_size": SMALLER}
ANCHORS = [[8, 12], [16, 20], [24, 28], [32, 40], [50, 60]]
ON_TIMM = {"anchor_sizes": ANCHORS, "aspect_ratios": [0.5, 1.0]}
EIGHT_BITS = QuantizationConfig(  # by formulas alone, which are quick
    rounding="nearest", scale_init="lsq", activation_range="symmetric", letterbox_padding=False,
    batch_norm_correction=False,
)  # fmt: skip


def image(size):
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))


def spread(model):
    """Random last layers, so that no two scores are equal."""
    for part in model.modules():
        if isinstance(part, nn.Conv2d | nn.Linear) and part.bias is not None:
            part.bias.normal_(std=0.5)
    return model.eval()


@torch.no_grad()
def ultralytics(name, path):
    """A narrow model of Ultralytics, its .pt file, and what it detects itself: rows of box, score and class."""
    width = 0.25 if name.startswith("yolo12") else 0.125
    kind = tasks.SegmentationModel if name.endswith("-seg") else tasks.DetectionModel
    if name == "yolov5n-seg":  # published without a file of its network
        yaml = narrow("yolov5n.yaml")
        yaml["head"][-1] = [yaml["head"][-1][0], 1, "Segment", ["nc", 32, 256]]
    else:
        yaml = narrow(f"{name}.yaml", max_channels=256)
    model = kind(yaml | {"width_multiple": width}, verbose=False)
    spread(model.model[-1])
    model.eval().names = {0: "a", 1: "b"}
    if hasattr(model.model[-1], "one2one_cv2"):
        model.end2end = True
    torch.save({"model": model}, path)
    rows, prototypes = model(image(SIZE))[0], None
    if name.endswith("-seg"):
        rows, prototypes = rows
    if not model.end2end:
        rows = non_max_suppression(rows, CONFIDENCE, 0.7, multi_label=True, max_det=DETECTIONS, nc=2)
    rows = rows[0][rows[0][:, 4] > CONFIDENCE][:DETECTIONS]
    if prototypes is None:
        return rows, None
    rows[:, :4].clamp_(0, SIZE)
    return rows[:, :6], process_mask(prototypes[0], rows[:, 6:], rows[:, :4], (SIZE, SIZE), upsample=True)


def original_yolov5(yaml, path):
    """YOLOv5's own modules are no package: tests/families/test_yolov5.py compares with their formulas."""
    write_checkpoint(path, YoloV5(yaml, 3), ["a", "b", "c"], yaml=yaml)


@torch.no_grad()
def torchvision(name, path):
    """One of torchvision's models by its own constructor, at a size that it resizes nothing of."""
    sizes = {} if name.startswith("ssd") else SIZES
    model = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=3, **sizes)
    model.transform.fixed_size = (SMALLER, SMALLER)
    if not name.startswith("ssd") and not name.endswith("_v2"):
        freeze(model, 1e-5 if name.startswith("fcos") else 0.0)
    return of_torchvision(model, path)


class OwnBackbone(nn.Module):
    """An FPN on a backbone of timm as somebody writes it, with names of their own."""

    def __init__(self, name):
        super().__init__()
        self.encoder = timm.create_model(name, features_only=True, out_indices=(1, 2, 3, 4))
        channels = self.encoder.feature_info.channels()
        self.neck = FeaturePyramidNetwork(channels, 32, LastLevelMaxPool())
        self.out_channels = 32

    def forward(self, images):
        return self.neck({str(i): level for i, level in enumerate(self.encoder(images))})


@torch.no_grad()
def on_timm(kind, name, path):
    anchors = AnchorGenerator(tuple(map(tuple, ANCHORS)), ((0.5, 1.0),) * 5)
    return of_torchvision(kind(OwnBackbone(name), 3, rpn_anchor_generator=anchors, **SIZES), path)


def of_torchvision(model, path):
    spread(model.requires_grad_(False))
    if hasattr(model, "head") and hasattr(model.head.classification_head, "cls_logits"):
        model.head.classification_head.cls_logits.bias.view(-1, 3)[:, 0] = -9  # nothing is of the background's output
    torch.save(model.state_dict(), path)
    owner = getattr(model, "roi_heads", model)
    owner.score_thresh, owner.nms_thresh, owner.detections_per_img = CONFIDENCE, 0.7, DETECTIONS
    found = model(list(image(SMALLER)))[0]
    rows = torch.cat([found["boxes"], found["scores"][:, None], found["labels"][:, None] - 1], 1)
    kept = rows[:, 5] >= 0
    return rows[kept], (found["masks"][kept, 0] > 0.5 if "masks" in found else None)


def our_own(family, path):
    """A micro detector; the family's own test compares it with its upstream."""
    path.write_bytes(MICRO[family].read_bytes())


ULTRALYTICS = {
    "YOLOv3u": ["yolov3-tiny"],
    "YOLOv5u, P6": ["yolov5n-p6"],
    "YOLOv6": ["yolov6n"],
    "YOLOv8, P2": ["yolov8n-p2"],
    "YOLOv9": ["yolov9t"],
    "YOLOv10": ["yolov10n"],
    "YOLO11": ["yolo11n"],
    "YOLO12": ["yolo12n"],
    "YOLO26, P6": ["yolo26n-p6"],
    "YOLO11 and YOLOv5u segmentation": ["yolo11n-seg", "yolov5n-seg"],
    "YOLO26 segmentation": ["yolo26n-seg"],
}
TORCHVISION = {
    "Faster R-CNN, ResNet-50 FPN and v2": ("resnet", ["fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2"]),
    "Faster R-CNN, MobileNetV3 and 320": ("resnet", [*MOBILE]),
    "Mask R-CNN, ResNet-50 FPN and v2": ("resnet", ["maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2"]),
    "RetinaNet, ResNet-50 FPN and v2": ("onestage", ["retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"]),
    "FCOS, ResNet-50 FPN": ("onestage", ["fcos_resnet50_fpn"]),
    "SSDlite 320, MobileNetV3": ("onestage", ["ssdlite320_mobilenet_v3_large"]),
}
ON = {"Mask R-CNN": (detection.MaskRCNN, "test_efficientnet"), "Faster R-CNN": (detection.FasterRCNN, "test_resnet")}
Row = tuple[
    str, str, list[tuple[functools.partial, dict]]
]  # family, label, how each model is made and what is said of it
ROWS: list[Row] = [
    *(
        ("yolo11", label, [(functools.partial(ultralytics, n), {}) for n in names])
        for label, names in ULTRALYTICS.items()
    ),
    ("yolov5", "YOLOv5", [(functools.partial(original_yolov5, description(3)), {})]),
    ("yolov5", "YOLOv5, P6", [(functools.partial(original_yolov5, p6()), {})]),
    *(
        (family, label, [(functools.partial(torchvision, n), {"model": n} if n in MOBILE else {}) for n in names])
        for label, (family, names) in TORCHVISION.items()
    ),
    *(
        ("resnet", f"{label}, timm backbone", [(functools.partial(on_timm, *which), {"backbone": which[1]} | ON_TIMM)])
        for label, which in ON.items()
    ),
    ("vit", "Mask R-CNN, Swin (mmdet)", [(functools.partial(our_own, "vit"), {})]),
]


def taken_through(family, make, given, folder, export=True):
    """What worked with one model; what does not work where it should is an error. `export` takes half of the time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = make(path := folder / ("a.safetensors" if family == "vit" else "a.pt"))
    assert recognise(path)[0] == family
    side = SMALLER if family in ("resnet", "onestage", "vit") else SIZE
    pixels = image(side)
    targets = [Targets(torch.tensor([[0.1, 0.1, 0.8, 0.9]]) * side, torch.tensor([1]))]
    detector = load_detector(family, path, given)
    teacher = detector.build()
    (found,) = detector.detect(teacher, pixels, CONFIDENCE, 0.7, DETECTIONS)
    if expected is not None:
        rows, masks = expected
        assert len(rows) == len(found.scores) > 0
        ours = torch.cat([found.boxes, found.scores[:, None], found.labels[:, None]], 1)
        torch.testing.assert_close(ours, rows, rtol=1e-3, atol=1e-3)
        assert (masks is None) == (found.masks is None) == (not has_masks(detector))
        if masks is not None:
            pasted = paste(found.masks, found.boxes, side, side)
            assert (pasted == masks.bool()).float().mean() > 0.95  # noise around the threshold; exact in test_masks.py

    leaf = pixels.clone().requires_grad_()
    output = detector.head_output(teacher, leaf, targets)
    (gradient,) = torch.autograd.grad(sum(loss.sum() for loss in output.losses.values()), leaf)
    synthesized = torch.isfinite(gradient).all() and gradient.abs().max() > 0

    plan = plan_layers(detector, teacher, EIGHT_BITS)
    student = quantize(teacher, plan, EIGHT_BITS, find_placement(detector, teacher, plan, "inputs"))
    report = calibrate(detector, teacher, student, plan, [pixels], EIGHT_BITS)
    rounded = [row for row in report.layers if row.get("output_error", 0) > 0]

    with torch.no_grad():
        reference = detector.head_output(teacher, pixels)
    ours = detector.head_output(student, pixels, None, reference.proposals)
    distances = [(t.values - ours.terms[n].values).square().mean() for n, t in reference.terms.items()]
    sum(distances).backward()
    learning = [p for name, p in student.named_parameters() if name.endswith("weight") and p.grad is not None]

    exported = isinstance(detector, ExportableDetector)
    if exported and export:
        export_graph(detector, student.eval(), folder / "a.onnx", Shape((side, side)))
    return dict(zip(COLUMNS, (bool(synthesized), bool(rounded), bool(learning), True, exported), strict=True))


def narrow_resnet50(*, norm_layer=nn.BatchNorm2d, **_):
    """A backbone with the names of a ResNet-50's tensors, and one narrow block in a stage."""
    return ResNet(Bottleneck, [1, 1, 1, 1], width_per_group=4, norm_layer=norm_layer)


def few_masks(module):
    module.roi_heads.detections_per_img = 4
    return OneImage(module)


def make_smaller(patch):
    """torchvision's models get a small backbone and, with mmdet's, few proposals."""
    for part in (detection.faster_rcnn, detection.mask_rcnn, detection.retinanet, detection.fcos):
        patch.setattr(part, "resnet50", narrow_resnet50)
    for adapter in (resnet_adapter, vit_adapter):
        patch.setattr(adapter, "two_stage_output", functools.partial(two_stage_output, count=16, masks=4))
    patch.setattr(roi_outputs, "MASK_PROPOSALS", 4)
    patch.setattr(resnet_adapter, "OneImage", few_masks)


def cells(family, label, rest):
    return f"| `{family}` | {label} | {' | '.join(rest)} |"


@pytest.mark.parametrize(("family", "label", "models"), ROWS, ids=[label for _, label, _ in ROWS])
def test_a_model_is_taken_through_every_stage_as_the_page_says(family, label, models, tmp_path, monkeypatch):
    make_smaller(monkeypatch)
    found = []
    for number, (make, given) in enumerate(models):
        (folder := tmp_path / str(number)).mkdir()
        found.append(taken_through(family, make, given, folder, export=number == 0))
    row = cells(family, label, ("yes" if all(part[column] for part in found) else "no" for column in COLUMNS))
    assert row in PAGE.read_text().splitlines(), f"the page should have: {row}"


def test_the_page_has_a_line_for_each_model_and_no_other():
    table = PAGE.read_text().partition("<!-- loads -->\n")[2].partition("\n<!-- /loads -->")[0].splitlines()
    assert table[:2] == [f"| family | model | {' | '.join(COLUMNS)} |", "|--" * (2 + len(COLUMNS)) + "|"]
    expected = [cells(family, label, ["yes"] * len(COLUMNS)) for family, label, _ in ROWS]
    assert [line.replace("| no ", "| yes ") for line in table[2:]] == expected


REFUSED = {
    "yolo11n-pose": "PoseModel, which finds keypoints; boxes and masks can be quantized: train or give a detection",
    "yolo11n-obb": "OBBModel, which finds oriented boxes; boxes and masks",
    "yolo11n-cls": "ClassificationModel, which finds classes of whole images",
    "yolo26n-sem": "SemanticSegmentationModel, which finds classes of pixels",
    "yolo26n-depth": "DepthModel, which finds depth",
    "yolov8s-world": "WorldModel, which finds classes given as texts",
    "yoloe-11s": "YOLOEModel, which finds classes given as texts",
    "yoloe-11s-seg": "YOLOESegModel, which finds classes given as texts",
    "rtdetr-l": "RTDETRDetectionModel, which finds boxes by a transformer decoder without BatchNorm",
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_of_ultralytics_are_refused_in_one_line_that_says_what_to_give(name, tmp_path, capsys):
    kind = getattr(tasks, REFUSED[name].partition(",")[0])
    network = kind.__new__(kind)  # what it holds is not looked at
    nn.Module.__init__(network)
    network.model = nn.Sequential(nn.Identity())
    torch.save({"model": network}, tmp_path / "a.pt")
    for command in ("info", "run"):
        assert main([command, str(tmp_path / "a.pt")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {tmp_path / 'a.pt'}: found a ultralytics.nn.tasks.{REFUSED[name]}")
        assert line.endswith("such as yolo11n.pt or yolo11n-seg.pt")


STATES = {
    "ssd300": ({"backbone.scale_weight": torch.zeros(512)}, "an SSD300 of torchvision, which has no BatchNorm"),
    "keypoints": (
        {
            "roi_heads.box_predictor.cls_score.weight": torch.zeros(2, 4),
            "roi_heads.keypoint_head.0.weight": torch.ones(1),
        },
        "a Keypoint R-CNN of torchvision; boxes and masks can be quantized: give a Faster R-CNN or a Mask R-CNN",
    ),
    "detr": (
        {"class_embed.weight": torch.zeros(92, 256)},
        "(class_embed.weight, ...), which is not recognised as a supported detector",
    ),
    "yolo": ({"model.0.conv.weight": torch.zeros(2)}, "a state_dict of a YOLO lacks its network: give the .pt that"),
}


@pytest.mark.parametrize("name", STATES)
def test_other_state_dicts_are_refused_in_one_line_with_the_reason(name, tmp_path, capsys):
    state, reason = STATES[name]
    torch.save(state, tmp_path / "a.pth")
    assert main(["info", str(tmp_path / "a.pth")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line


BACKBONES = {
    "nope": "is no name of timm.list_models",
    "hf-hub:timm/resnet18": "is no name of timm.list_models",
    "local-dir:/tmp/model": "is no name of timm.list_models",
    "../resnet18": "is no name of timm.list_models",
    "https://x.org/a.pth": "is no name of timm.list_models",
    "test_convnext": "has no BatchNorm behind its first convolution, and images are made from the statistics",
    "test_vit": "detector.backbone: test_vit",
    "resnet10t": r"do not fit torchvision's resnet10t; for other backbones and anchors give detector.backbone",
}


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_is_a_name_of_timms_registry_with_batch_norm(name, tmp_path):
    on_timm(detection.FasterRCNN, "test_resnet", tmp_path / "a.pth")
    with pytest.raises(UserError, match=BACKBONES[name]) as caught:
        load_detector("resnet", tmp_path / "a.pth", {"backbone": name} | ON_TIMM)
    assert "\n" not in str(caught.value)


def test_what_the_configuration_says_of_a_network_is_checked(tmp_path):
    on_timm(detection.FasterRCNN, "test_resnet", path := tmp_path / "a.pth")
    known = {"backbone": "test_resnet"} | ON_TIMM
    wrong = [
        ({"backbone": "test_resnet", "levels": [2, 3, 4]}, "detector.anchor_sizes: not set"),
        (known | {"levels": [7]}, "detector.backbone: found 'test_resnet': cannot be built"),
        (known | {"anchor_sizes": ANCHORS[:3]}, "3 rows of anchor_sizes; here are 5 levels"),
        (known | {"aspect_ratios": [1.0]}, "rpn.head.cls_logits.weight has the shape"),
        ({"anchor_sizes": ANCHORS[:3]}, "detector.anchor_sizes: found 3 rows; this detector has 5 levels"),
        ({"levels": [1, 2]}, "detector.levels: found without detector.backbone"),
    ]
    for given, message in wrong:
        with pytest.raises(UserError, match=message):
            load_detector("resnet", path, given)
    with pytest.raises(UserError, match="detector: found backbone; a file of yolo11 says it all itself"):
        load_detector("yolo11", MICRO["yolo11"], {"backbone": "test_resnet"})
    with pytest.raises(UserError, match=r"detector: found settings, but .* says itself what it is"):
        load_detector("resnet", MICRO["resnet"], {"aspect_ratios": [1.0]})


def test_a_model_of_torchvision_takes_other_anchors_from_the_configuration(tmp_path):
    anchors = {"anchor_sizes": [[8, 12], [16, 20], [24, 28]], "aspect_ratios": [0.5, 1.0]}
    sizes = tuple(map(tuple, anchors["anchor_sizes"]))
    anchors["model"] = MOBILE[0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=3)
        model.rpn.anchor_generator = AnchorGenerator(sizes, ((0.5, 1.0),) * 3)
        model.rpn.head = RPNHead(256, 4)
        model.transform.min_size, model.transform.max_size = (SMALLER,), SMALLER
        rows, _ = of_torchvision(model, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"for other backbones and anchors give detector.backbone or .anchor_sizes"):
        load_detector("resnet", tmp_path / "a.pth", {"model": MOBILE[0]})
    detector = load_detector("resnet", tmp_path / "a.pth", anchors)
    (found,) = detector.detect(detector.build(), image(SMALLER), CONFIDENCE, 0.7, DETECTIONS)
    torch.testing.assert_close(found.boxes, rows[:, :4], rtol=1e-3, atol=1e-3)
    assert build_detector("resnet", detector.architecture).architecture == detector.architecture
