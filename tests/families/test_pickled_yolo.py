"""Pickled YOLOs whose modules or classes are not what their YAML says first; P2 and P6 models."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hostile.forge import pickled_yolo11
from test_yolov5 import ANCHORS, description, network, write_checkpoint
from torch import nn
from ultralytics.nn.modules import C3k2, Conv
from ultralytics.nn.tasks import DetectionModel, yaml_model_load
from ultralytics.utils.loss import E2ELoss

from common.checkpoints.yolo_architecture import canonical
from common.config.from_checkpoint import recognise
from common.detection.detector import build_detector, load_detector
from common.runtime.errors import UserError
from common.synthesis.labels import Targets
from yolov5.model import YoloV5

IMAGES = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))


def classes(order):
    """The names of the micro detector's classes under their numbers, in that order of the keys."""
    names = ["circle", "triangle", "square", "star", "cross", "ring", "heart", "arrow", "crescent", "bolt"]
    return {number: names[number] for number in order}


@pytest.mark.parametrize("order", [range(10), range(9, -1, -1), [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]])
def test_the_classes_of_a_yolo11_have_the_numbers_that_its_names_give_them(order, tmp_path):
    path = pickled_yolo11(tmp_path / "a.pt", lambda module: setattr(module, "names", classes(order)))
    assert load_detector("yolo11", path).class_names == tuple(classes(range(10)).values())
    texts = {str(number): name for number, name in classes(order).items()}
    path = pickled_yolo11(tmp_path / "a.pt", lambda module: setattr(module, "names", texts))
    assert load_detector("yolo11", path).class_names == tuple(classes(range(10)).values())


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_the_classes_of_a_yolov5_have_the_numbers_that_its_names_give_them(order, tmp_path):
    names = {number: "abc"[number] for number in order}
    path = write_checkpoint(tmp_path / "a.pt", network(), names, yaml=description(3))
    assert load_detector("yolov5", path).class_names == ("a", "b", "c")


def test_classes_of_one_name_are_told_apart_and_it_is_said(tmp_path, caplog):
    names = ["crane", "crane (2)", "crane", *"abcdef", "crane"]
    path = pickled_yolo11(tmp_path / "a.pt", lambda module: setattr(module, "names", dict(enumerate(names))))
    detector = load_detector("yolo11", path)
    assert detector.class_names == ("crane", "crane (2)", "crane (3)", *"abcdef", "crane (4)")
    assert "a.pt: several classes have one name; called apart: 'crane (3)', 'crane (4)'" in caplog.text
    with pytest.raises(UserError, match="'a' is the name of several classes; allowed is one of its own for each"):
        build_detector("yolo11", detector.architecture | {"names": ["a"] * 10})


WRONG_NAMES = [
    {1: "a", 2: "b", 3: "c"},
    {0: "a", 1: "b"},
    {0: "a", 1: "b", "x": "c"},
    {0: "a", 1: "b", 2: 3},
    ["a", "b", None],
    "abc",
    {},
    [],
    None,
    {0: "a", "0": "b", 1: "c"},
    {0: "a", 1: "b", 5: "c"},
]


@pytest.mark.parametrize("names", WRONG_NAMES, ids=str)
def test_names_that_do_not_say_which_class_is_which_are_refused(names, tmp_path):
    path = write_checkpoint(tmp_path / "a.pt", network(), names, yaml=description(3))
    with pytest.raises(UserError, match=r"classes have the numbers|as names of classes|do not fit") as caught:
        load_detector("yolov5", path)
    assert "\n" not in str(caught.value)


def with_activation(activation):
    """Every block of convolution and BatchNorm with that activation, as an edited `Conv.default_act` leaves it."""

    def change(module):
        for part in module.modules():
            if isinstance(part, Conv) and isinstance(part.act, nn.SiLU):
                part.act = activation

    return change


