"""Scripts are thin: they parse, say how they are called, and start a table or commands that exist."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from common.cli import parse
from common.config.load import load_config

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*(ROOT / "scripts").glob("*.sh"), *(ROOT / "scripts").glob("*.sbatch")])
TABLES = [path for path in SCRIPTS if path.stem.startswith("table_")]
DEMOS = re.findall(r"\bconfig=(\S+)", (ROOT / "scripts/demo.sh").read_text())


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
    launch = "srun python -m common.runtime.launch --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d"
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
