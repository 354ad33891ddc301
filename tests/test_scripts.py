"""Scripts are thin: they parse, and every command in them exists and loads its configuration."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from common.cli import parse
from common.config.load import load_config

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
DETECTOR_SCRIPTS = [path for path in SCRIPTS if re.fullmatch(r"(yolo11|yolov5)_[nsmlx]|vit_[ts]", path.stem)]


def commands(path):
    """The lines of a script that call zsqdet; where it chooses a `config`, one line for each choice."""
    text = path.read_text()
    choices = re.findall(r"\bconfig=(\S+)", text) or [""]
    lines = [line for line in text.splitlines() if line.startswith(("zsqdet ", "python -m common.cli "))]
    return dict.fromkeys((path, line.replace("$config", choice)) for line in lines for choice in choices)


COMMANDS = [command for path in SCRIPTS for command in commands(path)]
TWO_STAGE_SCRIPTS = {"resnet_maskrcnn": "maskrcnn_resnet50_fpn", "resnet_fasterrcnn": "fasterrcnn_resnet50_fpn"}
CONFIGS = {"yolo11": "yolo11/yolo11", "yolov5": "yolov5/yolov5", "vit": "vit/swin_"}  # of a family, before the size


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_bash_can_read_every_script(path):
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


WITH_HELP = [path for path in SCRIPTS if "# Usage:" in path.read_text()]


@pytest.mark.parametrize("path", WITH_HELP, ids=lambda p: p.stem)
def test_a_script_answers_help_with_the_comment_at_its_head(path):
    done = subprocess.run(["bash", path, "--help"], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert (done.returncode, done.stderr) == (0, "")
    head = re.split(r"\n(?:source|set) ", path.read_text())[0].splitlines()[1:]
    assert done.stdout.splitlines() == [line.removeprefix("#").removeprefix(" ") for line in head]


@pytest.mark.parametrize(("path", "line"), COMMANDS, ids=[f"{p.stem}-{i}" for i, (p, _) in enumerate(COMMANDS)])
def test_every_command_in_a_script_exists_and_loads_its_configuration(path, line):
    words = [word for word in shlex.split(line) if word not in ("$@", "zsqdet")]
    arguments = parse(words)
    if arguments.command == "report":
        return
    assert (ROOT / arguments.config).is_file(), f"{path.name}: {arguments.config} does not exist"
    load_config(ROOT / arguments.config, [word for word in arguments.overrides if "$" not in word])


@pytest.mark.parametrize("path", DETECTOR_SCRIPTS, ids=lambda p: p.stem)
def test_a_detectors_script_covers_its_four_bit_widths_and_passes_settings_on(path):
    text = path.read_text()
    family, _, size = path.stem.partition("_")
    assert "set -euo pipefail" in text
    for bits in ("w8a8", "w6a6", "w4a8", "w4a4"):
        assert f'zsqdet run configs/{CONFIGS[family]}{size}.yaml bits={bits} "$@"' in text


def test_there_is_a_script_for_each_size():
    found = [path.stem for path in DETECTOR_SCRIPTS]
    assert found == sorted([f"{f}_{size}" for f in ("yolo11", "yolov5") for size in "nsmlx"] + ["vit_s", "vit_t"])


def test_each_run_in_a_script_has_a_folder_of_its_own():
    folders = []
    for path, line in COMMANDS:
        arguments = parse([word for word in shlex.split(line) if word not in ("$@", "zsqdet")])
        if path in DETECTOR_SCRIPTS:
            folders.append(load_config(ROOT / arguments.config, arguments.overrides).run_dir)
    assert len(folders) == len(set(folders)) == 8 * len(DETECTOR_SCRIPTS)


@pytest.mark.parametrize("path", DETECTOR_SCRIPTS, ids=lambda p: p.stem)
def test_a_script_says_what_it_needs_when_coco_is_not_named(path):
    done = subprocess.run(["bash", path], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode != 0
    assert "COCO: set it to the folder that holds images/val2017" in done.stderr


DEMOS = re.findall(r"\bconfig=(\S+)", (ROOT / "scripts/demo.sh").read_text())


@pytest.mark.parametrize("bits", ["w4a8", "w4a4"])
@pytest.mark.parametrize("config", DEMOS)
def test_the_commands_of_the_demo_load(config, bits):
    text = (ROOT / "scripts/demo.sh").read_text()
    published, *less = [shlex.split(found) for found in re.findall(r"(?:published|less)=\((.*?)\)", text)][::-1]
    for extra in (*less, published):
        arguments = parse(["run", config, f"bits={bits}", *extra])
        load_config(ROOT / arguments.config, arguments.overrides)


@pytest.mark.parametrize("words", [["yolo", "cuda"], ["--gpu"]])
def test_setup_refuses_names_that_it_does_not_know_before_it_installs_anything(words):
    done = subprocess.run(["bash", ROOT / "scripts/setup.sh", *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: nothing is called '{words[-1]}'; there are yolo, resnet, vit, all and dev\n"


def test_the_environment_takes_all_cores_and_defines_no_command(tmp_path):
    command = [
        "bash",
        "-euc",
        f"source {ROOT}/scripts/environment.sh; type -t zsqdet || true; echo ${{OMP_NUM_THREADS-unset}}",
    ]
    done = subprocess.run(command, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.stdout == "unset\n", done.stderr


def test_the_demo_has_one_configuration_for_each_detector_and_refuses_others():
    assert len(set(DEMOS)) == 4
    done = subprocess.run(["bash", ROOT / "scripts/demo.sh", "yolov4"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: no demo for 'yolov4'; there is one for yolo11, yolov5, resnet and vit\n"


@pytest.mark.parametrize(("script", "name"), TWO_STAGE_SCRIPTS.items())
def test_two_stage_scripts_cover_four_bit_widths_and_say_what_they_need(script, name):
    path = ROOT / f"scripts/{script}.sh"
    for bits in ("w8a8", "w6a6", "w4a8", "w4a4"):
        assert f'zsqdet run configs/resnet/{name}.yaml bits={bits} "$@"' in path.read_text()
    done = subprocess.run(["bash", path], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode != 0
    assert "COCO: set it to the folder that holds images/val2017" in done.stderr
