"""The YOLO11 adapter against Ultralytics itself, and what it refuses."""

import os
from pathlib import Path

import pytest
import torch
from ultralytics import YOLO
from ultralytics.utils.loss import v8DetectionLoss

from common.errors import UserError
from common.types import Targets
from common.weights import load_tensors, save_tensors
from yolo11 import adapter

ROOT = Path(__file__).parents[1]
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


@needs_real
def test_roles_of_the_real_yolo11n():
    detector = adapter.load(REAL)
    roles = [p.role for p in detector.quantization_policy(detector.build())]
    counted = {role: roles.count(role) for role in sorted(set(roles))}
    assert counted == {"body": 52, "early": 10, "first": 1, "head": 18, "output": 7}


def test_the_losses_of_one_image_are_ultralytics_own(images):
    detector = adapter.load(MICRO)
    module = detector.build()
    boxes = torch.tensor([[10.0, 12.0, 60.0, 70.0], [40.0, 30.0, 90.0, 80.0]])
    target = Targets(boxes, torch.tensor([3, 1]))
    ours = detector.head_output(module, images[:1], [target]).losses
    module.train()
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.eval()
    centres = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1) / 96
    batch = {"batch_idx": torch.zeros(2), "cls": target.labels.float(), "bboxes": centres}
    box, cls, dfl = v8DetectionLoss(module)(module(images[:1]), batch)[0]
    for name, value in (("box", box), ("cls", cls), ("dfl", dfl)):
        torch.testing.assert_close(ours[name][0], value)


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
