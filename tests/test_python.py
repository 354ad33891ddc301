"""zsqdet from Python: the programs of examples/ run, and give what the command gives."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from toy.experiment import write_experiment

import zsqdet
from common.cli import main
from common.runtime.errors import UserError

ROOT = Path(__file__).parents[1]
SMALL = {
    "synthesis": {"num_images": 2, "image_size": 96, "batch_size": 2, "iterations": 1, "low_resolution_iterations": 0},
    "quantization": {"calibration_images": 2, "rounding": "nearest"},
    "training": {"epochs": 0},
    "evaluation": {"image_size": 96},
    "data": {"images": None, "annotations": None},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A configuration of the micro YOLO11 that takes a second."""
    folder = tmp_path_factory.mktemp("python")
    path = folder / "small.yaml"
    base = {"base": str(ROOT / "configs/yolo11/micro_yolo11.yaml")}
    places = {"synthesis": SMALL["synthesis"] | {"directory": str(folder / "sets")}}
    path.write_text(yaml.safe_dump(base | SMALL | places))
    return path


def example(name, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


def test_the_example_quantizes_and_exports_and_the_next_one_detects(config, tmp_path, monkeypatch, capsys):
    example("quantize.py", monkeypatch, config, tmp_path / "run")
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("ptq: fidelity ")
    assert out[1:] == [str(tmp_path / "run/report.html"), str(tmp_path / "run/export/onnxruntime")]
    (image,) = list((config.parent / "sets").glob("*/images/000000.png"))[:1]
    example("detect.py", monkeypatch, tmp_path / "run", image)
    assert all(" at [" in line for line in capsys.readouterr().out.splitlines())


def test_a_sweep_shares_its_images_and_smaller_bits_make_smaller_files(config, tmp_path, monkeypatch, capsys):
    example("sweep.py", monkeypatch, config, tmp_path)
    rows = capsys.readouterr().out.splitlines()
    assert [row.partition(":")[0] for row in rows] == ["w8a8", "w6a6", "w4a8"]
    assert len({zsqdet.load(tmp_path / bits).results["imageset"] for bits in ("w8a8", "w6a6", "w4a8")}) == 1


def test_a_run_from_python_is_the_run_of_the_command(tmp_path, capsys):
    config = write_experiment(tmp_path)
    run = zsqdet.quantize(config, settings={"training.epochs": 0}, run_dir=tmp_path / "python")
    assert main(["run", str(config), "training.epochs=0", f"run_dir={tmp_path / 'command'}"]) == 0
    for name in ("quantized/model.safetensors", "quantized/quantization.json"):
        assert (run.folder / name).read_bytes() == (tmp_path / "command" / name).read_bytes()
    assert run.detector.class_names
    content = json.loads((tmp_path / "annotations.json").read_text())
    assert len(content["images"]) == 4
    assert run.evaluate()["AP"] == run.results["rows"][-1]["AP"]  # on the set of the run
    given = {"data.images": tmp_path / "images", "data.annotations": tmp_path / "annotations.json"}
    assert run.evaluate(given)["AP"] == run.results["rows"][-1]["AP"]


def test_mistakes_are_user_errors_with_the_line_of_the_command(tmp_path):
    with pytest.raises(UserError, match="no finished run"):
        zsqdet.load(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        zsqdet.quantize(tmp_path / "best.pt", bits="w4a8")
    with pytest.raises(UserError, match="bits: found 'w99'"):
        zsqdet.quantize(write_experiment(tmp_path), bits="w99")
    assert not (tmp_path / "runs").exists()
