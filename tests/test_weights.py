"""Checkpoints are read, never run."""

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from common.weights import load_tensors, read_checkpoint, save_tensors

SHARED = Path(os.environ.get("ZSQDET_SHARED", "../shared"))


class Harmful:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_a_pickle_that_wants_to_run_code_is_refused_by_name_and_does_not_run(tmp_path):
    path, trace = tmp_path / "bad.pt", tmp_path / "ran"
    torch.save({"model": Harmful(trace)}, path, pickle_module=pickle)
    with pytest.raises(UserError, match=r"refused.*system"):
        read_checkpoint(path)
    assert not trace.exists()


def test_missing_and_damaged_files_are_one_line(tmp_path):
    cut = tmp_path / "cut.pt"
    cut.write_bytes(b"PK\x03\x04 cut off")
    foreign = tmp_path / "foreign.pt"
    with zipfile.ZipFile(foreign, "w") as archive:
        archive.writestr("page.html", "<html>")
    for path in (tmp_path / "absent.pt", cut, foreign):
        with pytest.raises(UserError) as caught:
            read_checkpoint(path)
        assert "\n" not in str(caught.value)


def test_tensors_and_their_description_return_as_they_were(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"w": torch.arange(6.0).view(2, 3)}, {"family": "toy"})
    tensors, description = load_tensors(path)
    assert torch.equal(tensors["w"], torch.arange(6.0).view(2, 3))
    assert description == {"family": "toy"}
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match="damaged"):
        load_tensors(path)


@pytest.mark.skipif(not (SHARED / "weights/yolo11n.pt").exists(), reason="needs the shared weights")
def test_a_real_yolo11_is_built_as_ultralytics_builds_it():
    from ultralytics import YOLO

    from yolo11.adapter import load

    detector = load(SHARED / "weights/yolo11n.pt")
    images = torch.rand(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    upstream = YOLO(SHARED / "weights/yolo11n.pt").model.float().eval()
    with torch.no_grad():
        assert torch.allclose(detector.build()(images)[0], upstream(images)[0], atol=1e-5)
    with pytest.raises(UserError, match=r"models\.yolo\.Model"):
        load(SHARED / "weights/yolov5n.pt")
