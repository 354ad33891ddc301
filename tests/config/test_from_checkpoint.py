"""A checkpoint in the place of a configuration: what is found out from it, and what is said where nothing fits."""

import json
import logging
from pathlib import Path

import pytest
import torch
from hostile.forge import MICRO, pickled_yolo11

from common.cli import main
from common.config.from_checkpoint import recognise
from common.config.load import load_config
from common.config.presets import EXPORTED, PRESETS
from common.deployment.targets import TARGETS
from common.pipeline.run_dir import results
from common.runtime.errors import UserError

QUICK = ["synthesis.num_images=2", "synthesis.low_resolution_iterations=2", "synthesis.iterations=1"]
SMALL = ["synthesis.image_size=64", "evaluation.image_size=64", "synthesis.low_resolution_size=32"]


@pytest.fixture
def best(tmp_path, monkeypatch):
    """A file as Ultralytics' training leaves it, and its folder as the current one."""
    monkeypatch.chdir(tmp_path)
    return pickled_yolo11(tmp_path / "best.pt", lambda module: setattr(module, "args", {"imgsz": 200}))


def test_family_size_preset_and_name_of_the_run_come_from_the_file_and_the_device(best, caplog):
    caplog.set_level(logging.INFO, "zsqdet")
    config = load_config(Path("best.pt"), ["bits=w4a8", "device=cpu"])
    assert (config.family, config.weights, config.run_dir) == ("yolo11", Path("best.pt"), Path("runs/best_w4a8"))
    assert config.synthesis.image_size == config.evaluation.image_size == 224  # the multiple of 32 that holds 200
    assert config.preset == "quick"
    assert config.synthesis.num_images == PRESETS["synthesis"]["quick"]["num_images"]
    assert config.training.epochs == 0
    assert "best.pt: yolo11 for images of 224 pixels; preset=quick: 48 images" in caplog.text


def test_settings_of_the_command_line_are_over_those_of_the_file(best):
    config = load_config(Path("best.pt"), ["preset=default", "synthesis.image_size=320", "run_dir=there", "seed=3"])
    assert (config.preset, config.synthesis.num_images, config.training.epochs) == ("default", 2048, 100)
    assert (config.synthesis.image_size, config.evaluation.image_size) == (320, 224)
    assert (config.run_dir, config.seed) == (Path("there"), 3)


@pytest.mark.parametrize("preset", ["quick", "default", "paper"])
def test_what_goes_with_a_two_stage_file_stays_under_any_preset(preset):
    config = load_config(MICRO["resnet"], [f"preset={preset}"])
    assert config.family == "resnet"
    assert not config.quantization.letterbox_padding
    assert (config.training.batch_size, config.evaluation.resize) == (8, "shorter_side")
    assert config.quantization.eight_bit_roles == (() if preset == "paper" else ("early", "head"))


@pytest.mark.parametrize("family", MICRO)
def test_the_family_of_our_own_files_is_recognised(family):
    assert recognise(MICRO[family])[0] == family


@pytest.mark.parametrize(("said", "size"), [([640, 480], 640), (None, 640), ("640", 640), (True, 640), (10**9, 640)])
def test_an_image_size_that_is_none_is_not_believed(tmp_path, said, size):
    path = pickled_yolo11(tmp_path / "a.pt", lambda module: setattr(module, "args", {"imgsz": said}))
    assert recognise(path)[1]["synthesis"]["image_size"] == size


def saved(path, content):
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"backbone.weight": torch.zeros(2)}, "1 tensors (backbone.weight, ...), which is of no family"),
        ({"model.0.conv.weight": torch.zeros(2)}, "a state_dict of a YOLO lacks its network: give the .pt"),
        ({"epoch": 3}, "not a state_dict; expected names with tensors"),
        ([1, 2], "not a state_dict; expected names with tensors"),
    ],
)
@pytest.mark.parametrize("command", ["run", "synthesize", "evaluate", "info"])
def test_a_file_of_no_family_is_one_line_and_leaves_nothing_behind(
    tmp_path, monkeypatch, capsys, command, content, found
):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "best.pt", content)
    assert main([command, "best.pt"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: best.pt: ")
    assert found in line
    if "no family" in found:
        assert all(f"{family}: " in line for family in MICRO)
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


def test_a_missing_file_is_named_and_a_text_is_still_a_configuration(tmp_path):
    with pytest.raises(UserError, match=r"none\.pt does not exist; give the path of a checkpoint, or family=NAME"):
        load_config(tmp_path / "none.pt")
    (tmp_path / "plain").write_text("weights: a.pt\n")
    assert load_config(tmp_path / "plain").weights == Path("a.pt")


def test_a_run_of_a_checkpoint_is_exported_and_its_configuration_repeats_it(best, capsys):
    words = ["bits=w4a8", "device=cpu", "export=onnxruntime", "quantization.rounding=nearest", *QUICK, *SMALL]
    assert main(["run", "best.pt", *words]) == 0
    out = capsys.readouterr().out
    run = Path("runs/best_w4a8")
    assert "report.html" in out
    assert (run / "export/onnxruntime/model.onnx").is_file()
    assert results(run)["seconds"].keys() >= {"synthesis", "calibration", "export"}
    assert load_config(run / "config.yaml") == load_config(Path("best.pt"), words)
    kinds = {"best.pt": "float checkpoint", str(run): "run", str(run / "quantized"): "quantized detector"}
    kinds |= {results(run)["imageset"]: "synthetic image set"}
    kinds |= {str(run / "export/onnxruntime"): "detector exported for onnxruntime"}
    kinds |= {str(run / "export/onnxruntime/model.onnx"): "ONNX graph"}
    for place, kind in kinds.items():
        assert main(["info", place, "--json", "about.json"]) == 0
        about = json.loads(Path("about.json").read_text())
        assert about["what"] == kind
        assert "W4A8" in about.get("bits", "W4A8") or place == "best.pt"
        if kind in ("float checkpoint", "run", "quantized detector"):
            assert about["family"] == "yolo11"
            assert about["classes"].startswith("10: ")
            assert about["stride"] == 32


def test_what_an_export_needs_is_what_exports_ask_for():
    asked = {name: target for name, target in TARGETS.items() if name != "fp8"}  # by hand: it asks for certain levels
    assert {name: target.profile for name, target in asked.items()} == {n: k["profile"] for n, k in EXPORTED.items()}
    assert {n for n, target in asked.items() if target.codes == "int8"} == {
        n for n, k in EXPORTED.items() if len(k) > 1
    }


def test_an_export_that_its_settings_forbid_is_found_before_any_work(best):
    with pytest.raises(UserError, match=r"export: found onnxruntime, but quantization.profile: inputs; .*needs full"):
        load_config(Path("best.pt"), ["export=onnxruntime", "quantization.profile=inputs"])
