"""Checkpoints are read, never run; a state fits its module, and holds numbers that a forward pass survives."""

import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from common.checkpoints.read import as_float32, load_tensors, read_checkpoint, read_published, save_tensors
from common.checkpoints.state_dict import building, load_state
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


def test_a_file_that_is_emptied_after_it_was_read_changes_nothing(tmp_path):
    """Of a mapped file the program would end by SIGBUS."""
    save_tensors(tmp_path / "a.safetensors", {"weight": torch.ones(10**6)}, {})
    code = """
import os, sys
from pathlib import Path
from common.checkpoints.read import load_tensors
tensors = load_tensors(Path(sys.argv[1]))[0]
os.truncate(sys.argv[1], 0)
print(tensors["weight"].sum().item())
"""
    command = [sys.executable, "-c", code, tmp_path / "a.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (done.returncode, done.stdout) == (0, "1000000.0\n")


@pytest.mark.parametrize("size", [0, 7, 100, 10**13])
def test_a_file_of_another_length_than_its_header_says_is_refused_unread(tmp_path, size):
    """Of 10^13 bytes, as a sparse file can have."""
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"weight": torch.ones(100)}, {})
    os.truncate(path, size)
    with pytest.raises(UserError, match=r"a.safetensors: damaged safetensors file \([^\n]+\)$"):
        load_tensors(path)


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
def test_tensors_are_in_one_order_each_time_they_are_read(tmp_path):
    numbers = {f"layer.{i}.weight": torch.full((2,), i, dtype=torch.float32) for i in (3, 1, 2, 10, 0)}
    save_tensors(tmp_path / "a.safetensors", numbers | {"empty": torch.zeros(0)}, {"note": "more"})
    orders = [list(load_tensors(tmp_path / "a.safetensors")[0]) for _ in range(8)]
    assert orders == orders[:1] * 8
    assert orders[0] == list(safetensors.torch.load_file(tmp_path / "a.safetensors"))


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


def block():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def test_what_fits_is_loaded_and_counters_of_batch_norms_may_be_missing():
    state = {n: t + 1 for n, t in block().state_dict().items() if not n.endswith("num_batches_tracked")}
    module = block()
    load_state(module, state, "here", "this block")
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in state.items())


DAMAGE = {
    "missing": (lambda s: s.pop("1.bias"), "1.bias is missing"),
    "more": (lambda s: s.update(other=torch.ones(1)), "other belongs to something else"),
    "shape": (lambda s: s.update({"0.bias": torch.ones(4, 1)}), r"0.bias has the shape \[4, 1\] and not \[4\]"),
    "broadcast": (lambda s: s.update({"0.bias": torch.ones(1)}), r"0.bias has the shape \[1\]"),
    "integers": (
        lambda s: s.update({"0.bias": torch.ones(4, dtype=torch.int32)}),
        "0.bias holds int32 and not float32",
    ),
    "fractions": (lambda s: s.update({"1.num_batches_tracked": torch.ones(())}), "holds float32 and not int64"),
    "complex": (lambda s: s.update({"0.bias": torch.ones(4, dtype=torch.complex64)}), "0.bias holds complex64"),
    "nan": (lambda s: s["0.weight"].view(-1)[7:8].fill_(float("nan")), "0.weight holds NaN or infinity"),
    "infinity": (lambda s: s["1.running_var"][2:3].fill_(float("inf")), "1.running_var holds NaN or infinity"),
    "negative variance": (lambda s: s["1.running_var"][2:3].fill_(-1), "1.running_var holds a variance below 0"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_does_not_fit_is_named(kind):
    state = {name: tensor.clone() for name, tensor in block().state_dict().items()}
    change, message = DAMAGE[kind]
    change(state)
    with pytest.raises(UserError, match=message) as caught:
        load_state(block(), state, "here", "this block")
    assert str(caught.value).startswith("here: ")


def test_counters_are_missing_together_or_not_at_all():
    module = nn.Sequential(block(), block())
    state = module.state_dict()
    del state["0.1.num_batches_tracked"]
    with pytest.raises(UserError, match=r"0\.1\.num_batches_tracked is missing"):
        load_state(module, state, "here", "these blocks")
    del state["1.1.num_batches_tracked"]
    load_state(module, state, "here", "these blocks")


def test_what_overflows_on_the_way_to_float32_is_named_too():
    state = as_float32({n: t.double() if t.is_floating_point() else t for n, t in block().state_dict().items()})
    load_state(block(), state, "here", "this block")
    state = {"0.weight": torch.full((4, 3, 3, 3), 1e300, dtype=torch.float64)}
    with pytest.raises(UserError, match="NaN or infinity"):
        load_state(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False)), as_float32(state), "here", "this block")


