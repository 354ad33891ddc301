"""The YOLOv5 adapter: its network against Ultralytics' blocks, its decoding, the files that it takes and refuses."""

import contextlib
import functools
import hashlib
import http.server
import math
import os
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from torch import nn
from ultralytics.nn.modules import Concat
from upstream import yolov5_val

from common.checkpoints.read import read_checkpoint, save_tensors
from common.runtime.errors import UserError
from yolov5 import adapter
from yolov5.model import YoloV5, decode

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("ZSQDET_SHARED", ROOT.parent / "shared"))
REAL = SHARED / "weights/yolov5n.pt"
needs_real = pytest.mark.skipif(not REAL.is_file(), reason=f"needs the real YOLOv5n at {REAL}")
ANCHORS = [[5, 6, 8, 14, 15, 11], [20, 30, 40, 25, 50, 60], [80, 70, 90, 150, 170, 140]]


def description(num_classes=3, **changes):
    """A narrow YOLOv5 as the checkpoints describe it, with Ultralytics' list of its layers."""
    from ultralytics.nn.tasks import yaml_model_load

    layers = {key: yaml_model_load("yolov5n.yaml")[key] for key in ("backbone", "head")}
    layers["head"][-1] = [[17, 20, 23], 1, "Detect", ["nc", "anchors"]]
    scales = {"depth_multiple": 0.33, "width_multiple": 0.125}
    return {"nc": num_classes, "anchors": ANCHORS} | scales | layers | changes


def network(num_classes=3, seed=0):
    """An untrained narrow YOLOv5 with statistics that are not all alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = YoloV5(description(num_classes), num_classes)
    for name, tensor in module.state_dict().items():
        if name.endswith(("running_mean", "bn.bias")):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
        elif name.endswith(("running_var", "bn.weight")):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return module


@contextlib.contextmanager
def yolov5s_own_modules():
    """Inside, the classes that YOLOv5's checkpoints name can be pickled: models.yolo.Model and so on."""
    before = dict(sys.modules)
    sys.modules["models"] = types.ModuleType("models")
    for name in ("yolo", "common"):
        sys.modules[f"models.{name}"] = types.ModuleType(f"models.{name}")
    try:
        yield
    finally:
        for name in ("models", "models.yolo", "models.common"):
            sys.modules.pop(name)
        sys.modules.update({k: v for k, v in before.items() if k.startswith("models")})


def rename(module, qualified):
    """Makes `module` an instance of an empty class of that qualified name, as if YOLOv5 had made it."""
    where, _, name = qualified.rpartition(".")
    if not hasattr(sys.modules[where], name):
        setattr(sys.modules[where], name, type(name, (nn.Module,), {"__module__": where}))
    module.__class__ = getattr(sys.modules[where], name)


def write_checkpoint(path, module, names, kind="models.yolo.DetectionModel", key="ema", yaml=None, grid=False):
    """The file that YOLOv5's train.py would write of `module`: everything pickled, half precision."""
    module = module.half()
    head = module.head
    if grid:  # v6.0 kept the anchors in pixels as a buffer too
        pixels = head.anchors * torch.tensor(module.strides).view(-1, 1, 1)
        head.register_buffer("anchor_grid", pixels.view(3, 1, -1, 1, 1, 2).clone())
    with yolov5s_own_modules():
        for part in list(module.modules()):
            if type(part).__module__.startswith("ultralytics."):
                rename(part, f"models.common.{type(part).__name__}")
        rename(head, "models.yolo.Detect")
        rename(module, kind)
        module.yaml, module.names = yaml or description(len(names)), names
        content = {"epoch": -1, "model": module, "ema": None, "optimizer": None, "date": None}
        torch.save(content | ({"ema": module, "model": nn.Identity()} if key == "ema" else {}), path)
    return path