ACTIVATIONS = [nn.ReLU(), nn.LeakyReLU(0.1), nn.LeakyReLU(0.2, inplace=True), nn.Hardswish(), nn.Mish(), nn.ReLU6()]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_a_yolo11_computes_with_the_activation_of_its_modules(activation, tmp_path):
    kept = {}

    def change(module):
        with_activation(activation)(module)
        kept["outputs"] = module(IMAGES)[0].detach()

    detector = load_detector("yolo11", pickled_yolo11(tmp_path / "a.pt", change))
    with torch.no_grad():
        assert torch.equal(detector.build()(IMAGES)[0], kept["outputs"])
        again = build_detector("yolo11", detector.architecture).build()  # as a quantized folder builds it
        again.load_state_dict(detector.state)
        assert torch.equal(again(IMAGES)[0], kept["outputs"])


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_a_yolov5_computes_with_the_activation_of_its_modules(activation, tmp_path):
    module = network().half().float()
    with_activation(activation)(module)
    wanted = module(IMAGES)
    detector = load_detector("yolov5", write_checkpoint(tmp_path / "a.pt", module, ["a", "b", "c"]))
    for ours, theirs in zip(detector.build()(IMAGES), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_yaml_may_say_another_activation_than_the_modules_have(tmp_path):
    def change(module):
        module.yaml["activation"] = "nn.ReLU()"

    assert load_detector("yolo11", pickled_yolo11(tmp_path / "a.pt", change)).architecture["yaml"]["activation"] == (
        "nn.SiLU()"
    )


def test_activations_have_one_name_however_they_are_written():
    for words in ("SiLU", "nn.SiLU", "nn.SiLU()", "torch.nn.SiLU()", "nn.SiLU(inplace=True)", None, ""):
        assert canonical(words) == "nn.SiLU()"
    for words in ("nn.LeakyReLU(0.1)", "torch.nn.LeakyReLU(0.1, inplace=True)", "LeakyReLU(negative_slope=0.1)"):
        assert canonical(words) == "nn.LeakyReLU(0.1)"
    for words in (
        "nn.Softplus()",
        "nn.PReLU()",
        "silu",
        "nn.SiLU(0.1)",
        "nn.SiLU();x",
        "nn.LeakyReLU(-)",
        "x.nn.SiLU()",
    ):
        with pytest.raises(ValueError, match=r"known activation|could not convert"):
            canonical(words)


def change_of(kind):
    def change(module):
        blocks = module.model
        if kind == "two activations":
            blocks[1].act = nn.ReLU()
        elif kind == "an unknown activation":
            with_activation(nn.Softplus())(module)
        elif kind == "epsilon":
            blocks[1].bn.eps = 0.1
        elif kind == "padding":
            blocks[1].conv.padding = (0, 0)
        elif kind == "upsampling":
            next(b for b in blocks if isinstance(b, nn.Upsample)).mode = "bilinear"
        elif kind == "shortcut":
            next(p for p in module.modules() if type(p).__name__ == "Bottleneck").add ^= True
        elif kind == "source":
            next(b for b in blocks if type(b).__name__ == "Concat").f = [-1, 5]
        elif kind == "strides":
            blocks[-1].stride = blocks[-1].stride * 2
        elif kind == "boxes":
            blocks[-1].xyxy = True
        elif kind == "another block":
            block = next(b for b in blocks if isinstance(b, C3k2))
            block.__class__ = C3k2.__mro__[1]

    return change


CHANGES = {
    "two activations": r"several activations \(nn.SiLU\(\) in model.0, nn.ReLU\(\) in model.1\)",
    "an unknown activation": "model.0 has the activation torch.nn.modules.activation.Softplus, which is not a known",
    "epsilon": "model.1.bn has eps 0.1, and its YAML says 0.001",
    "padding": r"model.1.conv has padding \[0, 0\], and its YAML says \[1, 1\]",
    "upsampling": "has mode 'bilinear', and its YAML says 'nearest'",
    "shortcut": "has add (True|False), and its YAML says (True|False)",
    "source": r"has f \[-1, 5\], and its YAML says \[-1, 6\]",
    "strides": r"the head has strides \[16.0, 32.0, 64.0\], and its YAML says strides \[8, 16, 32\]",
    "boxes": r"has xyxy True, and its YAML says False",
    "another block": "is a ultralytics.nn.modules.block.C2f, and its YAML says a C3k2",
}


@pytest.mark.parametrize("kind", CHANGES)
def test_modules_that_are_not_what_the_yaml_says_are_refused_by_name(kind, tmp_path):
    with pytest.raises(UserError, match=CHANGES[kind]) as caught:
        load_detector("yolo11", pickled_yolo11(tmp_path / "a.pt", change_of(kind)))
    assert "\n" not in str(caught.value)


def test_whatever_a_block_of_upstream_computes_with_is_compared(tmp_path):
    module = DetectionModel("yolo12n.yaml", nc=3, verbose=False)
    module.names = {0: "a", 1: "b", 2: "c"}
    torch.save({"model": module}, tmp_path / "same.pt")
    load_detector("yolo11", tmp_path / "same.pt")
    part = next(p for p in module.modules() if type(p).__name__ == "AAttn" and p.area == 4)
    part.area = 1
    torch.save({"model": module}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="has area 1, and its YAML says 4"):
        load_detector("yolo11", tmp_path / "other.pt")


@pytest.mark.parametrize("family", ["yolo11", "yolov5"])
def test_a_fused_model_is_called_so_with_what_to_do(family, tmp_path):
    if family == "yolo11":
        path = pickled_yolo11(tmp_path / "a.pt", lambda module: module.fuse(verbose=False))
    else:
        module = network()
        for part in module.modules():
            if isinstance(part, Conv):
                part.conv.bias = nn.Parameter(torch.zeros(part.conv.out_channels))
                del part.bn
                part.forward = part.forward_fuse
        path = write_checkpoint(tmp_path / "a.pt", module, ["a", "b", "c"])
    with pytest.raises(UserError, match=r"a fused model \(model\.0 has no BatchNorm any more\).*before fuse\(\)"):
        load_detector(family, path)


def test_a_model_in_a_file_of_an_old_pytorch_is_read(tmp_path):
    path = pickled_yolo11(tmp_path / "a.pt")
    with open(path, "rb") as stream:
        content = torch.load(stream, weights_only=False)
    torch.save(content, path, _use_new_zipfile_serialization=False)  # with the source of every class in it
    assert load_detector("yolo11", path).class_names[0] == "circle"


def test_a_model_inside_data_parallel_is_taken_out(tmp_path):
    path = pickled_yolo11(tmp_path / "a.pt", nn.DataParallel)
    assert load_detector("yolo11", path).class_names[0] == "circle"


def test_the_averaged_half_precision_weights_are_taken_with_an_optimizer_beside_them(tmp_path):
    def change(module):
        kept["weight"] = module.model[0].conv.weight.detach().half().float()
        module.half()

    kept = {}
    other = nn.Identity()
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters()).state_dict()
    path = pickled_yolo11(tmp_path / "a.pt", change, "ema", {"model": other, "optimizer": optimizer, "date": "today"})
    assert torch.equal(load_detector("yolo11", path).build().model[0].conv.weight, kept["weight"])


