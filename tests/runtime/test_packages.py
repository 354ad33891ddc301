"""Families of detectors without their packages."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from toy.experiment import write_coco, write_experiment

ROOT = Path(__file__).parents[2]
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
