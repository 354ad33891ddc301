"""Programs of examples/ give what the command gives; scripts parse, and start tables or commands that exist; a family
needs its own packages alone."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from toy.experiment import write_coco, write_experiment

import zsqdet
from common.cli import main, parse
from common.config.load import load_config
from common.runtime.errors import UserError

ROOT = Path(__file__).parents[1]
SMALL = {
    "synthesis": {"num_images": 2, "batch_size": 2, "iterations": 1, "low_resolution_iterations": 0},
    "quantization": {"calibration_images": 2, "rounding": "nearest"},
    "training": {"epochs": 0},
    "evaluation": {"image_size": 32},
    "data": {"images": None, "annotations": None},
}
SCRIPTS = sorted([*(ROOT / "scripts").glob("*.sh"), *(ROOT / "scripts").glob("*.sbatch")])
TABLES = [path for path in SCRIPTS if path.stem.startswith("table_")]
DEMOS = re.findall(r"\bconfig=(\S+)", (ROOT / "scripts/demo.sh").read_text())
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
BLOCKED = """
import contextlib, io, json, sys
from zsqdet import main
class Nothing:
    packages = ()
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.packages:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
nothing, results = Nothing(), []
sys.meta_path.insert(0, nothing)
for nothing.packages, words in json.loads(sys.argv[1]):
    assert not set(nothing.packages) & set(sys.modules)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    results.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""