def narrow(name, **changes):
    """One of Ultralytics' models, as small as it gets."""
    yaml = yaml_model_load(name)
    yaml = {key: value for key, value in yaml.items() if key not in ("scales", "scale", "yaml_file")}
    return yaml | {"nc": 2, "depth_multiple": 0.33, "width_multiple": 0.125, "max_channels": 512} | changes


@pytest.mark.parametrize(
    ("name", "strides"), [("yolov8n-p2.yaml", [4, 8, 16, 32]), ("yolov8n-p6.yaml", [8, 16, 32, 64])]
)
def test_p2_and_p6_models_of_ultralytics_have_their_own_stride_everywhere(name, strides, tmp_path):
    model = DetectionModel(narrow(name), verbose=False).eval()
    model.names = {0: "a", 1: "b"}
    torch.save({"model": model}, tmp_path / "a.pt")
    detector = load_detector("yolo11", tmp_path / "a.pt")
    assert detector.stride == max(strides)
    assert build_detector("yolo11", detector.architecture).stride == max(strides)
    module, images = detector.build(), torch.rand(1, 3, 128, 192, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(module(images)[0], model(images)[0])
    assert module.stride.tolist() == strides
    targets = [Targets(torch.tensor([[10.0, 20, 100, 90]]), torch.tensor([1]))]
    output = detector.head_output(module, images, targets)
    assert [m.shape[-1] for m in output.maps] == [192 // s for s in strides]
    assert all(torch.isfinite(loss).all() for loss in output.losses.values())
    assert len(detector.detect(module, images, 0.001, 0.7, 10)) == 1


def p6():
    """YOLOv5's own P6 models: models/hub/yolov5n6.yaml."""
    layers = {key: yaml_model_load("yolov5n-p6.yaml")[key] for key in ("backbone", "head")}
    layers["head"][-1] = [layers["head"][-1][0], 1, "Detect", ["nc", "anchors"]]
    anchors = [*ANCHORS, [200, 210, 230, 220, 250, 254]]
    return {"nc": 3, "anchors": anchors, "depth_multiple": 0.33, "width_multiple": 0.125} | layers


def test_a_p6_model_of_yolov5_has_its_own_stride_everywhere(tmp_path):
    module = YoloV5(p6(), 3)
    images = torch.rand(1, 3, 128, 192, generator=torch.Generator().manual_seed(0))
    wanted = copy.deepcopy(module).half().float()(images)
    path = write_checkpoint(tmp_path / "a.pt", module, ["a", "b", "c"], yaml=p6())
    detector = load_detector("yolov5", path)
    assert detector.stride == build_detector("yolov5", detector.architecture).stride == 64
    built = detector.build()
    assert built.strides == (8, 16, 32, 64)
    for ours, theirs in zip(built(images), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def saved(model, path):
    model.names = {0: "a", 1: "b"}
    torch.save({"model": model}, path)
    return load_detector("yolo11", path)


@pytest.mark.parametrize("name", ["yolo26n", "yolo26n-p2", "yolo26n-p6", "yolov10n"])
def test_a_head_without_suppression_detects_as_ultralytics_does(name, tmp_path):
    model = DetectionModel(narrow(f"{name}.yaml"), verbose=False).eval()
    model.end2end = True
    detector = saved(model, tmp_path / "a.pt")
    assert recognise(tmp_path / "a.pt")[0] == "yolo11"
    module, images = detector.build(), torch.rand(2, 3, 128, 192, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images)[0]  # xyxy, score, class; best first
    assert not [name for name, _ in module.named_modules() if "one2one" in name]  # nor the head for training alone
    for rows, found in zip(expected, detector.detect(module, images, 0.0, 0.7, 300), strict=True):
        torch.testing.assert_close(found.boxes, rows[:, :4])
        torch.testing.assert_close(found.scores, rows[:, 4])
        assert torch.equal(found.labels, rows[:, 5].long())
    assert torch.equal(build_detector("yolo11", detector.architecture).build().stride, module.stride)


def test_the_switch_of_a_head_without_one_to_one_branches_does_nothing_as_in_ultralytics(tmp_path):
    model = DetectionModel(narrow("yolo11n.yaml"), verbose=False).eval()
    model.model[-1].end2end = True
    assert not model.end2end
    detector = saved(model, tmp_path / "a.pt")
    assert not detector.one_to_one
    with torch.no_grad():
        assert torch.equal(detector.build()(IMAGES)[0], model(IMAGES)[0])


def test_a_yolov10_that_was_set_to_suppression_is_refused(tmp_path):
    model = DetectionModel(narrow("yolov10n.yaml"), verbose=False).eval()
    model.end2end = False
    with pytest.raises(UserError, match=r"a.pt: a YOLOv10 with end2end off; .* set it to True"):
        saved(model, tmp_path / "a.pt")


@pytest.mark.parametrize("name", [" ", "\u00a0", "a\0b", ""])
def test_a_class_without_letters_is_refused_when_the_file_is_read(name, tmp_path):
    path = pickled_yolo11(tmp_path / "a.pt", lambda module: setattr(module, "names", {0: "a", 1: name}))
    with pytest.raises(UserError, match=r"a.pt: found .* as the name of a class; needed are letters"):
        load_detector("yolo11", path)


def test_a_yolo26_that_was_set_to_suppression_has_it(tmp_path):
    model = DetectionModel(narrow("yolo26n.yaml"), verbose=False).eval()
    model.end2end = False
    detector = saved(model, tmp_path / "a.pt")
    with torch.no_grad():
        assert torch.equal(detector.build()(IMAGES)[0], model(IMAGES)[0])
    assert not detector.one_to_one
    model.yaml["end2end"] = True  # whatever it says: the head decides
    assert not saved(model, tmp_path / "a.pt").one_to_one
    model.end2end = True
    del model.yaml["end2end"]
    assert saved(model, tmp_path / "a.pt").one_to_one
    targets = [Targets(torch.tensor([[10.0, 20, 100, 90]]), torch.tensor([1]))]
    images = IMAGES.clone().requires_grad_()
    losses = detector.head_output(detector.build(), images, targets).losses  # those of stage one
    (gradient,) = torch.autograd.grad(sum(losses.values()).sum(), images)
    assert 0 < gradient.abs().max() < float("inf")


def test_the_losses_of_a_head_without_suppression_are_ultralytics_own_of_its_second_half(tmp_path):
    model = DetectionModel(narrow("yolo26n.yaml"), verbose=False).eval()
    detector = saved(model, tmp_path / "a.pt")
    images = torch.rand(1, 3, 96, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
    boxes, labels = torch.tensor([[10.0, 20, 100, 90], [5, 5, 40, 60]]), torch.tensor([1, 0])
    ours = detector.head_output(detector.build(), images, [Targets(boxes, labels)]).losses
    model.args = SimpleNamespace(box=7.5, cls=0.5, dfl=1.5, epochs=1)
    centres = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)
    batch = {"batch_idx": torch.zeros(2), "cls": labels.float(), "bboxes": centres / torch.tensor([128, 96, 128, 96])}
    expected = E2ELoss(model).one2one.loss(model(images)[1]["one2one"], batch)[0]
    torch.testing.assert_close(torch.cat(list(ours.values())), expected, rtol=1e-4, atol=1e-5)
    assert list(ours) == ["box", "cls", "l1"]
    (gradient,) = torch.autograd.grad(sum(ours.values()).sum(), images)
    (wanted,) = torch.autograd.grad(expected.sum(), images)
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


PUBLISHED = ["yolov3", "yolov5n", "yolov8n", "yolov8n-ghost"]  # and those of test_what_loads.py


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_with_the_detect_head_of_ultralytics_are_rebuilt_exactly(name, tmp_path):
    changes = {"width_multiple": 0.25, "max_channels": 512}
    model = DetectionModel(narrow(f"{name}.yaml", **changes), verbose=False).eval()
    model.names = {0: "a", 1: "b"}
    torch.save({"model": model}, tmp_path / "a.pt")
    module = load_detector("yolo11", Path(tmp_path / "a.pt")).build()
    with torch.no_grad():
        assert torch.equal(module(IMAGES)[0], model(IMAGES)[0])
