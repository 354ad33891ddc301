"""Checkpoints are read, never run."""

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from common.checkpoints.read import load_tensors, read_checkpoint, read_published, save_tensors
from common.runtime.errors import UserError

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


@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_published_by_openmmlab_is_read_with_its_numpy_numbers(zipped, tmp_path):
    meta = {"epoch": np.int64(36), "best": np.float64(0.46), "scale": np.float32(512.0), "CLASSES": ("person", "car")}
    content = {"meta": meta, "state_dict": {"w": torch.arange(4.0)}}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    state, read = read_published(tmp_path / "a.pth")
    assert torch.equal(state["w"], torch.arange(4.0))
    assert read == meta


@pytest.mark.parametrize("where", ["meta", "state_dict"])
@pytest.mark.parametrize("zipped", [True, False])
def test_anything_else_beside_a_published_state_is_refused_and_does_not_run(where, zipped, tmp_path):
    path, trace = tmp_path / "bad.pth", tmp_path / "ran"
    content = {"meta": {"epoch": np.int64(1)}, "state_dict": {"w": torch.zeros(1)}}
    content[where]["more"] = Harmful(trace)
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"bad\.pth: refused, its pickle asks for \w+\.system") as caught:
        read_published(path)
    assert "\n" not in str(caught.value)
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"# A README\n", b"", b"PK\x03\x04 the first part of an archive"])
def test_a_file_that_is_no_checkpoint_is_called_so_in_a_whole_sentence(content, tmp_path):
    path = tmp_path / "README.md"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_published(path)
    assert str(caught.value) == f"{path}: not a PyTorch checkpoint, or cut off; fetch the file again"


def test_reading_changes_nothing_that_torch_would_trust_and_arrays_are_read_over(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    meta = {"epoch": np.int64(1), "history": np.arange(3)}
    torch.save({"meta": meta, "state_dict": {"w": torch.ones(1)}}, tmp_path / "a.pth")
    state, read = read_published(tmp_path / "a.pth")
    assert (state["w"].item(), read["epoch"]) == (1, 1)
    assert set(torch.serialization.get_safe_globals()) == before


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


def test_a_full_disk_is_one_line_and_keeps_the_file_that_was_there(tmp_path, monkeypatch):
    save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)}, {})

    def full(*arguments):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("common.checkpoints.read.save_file", full)
    with pytest.raises(UserError, match=r"a.safetensors: cannot be written \(.*No space left on device"):
        save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)}, {})
    assert torch.equal(load_tensors(tmp_path / "a.safetensors")[0]["x"], torch.ones(2))
    assert len(list(tmp_path.iterdir())) == 1


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