FAMILIES = ["ultralytics", "mmdet", "mmcv", "mmengine", "timm"]
EVALUATE = ("evaluate", "configs/resnet/micro_resnet.yaml")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A configuration of the toy that takes a second and has no data."""
    path = write_experiment(tmp_path_factory.mktemp("python"))
    own = {"synthesis": SMALL["synthesis"] | {"directory": str(path.parent / "sets")}}
    (path.parent / "small.yaml").write_text(yaml.safe_dump({"base": str(path)} | SMALL | own))
    return path.parent / "small.yaml"


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


PROGRAMS = [*(ROOT / "examples").glob("*.py"), *(ROOT / "common/deployment/scripts").glob("*.py")]


@pytest.mark.parametrize("path", PROGRAMS, ids=[path.stem for path in PROGRAMS])
@pytest.mark.parametrize("words", [[], ["--help"]])
def test_a_program_without_its_arguments_says_its_usage_in_one_line(path, words, monkeypatch):
    if path.stem == "quantize_openvino":
        monkeypatch.setitem(sys.modules, "nncf", types.SimpleNamespace(Dataset=list))
    monkeypatch.setattr(sys, "argv", [path.name, *words])
    with pytest.raises(SystemExit, match=r"^usage: python [^\n]+$"):
        runpy.run_path(str(path), run_name="__main__")


def test_a_sweep_shares_its_images_and_says_how_close_each_is(config, tmp_path, monkeypatch, capsys):
    example("sweep.py", monkeypatch, config, tmp_path)
    rows = capsys.readouterr().out.splitlines()
    assert [row.partition(":")[0] for row in rows] == ["w8a8", "w6a6", "w4a8"]
    assert not any("MB" in row for row in rows)
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


def test_settings_that_were_changed_after_the_run_are_named_by_report_export_and_detector(tmp_path):
    run = zsqdet.quantize(write_experiment(tmp_path), settings={"training.epochs": 0})
    path = run.folder / "config.yaml"
    path.write_text(path.read_text().replace("weight_bits: 4", "weight_bits: 6"))
    for call in (lambda: run.report, lambda: run.detector, lambda: run.export("onnxruntime")):
        with pytest.raises(UserError, match=f"^{path}: changed since the run; put it back, or run with it and another"):
            call()


def test_mistakes_are_user_errors_with_the_line_of_the_command(tmp_path):
    with pytest.raises(UserError, match="no finished run"):
        zsqdet.load(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        zsqdet.quantize(tmp_path / "best.pt", bits="w4a8")
    with pytest.raises(UserError, match=r"^bits: found 'w99'"):
        zsqdet.quantize(write_experiment(tmp_path), bits="w99")
    with pytest.raises(UserError, match=r"training\.epochs: found set; a setting is text, a number, a list or a dict"):
        zsqdet.quantize(write_experiment(tmp_path), settings={"training.epochs": {1}})
    calls = {
        "source": lambda: zsqdet.quantize(123),
        "run": lambda: zsqdet.load(5),
        "settings": lambda: zsqdet.Run(tmp_path).evaluate(5),
        "out": lambda: zsqdet.Run(tmp_path).export("onnxruntime", 5),
    }
    for name, call in calls.items():
        with pytest.raises(UserError, match=f"^{name}: found int; allowed: a (path|dict)[^\n]*$"):
            call()
    for long in ("a" * 5000, Path("a" * 5000)):
        with pytest.raises(UserError, match=r"^run: found [^\n]{80}; allowed: a path, as text or pathlib.Path$"):
            zsqdet.load(long)
    assert not (tmp_path / "runs").exists()


class Adapter:
    stride = 32

    def detect(self, module, images, confidence, iou, max_detections):
        return images


IMAGES = torch.rand(2, 3, 64, 32)


@pytest.mark.parametrize(
    ("images", "limits", "message"),
    [
        (IMAGES.numpy(), {}, "images: found ndarray; allowed are tensors"),
        (IMAGES[0], {}, r"images: found the shape \[3, 64, 32\]; .* multiples of 32"),
        (IMAGES[:, :1], {}, r"images: found the shape \[2, 1, 64, 32\]"),
        (IMAGES[..., :31], {}, r"images: found the shape \[2, 3, 64, 31\]"),
        (IMAGES[:0], {}, r"images: found the shape \[0, 3, 64, 32\]"),
        (IMAGES * 255, {}, "images: found values from .* to 25.*; allowed are"),
        (IMAGES - 0.5, {}, "images: found values from -0.* to"),
        (IMAGES / 0 * 0, {}, "images: found values from nan to nan"),
        (IMAGES.long(), {}, "images: found torch.int64"),
        (IMAGES.to_sparse(), {}, "images: found a tensor without plain values"),
        (IMAGES.to("meta"), {}, "images: found a tensor without plain values"),
        (IMAGES, {"confidence": 25}, "confidence: found 25; allowed are numbers from 0 to 1"),
        (IMAGES, {"confidence": float("nan")}, "confidence: found nan"),
        (IMAGES, {"iou": "0.7"}, "iou: found '0.7'"),
        (IMAGES, {"max_detections": 0}, "max_detections: found 0; allowed are whole numbers from 1"),
        (IMAGES, {"max_detections": 1.5}, r"max_detections: found 1\.5"),
    ],
)
def test_images_and_limits_that_a_detector_cannot_take_are_one_line(images, limits, message):
    with pytest.raises(UserError, match=message) as caught:
        zsqdet.QuantizedDetector(Adapter(), None).detect(images, **limits)
    assert "\n" not in str(caught.value)


def test_images_of_bytes_are_those_of_floats():
    images = (IMAGES * 255).round()
    detector = zsqdet.QuantizedDetector(Adapter(), nn.Identity())
    torch.testing.assert_close(detector.detect(images.byte()), images / 255, rtol=0, atol=0)
    torch.testing.assert_close(detector.detect(images / 255), images / 255, rtol=0, atol=0)


@pytest.mark.parametrize("mode", [True, False])
def test_a_module_in_training_mode_detects_as_in_eval_mode_and_stays_in_it(mode):
    seen = []
    detector = zsqdet.QuantizedDetector(Adapter(), nn.Identity().train(mode))
    detector.adapter.detect = lambda module, *_: seen.append(module.training)
    detector.detect(IMAGES)
    assert (seen, detector.module.training) == ([False], mode)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "tflite"}, "export: to: found tflite; allowed are onnxruntime, openvino"),
        ({"to": "onnxruntime", "half": True}, "export: found the option half; allowed are activations, any_profile"),
        ({"to": "onnxruntime", "size": 320}, "export: size: found 320"),
        ({"to": "onnxruntime", "size": (0, 320)}, "export: size.0: found 0"),
        ({"to": "onnxruntime", "container": "int4"}, "export: container: found 'int4'; Input should be 'packed' or"),
        ({"to": "onnxruntime", "activations": 4}, "export: activations: found 4"),
        ({"to": "onnxruntime", "batch": 0}, "export: batch: found 0"),
    ],
)
def test_an_option_of_an_export_that_there_is_not_is_one_line(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        zsqdet.Run(tmp_path).export(**options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_bash_can_read_every_script(path):
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_no_script_sources_another_but_the_environment(path):
    assert set(re.findall(r"^ *(?:source|\.) (.*)", path.read_text(), re.M)) <= {"scripts/environment.sh"}


@pytest.mark.parametrize("path", [*TABLES, ROOT / "scripts/demo.sh"], ids=lambda p: p.stem)
def test_a_script_answers_help_with_the_comment_at_its_head(path):
    done = subprocess.run(["bash", path, "--help"], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert (done.returncode, done.stderr) == (0, "")
    head = path.read_text().partition("\nset ")[0].splitlines()[1:]
    assert done.stdout.splitlines() == [line.removeprefix("# ") for line in head]


@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.stem)
def test_a_script_of_a_table_starts_the_runner_with_a_table_that_exists_and_passes_everything_on(path):
    line = path.read_text().splitlines()[-1]
    assert line == f'python -m tools.experiments run configs/tables/{path.stem.removeprefix("table_")}.yaml "$@"'
    assert (ROOT / shlex.split(line)[4]).is_file()


def test_coco_may_be_relative_to_where_the_script_is_called(tmp_path):
    (tmp_path / "coco").mkdir()
    if not (ROOT / ".venv/installed").exists():
        pytest.skip("scripts/setup.sh has not made .venv, and would do so now")
    words = ["bash", ROOT / "scripts/table_yolo11.sh", "--only", "yolo11s/w8a8/ours", "--dry-run"]
    done = subprocess.run(words, cwd=tmp_path, env=os.environ | {"COCO": "coco"}, capture_output=True, text=True)
    assert f"data.images={tmp_path}/coco/images/val2017 " in done.stdout, done.stderr


FAKES = {"scontrol": "echo first; echo second", "python": 'printf "%s\\n" "$@"'}


def test_a_job_on_a_cluster_starts_each_run_on_all_nodes(tmp_path):
    for name, text in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "70001", "SLURM_JOB_NODELIST": "n[1-2]"}
    job |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    command = ["bash", ROOT / "scripts/slurm_table.sbatch", "configs/tables/swin.yaml", "--only", "swin_t/*"]
    done = subprocess.run(command, env=job, cwd=tmp_path, capture_output=True, text=True)
    words = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert words[:6] == ["-m", "tools.experiments", "run", "configs/tables/swin.yaml", "--only", "swin_t/*"]
    launch = "srun python -P -m common.runtime.launch --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d"
    assert words[6:] == ["--launcher", f"{launch} --rdzv_id 70001 --rdzv_endpoint first:30001"]


@pytest.mark.parametrize("bits", ["w4a8", "w4a4"])
@pytest.mark.parametrize("config", DEMOS)
def test_the_commands_of_the_demo_load(config, bits):
    text = (ROOT / "scripts/demo.sh").read_text()
    published = shlex.split(re.search(r"published=\((.*?)\)", text)[1])
    for extra in ([], published):
        arguments = parse(["run", config, f"bits={bits}", *extra])
        load_config(ROOT / arguments.config, arguments.overrides)


def test_the_demo_has_one_configuration_for_each_detector_and_refuses_others():
    assert len(set(DEMOS)) == 4
    done = subprocess.run(["bash", ROOT / "scripts/demo.sh", "yolov4"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: no demo for 'yolov4'; there is one for yolo11, yolov5, resnet and vit\n"


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_a_command_whose_streams_are_closed_does_its_work_and_writes_nothing_else(tmp_path, closed):
    config = write_experiment(tmp_path)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    words = f"exec {sys.executable} -m zsqdet evaluate {config} --json {tmp_path / 'found.json'} {closed}"
    assert subprocess.run(["bash", "-c", words], env=environment, cwd=ROOT, capture_output=True).returncode == 0
    assert json.loads((tmp_path / "found.json").read_text())["AP"] >= 0


@pytest.mark.parametrize("words", ["zsqdet keys", "tools.experiments run configs/tables/yolo11n.yaml --list"])
@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_command_whose_output_nobody_reads_ends_without_a_word(words, buffered):
    environment = os.environ | {"PYTHONUNBUFFERED": buffered}
    command = f"{sys.executable} -m {words} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    "said",
    [
        {"TQDM_MININTERVAL": "abc"},
        {"TORCH_LOGS": "bad"},
        {"OPENCV_IO_MAX_IMAGE_PIXELS": "abc"},
        {"OPENCV_IO_MAX_IMAGE_WIDTH": "9" * 40},
    ],
    ids=str,
)
def test_a_variable_that_a_library_fails_on_is_named_in_one_line(said):
    command = [sys.executable, "-m", "zsqdet", "info", ROOT / "tools/shapes/micro_yolo11.safetensors"]
    done = subprocess.run(command, env=os.environ | said, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(rf"error: {next(iter(said))}: found[^\n]* in the environment[^\n]* unset it\n", done.stderr)


def test_what_a_cluster_says_to_a_process_that_is_alone_is_not_passed_on_to_ultralytics():
    said = {"WORLD_SIZE": "abc", "RANK": "x", "LOCAL_RANK": "-1"}
    command = [sys.executable, "-m", "zsqdet", "info", ROOT / "tools/shapes/micro_yolo11.safetensors"]
    done = subprocess.run(command, env=os.environ | said, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """A folder, and by name: exit code, output and errors of commands where packages cannot be imported."""
    folder = tmp_path_factory.mktemp("without")
    weights = folder / "a.safetensors"
    weights.touch()
    config = write_experiment(folder)
    (folder / "three").mkdir()
    write_coco(folder / "three", boxes=1, classes=("circle", "square", "triangle"))
    data = (f"data.images={folder / 'three/images'}", f"data.annotations={folder / 'three/annotations.json'}")
    commands = {
        "run": (FAMILIES, ["run", str(config)]),
        "torchvision": (FAMILIES, [*EVALUATE, "evaluation.image_size=64", *data]),
        "yolo11": (["ultralytics"], ["run", EVALUATE[1], "family=yolo11", f"weights={weights}", *data]),
        "vit": (["mmdet"], [*EVALUATE, "family=vit", f"weights={weights}", *data]),
    }
    command = [sys.executable, "-c", BLOCKED, json.dumps(list(commands.values()))]
    paths = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=paths, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    return folder, dict(zip(commands, json.loads(done.stdout), strict=True))


def test_a_run_needs_no_package_of_a_family(without):
    folder, told = without
    code, _, err = told["run"]
    assert code == 0, err
    assert (folder / "run/report.html").is_file()


def test_a_torchvision_detector_needs_no_package_of_the_others(without):
    code, out, err = without[1]["torchvision"]
    assert code == 0, err
    assert out.startswith("AP ")


@pytest.mark.parametrize(("family", "package", "extra"), [("yolo11", "ultralytics", "yolo"), ("vit", "mmdet", "vit")])
def test_a_family_without_its_packages_is_one_line(without, family, package, extra):
    code, _, err = without[1][family]
    assert code == 2
    assert err == (
        f"error: family: {family} needs {package}, which is not installed; "
        f"run bash scripts/setup.sh {extra} or pip install -e .[{extra}]\n"
    )


def test_every_family_names_an_extra_that_exists_and_all_has_them_all():
    named = {path.parent.name: __import__(path.parent.name).EXTRA for path in ROOT.glob("*/adapter.py")}
    assert set(named.values()) == set(EXTRAS) - {"all", "dev", "export"}
    assert EXTRAS["all"] == ["zsqdet[yolo,resnet,vit,export]"]