def test_a_constructor_that_refuses_is_one_line():
    with (
        pytest.raises(UserError, match=r"here: cannot be built \(.*\); give the checkpoint") as caught,
        building("here"),
    ):
        nn.Conv2d(3, 4, 3, groups=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_torchvisions_reference_training_is_read_with_all_that_is_beside_the_weights(zipped, tmp_path):
    import argparse

    from torch.optim import SGD
    from torch.optim.lr_scheduler import MultiStepLR

    module = block()
    optimizer = SGD(module.parameters(), 0.02, momentum=0.9)
    module(torch.rand(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    schedule = MultiStepLR(optimizer, [16, 22])
    content = {
        "model": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "args": argparse.Namespace(model="maskrcnn_resnet50_fpn", lr_steps=[16, 22], device="cuda"),
        "epoch": 25,
        "scaler": torch.amp.GradScaler(enabled=False).state_dict(),
    }
    torch.save(content, tmp_path / "model_25.pth", _use_new_zipfile_serialization=zipped)
    state, _ = read_published(tmp_path / "model_25.pth")
    assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())


def test_a_file_of_mmengine_is_read_with_its_history(tmp_path):
    from mmengine.logging import HistoryBuffer, MessageHub

    hub = MessageHub.get_instance("test of checkpoints")
    hub.update_scalar("train/loss", 0.5)
    hub.update_info("epoch", 3)
    content = {
        "meta": {"epoch": 3, "dataset_meta": {"classes": ("ant", "bee")}, "cfg": "model = dict()"},
        "state_dict": block().state_dict(),
        "message_hub": hub.state_dict(),
        "more": HistoryBuffer([1.0, 2.0], [1, 1]),
    }
    torch.save(content, tmp_path / "epoch_3.pth")
    state, meta = read_published(tmp_path / "epoch_3.pth")
    assert len(state) == 7
    assert meta["dataset_meta"]["classes"] == ("ant", "bee")


@pytest.mark.parametrize("wrap", ["DataParallel", "AveragedModel", "both", "half"])
def test_what_wraps_a_state_is_taken_off(wrap, tmp_path):
    module = block()
    wrapped = {
        "DataParallel": lambda: nn.DataParallel(module),
        "AveragedModel": lambda: torch.optim.swa_utils.AveragedModel(module),
        "both": lambda: torch.optim.swa_utils.AveragedModel(nn.DataParallel(module)),
        "half": lambda: block().half(),
    }[wrap]()
    torch.save({"state_dict": wrapped.state_dict()}, tmp_path / "a.pth")
    state, _ = read_published(tmp_path / "a.pth")
    assert state.keys() == module.state_dict().keys()
    assert all(t.dtype in (torch.float32, torch.int64) for t in state.values())
    if wrap != "half":
        assert torch.equal(state["0.weight"], module.state_dict()["0.weight"])


def test_a_whole_pickled_model_is_refused_with_what_to_do(tmp_path):
    torch.save({"model": block()}, tmp_path / "a.pth")
    with pytest.raises(
        UserError, match=r"holds a whole torch\.nn\.modules\.container\.Sequential; give a file of its st"
    ):
        read_published(tmp_path / "a.pth")
