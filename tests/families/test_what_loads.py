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
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool
from ultralytics.nn import tasks
from ultralytics.utils.nms import non_max_suppression

from common.config.from_checkpoint import recognise
from common.config.schema import QuantizationConfig
from common.deployment.graph import Shape, export_graph
from common.detection import roi_outputs
from common.detection.detector import ExportableDetector, load_detector
from common.detection.roi_outputs import two_stage_output
from common.detection.torchvision_parts import OneImage
from common.detection.types import Targets
from common.quantization import calibrate, find_placement, plan_layers, quantize
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
    rounding="nearest", scale_init="lsq", activation_range="signed", letterbox_padding=False,
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
    model = tasks.DetectionModel(narrow(f"{name}.yaml", max_channels=256, width_multiple=width), verbose=False)
    spread(model.model[-1])
    model.eval().names = {0: "a", 1: "b"}
    if hasattr(model.model[-1], "one2one_cv2"):
        model.end2end = True
    torch.save({"model": model}, path)
    rows = model(image(SIZE))[0]
    if not model.end2end:
        rows = non_max_suppression(rows, CONFIDENCE, 0.7, multi_label=True, max_det=DETECTIONS)
    return rows[0][rows[0][:, 4] > CONFIDENCE][:DETECTIONS]


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
    spread(model)
    if hasattr(model, "head") and hasattr(model.head.classification_head, "cls_logits"):
        model.head.classification_head.cls_logits.bias.view(-1, 3)[:, 0] = -9  # nothing is of the background's output
    torch.save(model.state_dict(), path)
    owner = getattr(model, "roi_heads", model)
    owner.score_thresh, owner.nms_thresh, owner.detections_per_img = CONFIDENCE, 0.7, DETECTIONS
    found = model(list(image(SMALLER)))[0]
    rows = torch.cat([found["boxes"], found["scores"][:, None], found["labels"][:, None] - 1], 1)
    return rows[rows[:, 5] >= 0]


def our_own(family, path):
    """A micro detector; the family's own test compares it with its upstream."""
    path.write_bytes(MICRO[family].read_bytes())


ULTRALYTICS = {
    "YOLOv3u": ("yolov3-tiny",),
    "YOLOv5u, P6 too": ("yolov5n-p6",),
    "YOLOv6": ("yolov6n",),
    "YOLOv8, P2 and P6 too": ("yolov8n-p2", "yolov8n-p6"),
    "YOLOv9": ("yolov9t",),
    "YOLOv10": ("yolov10n",),
    "YOLO11": ("yolo11n",),
    "YOLO12": ("yolo12n",),
    "YOLO26, P2 and P6 too": ("yolo26n-p2", "yolo26n-p6"),
}
TWO_STAGE = {
    "Faster R-CNN, ResNet-50 FPN": "fasterrcnn_resnet50_fpn",
    "Faster R-CNN, ResNet-50 FPN v2": "fasterrcnn_resnet50_fpn_v2",
    "Faster R-CNN, MobileNetV3 320": "fasterrcnn_mobilenet_v3_large_320_fpn",
    "Mask R-CNN, ResNet-50 FPN": "maskrcnn_resnet50_fpn",
    "Mask R-CNN, ResNet-50 FPN v2": "maskrcnn_resnet50_fpn_v2",
}
ONE_STAGE = {
    "RetinaNet, ResNet-50 FPN": "retinanet_resnet50_fpn",
    "RetinaNet, ResNet-50 FPN v2": "retinanet_resnet50_fpn_v2",
    "FCOS, ResNet-50 FPN": "fcos_resnet50_fpn",
    "SSDlite 320, MobileNetV3": "ssdlite320_mobilenet_v3_large",
}
ROWS = [
    *(("yolo11", label, functools.partial(ultralytics, n), {}) for label, names in ULTRALYTICS.items() for n in names),
    ("yolov5", "YOLOv5 P5", functools.partial(original_yolov5, description(3)), {}),
    ("yolov5", "YOLOv5 P6", functools.partial(original_yolov5, p6()), {}),
    *(("resnet", label, functools.partial(torchvision, name), {}) for label, name in TWO_STAGE.items()),
    *(("onestage", label, functools.partial(torchvision, name), {}) for label, name in ONE_STAGE.items()),
    (
        "resnet",
        "Mask R-CNN, timm backbone",
        functools.partial(on_timm, detection.MaskRCNN, "test_efficientnet"),
        {"backbone": "test_efficientnet"} | ON_TIMM,
    ),
    (
        "resnet",
        "Faster R-CNN, timm backbone",
        functools.partial(on_timm, detection.FasterRCNN, "test_resnet"),
        {"backbone": "test_resnet"} | ON_TIMM,
    ),
    ("vit", "Mask R-CNN, Swin (mmdet)", functools.partial(our_own, "vit"), {}),
]


def taken_through(family, make, given, folder):
    """What worked with one model; what does not work where it should is an error."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = make(path := folder / ("a.safetensors" if family == "vit" else "a.pt"))
    assert recognise(path)[0] == family
    pixels = image(SMALLER if family in ("resnet", "onestage", "vit") else SIZE)
    side = pixels.shape[-1]
    targets = [Targets(torch.tensor([[0.1, 0.1, 0.8, 0.9]]) * side, torch.tensor([1]))]
    detector = load_detector(family, path, given)
    teacher = detector.build()
    (found,) = detector.detect(teacher, pixels, CONFIDENCE, 0.7, DETECTIONS)
    if expected is not None:
        assert len(expected) == len(found.scores) > 0
        rows = torch.cat([found.boxes, found.scores[:, None], found.labels[:, None]], 1)
        torch.testing.assert_close(rows, expected, rtol=1e-3, atol=1e-3)

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
    if exported:
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


@pytest.fixture(scope="module")
def loads(tmp_path_factory):
    """The rows of the table: (family, model) and what works with it."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        make_smaller(patch)
        for number, (family, label, make, given) in enumerate(ROWS):
            one = taken_through(family, make, given, tmp_path_factory.mktemp(str(number)))
            found.setdefault((family, label), []).append(one)
    return found


def test_the_page_says_what_loads_and_what_can_be_done_with_it(loads):
    lines = [f"| family | model | {' | '.join(COLUMNS)} |", "|--" * (2 + len(COLUMNS)) + "|"]
    for (family, label), parts in loads.items():
        cells = ("yes" if all(part[column] for part in parts) else "no" for column in COLUMNS)
        lines.append(f"| `{family}` | {label} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    assert f"<!-- loads -->\n{table}\n<!-- /loads -->" in PAGE.read_text(), f"the page should have:\n{table}"