@needs_real
@torch.no_grad()
def test_a_real_checkpoint_computes_what_ultralytics_blocks_compute():
    images = torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    maps = adapter.load(REAL).build()(images)
    for ours, theirs in zip(maps, yolov5_val.network(read_checkpoint(REAL).state)(images), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@needs_real
def test_roles_and_anchors_of_the_real_yolov5n():
    detector = adapter.load(REAL)
    module = detector.build()
    roles = [p.role for p in detector.quantization_policy(module)]
    counted = {role: roles.count(role) for role in sorted(set(roles))}
    assert counted == {"body": 42, "early": 14, "first": 1, "output": 3}
    assert (len(detector.class_names), detector.stride, detector.class_names[0]) == (80, 32, "person")
    pixels = module.head.anchors * torch.tensor([8, 16, 32]).view(3, 1, 1)
    assert pixels.flatten().tolist()[:6] == [10, 13, 16, 30, 33, 23]


@pytest.mark.parametrize("name", ["nc", "no", "nl", "na"])
def test_a_head_that_counts_otherwise_than_its_network_is_refused(name, tmp_path):
    module = network()
    setattr(module.head, name, getattr(module.head, name) + 1)
    path = write_checkpoint(tmp_path / "best.pt", module, ["a", "b", "c"])
    with pytest.raises(UserError, match=rf"best.pt: model\.24 has {name} \d+, and its YAML says \d+; a netw"):
        adapter.load(path)


def test_every_convolution_but_the_heads_has_an_activation_also_the_first_one_of_sppf():
    module = network()
    blocks = [m for m in module.modules() if hasattr(m, "conv") and hasattr(m, "bn")]
    assert len(blocks) == 57
    assert all(isinstance(block.act, nn.SiLU) for block in blocks)


@pytest.mark.parametrize(
    ("depth", "width", "parameters"),
    [(0.33, 0.25, 1872157), (0.33, 0.5, 7235389), (0.67, 0.75, 21190557), (1.0, 1.0, 46563709), (1.33, 1.25, 86749405)],
    ids="nsmlx",
)
def test_every_size_has_the_parameters_that_yolov5_prints(depth, width, parameters):
    with torch.device("meta"):
        module = YoloV5(description(80, depth_multiple=depth, width_multiple=width), 80)
    assert sum(p.numel() for p in module.parameters()) == parameters
    assert module.strides == (8, 16, 32)


def test_decoding_is_that_of_the_formulas():
    module = network()
    maps = [m.detach() for m in module(torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)))]
    columns = decode(module.head, maps, module.strides)[0].T
    row = 0
    for raw, anchors, stride in zip(maps, ANCHORS, (8, 16, 32), strict=True):
        grid = raw[0].double().sigmoid().view(3, 8, 64 // stride, 96 // stride)
        for a in range(3):
            for j in range(64 // stride):
                for i in range(96 // stride):
                    tx, ty, tw, th, found, *scores = grid[a, :, j, i].tolist()
                    x, y = (2 * tx - 0.5 + i) * stride, (2 * ty - 0.5 + j) * stride
                    w, h = 4 * tw**2 * anchors[2 * a], 4 * th**2 * anchors[2 * a + 1]
                    assert columns[row, :4].tolist() == pytest.approx([x, y, w, h], rel=1e-4, abs=1e-4)
                    assert columns[row, 4:].tolist() == pytest.approx([found * s for s in scores], abs=1e-6)
                    row += 1
    assert row == len(columns)


def test_an_untrained_head_expects_few_objects():
    module = YoloV5(description(), 3)
    for raw, stride in zip(module(torch.zeros(1, 3, 64, 64)), (8, 16, 32), strict=True):
        grid = raw.view(3, 8, -1)
        assert grid[:, 4].mean().item() == pytest.approx(math.log(8 / (640 / stride) ** 2), abs=1)
        assert grid[:, 5:].mean().item() == pytest.approx(math.log(0.6 / (3 - 0.99999)), abs=1)


@pytest.mark.parametrize("kind", ["models.yolo.Model", "models.yolo.DetectionModel"], ids=["v6.0", "v7.0"])
@pytest.mark.parametrize("key", ["ema", "model"])
def test_files_of_all_versions_load_with_their_classes_and_anchors(tmp_path, kind, key):
    module, images = network(3), torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    module.head.anchors.mul_(1.25)  # as YOLOv5's search for anchors changes them, against what the YAML says
    module.half().float()  # what half precision leaves of it
    wanted, anchors = module(images), module.head.anchors.clone()
    names = ["a", "b", "c"] if kind.endswith(".Model") else {0: "a", 1: "b", 2: "c"}
    path = write_checkpoint(tmp_path / "mine.pt", module, names, kind, key, grid=kind.endswith(".Model"))
    assert not {"models", "models.yolo"} & sys.modules.keys()
    detector = adapter.load(path)
    built = detector.build()
    assert detector.class_names == ("a", "b", "c")
    assert built.state_dict()["model.0.conv.weight"].dtype == torch.float32
    assert torch.equal(built.head.anchors, anchors)
    for ours, theirs in zip(built(images), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", [0.0, -1.0])
def test_anchors_without_a_size_are_refused(tmp_path, side):
    module = network(3)
    module.head.anchors[1, 2, 0] = side
    with pytest.raises(UserError, match="anchors with sides of 0 or less"):
        adapter.load(write_checkpoint(tmp_path / "mine.pt", module, ["a", "b", "c"]))


@pytest.mark.parametrize("anchors", [3, 1])
def test_the_number_of_anchors_may_be_all_that_the_description_says(tmp_path, anchors):
    module = YoloV5(description(3, anchors=anchors), 3)
    path = write_checkpoint(tmp_path / "mine.pt", module, ["a", "b", "c"], yaml=description(3, anchors=anchors))
    assert adapter.load(path).build().head.anchors.shape == (3, anchors, 2)


class Harmful:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_a_checkpoint_that_wants_to_run_code_is_refused_by_name(tmp_path):
    module = network()
    module.names_of_more = Harmful(tmp_path / "ran")
    path = write_checkpoint(tmp_path / "bad.pt", module, ["a", "b", "c"])
    with pytest.raises(UserError, match=r"bad\.pt: refused, its pickle asks for (posix|os)\.system"):
        adapter.load(path)
    assert not (tmp_path / "ran").exists()


def test_a_file_that_is_cut_off_is_refused_in_one_line(tmp_path):
    path = write_checkpoint(tmp_path / "cut.pt", network(), ["a", "b", "c"])
    content = path.read_bytes()
    for length in (0, 100, len(content) // 2, len(content) - 30):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"cut\.pt: .*fetch the file again") as caught:
            adapter.load(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["models.yolo.SegmentationModel", "models.yolo.ClassificationModel"])
def test_another_kind_of_model_is_named(tmp_path, kind):
    path = write_checkpoint(tmp_path / "other.pt", network(), ["a", "b", "c"], kind)
    with pytest.raises(UserError, match=f"a {kind} with models.yolo.Detect; yolov5 needs models.yolo.Model or"):
        adapter.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": [[-1, 1, "Focus", [64, 3]]]}, "has a block 'Focus'; known ones are Bottleneck, C3"),
        ({"width_multiple": 0.25}, "do not fit this YOLOv5"),
    ],
    ids=["block", "width"],
)
def test_networks_that_are_not_known_are_refused(tmp_path, changes, message):
    path = write_checkpoint(tmp_path / "old.pt", network(), ["a", "b", "c"], yaml=description(3, **changes))
    with pytest.raises(UserError, match=message):
        adapter.load(path)


def test_a_description_that_lacks_something_is_refused(tmp_path):
    yaml = description()
    del yaml["anchors"]
    path = write_checkpoint(tmp_path / "old.pt", network(), ["a", "b", "c"], yaml=yaml)
    with pytest.raises(UserError, match="another network, whose YAML lacks anchors"):
        adapter.load(path)


def test_safetensors_of_another_family_are_refused(tmp_path):
    save_tensors(tmp_path / "other.safetensors", network().state_dict(), {"family": "yolo11", "architecture": {}})
    with pytest.raises(UserError, match=r"not a yolov5 detector \(family: yolo11\)"):
        adapter.load(tmp_path / "other.safetensors")


def test_safetensors_return_the_network_that_was_saved(tmp_path):
    module, images = network(), torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    architecture = {"yaml": description(), "names": ["a", "b", "c"]}
    saved = {"family": "yolov5", "architecture": architecture}
    save_tensors(tmp_path / "own.safetensors", module.state_dict(), saved)
    detector = adapter.load(tmp_path / "own.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(detector.build()(images), module(images), strict=True))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local release; gives its folder. What it holds under an official name is what `load` fetches."""
    folder = tmp_path / "release"
    folder.mkdir()
    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setattr(adapter, "RELEASE", f"http://127.0.0.1:{running.server_port}")
        yield folder
        running.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_an_official_file_is_fetched_and_checked(tmp_path, server, monkeypatch):
    official = write_checkpoint(server / "yolov5s.pt", network(), ["a", "b", "c"])
    monkeypatch.setitem(adapter.SHA256, "yolov5s.pt", hashlib.sha256(official.read_bytes()).hexdigest())
    wanted = tmp_path / "weights/yolov5s.pt"
    assert adapter.load(wanted).class_names == ("a", "b", "c")
    assert wanted.read_bytes() == official.read_bytes()
    official.unlink()
    assert adapter.load(wanted).class_names == ("a", "b", "c")  # no second download


def test_a_file_with_another_sum_is_refused_and_not_kept(tmp_path, server):
    write_checkpoint(server / "yolov5n.pt", network(), ["a", "b", "c"])
    with pytest.raises(UserError, match=r"yolov5n\.pt is not the official file or was damaged on the way"):
        adapter.load(tmp_path / "weights/yolov5n.pt")
    assert not list((tmp_path / "weights").iterdir())


def test_a_file_without_a_recorded_sum_is_taken_with_a_warning(tmp_path, server, caplog):
    official = write_checkpoint(server / "yolov5m.pt", network(), ["a", "b", "c"])
    adapter.load(tmp_path / "yolov5m.pt")
    assert hashlib.sha256(official.read_bytes()).hexdigest() in caplog.text


def test_what_the_release_does_not_have_is_one_line(tmp_path, server):
    with pytest.raises(
        UserError, match=r"yolov5x\.pt does not exist and http://.* cannot be fetched \(File not found\)"
    ):
        adapter.load(tmp_path / "yolov5x.pt")
    with pytest.raises(UserError, match=r"mine\.pt does not exist; .*one of the official names yolov5n\.pt"):
        adapter.load(tmp_path / "mine.pt")


def test_a_yolov5_layer_that_takes_its_input_elsewhere_is_refused(tmp_path):
    module = network()
    concat = next(i for i, part in enumerate(module.model) if isinstance(part, Concat))
    module.model[concat].f = [-1, 4]
    path = write_checkpoint(tmp_path / "a.pt", module, ["a", "b", "c"])
    with pytest.raises(UserError, match=rf"model.{concat} has f \[-1, 4\], and its YAML says \[-1, 6\]"):
        adapter.load(path)
