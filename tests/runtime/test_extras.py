"""common/ works without the packages of the families; a family without its own says which, and how to get them."""

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
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Nothing())
from zsqdet import main
sys.exit(main(sys.argv[1:]))
"""


def without(packages, *words):
    """`zsqdet WORDS` where these packages cannot be imported."""
    paths = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BLOCKED.format(packages=set(packages)), *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=paths, capture_output=True, text=True, timeout=600)


FAMILIES = {"ultralytics", "mmdet", "mmcv", "mmengine", "timm"}


def test_a_run_needs_no_package_of_a_family(tmp_path):
    done = without(FAMILIES, "run", write_experiment(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/report.html").is_file()


def test_a_torchvision_detector_needs_no_package_of_the_others(tmp_path):
    write_coco(tmp_path, boxes=1, classes=("circle", "square", "triangle"))
    data = (f"data.images={tmp_path / 'images'}", f"data.annotations={tmp_path / 'annotations.json'}")
    done = without(FAMILIES, "evaluate", "configs/resnet/micro_resnet.yaml", "evaluation.image_size=64", *data)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("AP ")


@pytest.mark.parametrize(
    ("command", "family", "package", "extra"),
    [("run", "yolo11", "ultralytics", "yolo"), ("evaluate", "vit", "mmdet", "vit")],
)
def test_a_family_without_its_packages_is_one_line(tmp_path, command, family, package, extra):
    weights = tmp_path / "a.safetensors"
    weights.touch()
    (tmp_path / "a.json").touch()
    data = (f"data.images={tmp_path}", f"data.annotations={tmp_path / 'a.json'}")
    done = without(
        {package}, command, "configs/resnet/micro_resnet.yaml", f"family={family}", f"weights={weights}", *data
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"error: family: {family} needs {package}, which is not installed; "
        f"run bash scripts/setup.sh {extra} or pip install -e .[{extra}]\n"
    )


def test_every_family_names_an_extra_that_exists_and_all_has_them_all():
    named = {path.parent.name: __import__(path.parent.name).EXTRA for path in ROOT.glob("*/adapter.py")}
    assert set(named.values()) == set(EXTRAS) - {"all", "dev", "export"}
    assert EXTRAS["all"] == ["zsqdet[yolo,resnet,vit,export]"]
