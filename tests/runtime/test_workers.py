"""A process on each core of a CPU: what it makes, and how it ends."""

import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runtime.test_processes import PATHS, ROOT, TWO, is_alive, wait_until
from toy import told_by, work
from toy.experiment import write_experiment

from common.cli import main
from common.runtime.distributed import in_workers
from common.runtime.environment import torch_threads
from common.runtime.errors import UserError
from common.synthesis import batch


def files_of(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*/images/*"))} | {
        p.name: p.read_bytes() for p in folder.glob("*/annotations.json")
    }


def test_a_process_on_each_core_makes_the_same_set_to_the_byte_as_one_after_the_other(tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(batch, "in_workers", lambda *given: used.append(len(given[1])) or in_workers(*given))
    with torch_threads(2):
        for name, memory in (("two", 2**40), ("one", 0)):
            (tmp_path / name).mkdir()
            monkeypatch.setattr(batch, "free_memory", lambda memory=memory: memory)
            assert main(["synthesize", str(write_experiment(tmp_path / name)), "synthesis.batch_size=2"]) == 0
        assert torch.get_num_threads() == 2
    assert used == [2]
    two, one = (files_of(tmp_path / name / "synthetic") for name in ("two", "one"))
    assert len(two) == 7
    assert two == one


@pytest.mark.parametrize(
    ("kind", "message"),
    [("mistake", "a mistake"), ("killed", "ended by SIGKILL, often for lack of memory; OMP_NUM_THREADS=1 has one")],
)
def test_when_a_worker_fails_it_is_said_and_the_others_are_ended(tmp_path, kind, message):
    with pytest.raises(UserError, match=message):
        list(in_workers(work, [("forever", tmp_path), (kind, tmp_path)], 1))
    assert not [p for p in tmp_path.glob("*.pid") if is_alive(int(p.stem))]


@pytest.mark.parametrize("end", ["kill -9 $$", "kill -15 $$"])
def test_a_worker_that_dies_while_it_starts_is_one_line(tmp_path, monkeypatch, end):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/bash\n{end}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(UserError, match="a worker was ended by SIG"):
        list(in_workers(work, [("plain", tmp_path), ("large" * 10**6, tmp_path)], 1))


@pytest.fixture(scope="module", params=["workers", "torchrun"])
def outside(request, tmp_path_factory):
    """A program of several processes in a directory with files that it must not find."""
    folder = tmp_path_factory.mktemp("outside")
    config = write_experiment(folder)
    for name in ("socket", "selectors", "pickle", "multiprocessing", "subprocess", "json", "random", "common", "torch"):
        (folder / f"{name}.py").write_text(f"open({str(folder / 'marker')!r}, 'a').write(__file__)")
    for name in ("libc.so.6", "libz.so.1"):  # a program that looks for its libraries here does not start
        (folder / name).write_text("no library")
    environment = PATHS | {"OMP_NUM_THREADS": "2"}
    environment.pop("LD_LIBRARY_PATH", None)  # where it is not set, importing cv2 makes it end in the current directory
    start = [sys.executable, "-P", "-m", "common.runtime.launch", *TWO, "-m", "zsqdet", "synthesize"]
    if request.param == "workers":
        start = [Path(sys.executable).with_name("zsqdet"), "run"]
        (folder / "matplotlibrc").write_text("savefig.format: nonsense\nno setting: 1\n")
    words = [*start, config, "synthesis.batch_size=2", "training.epochs=0"]
    done = subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_no_file_of_the_current_directory_is_run(outside):
    assert not (outside[0] / "marker").exists()


@pytest.mark.parametrize("outside", ["workers"], indirect=True)
def test_settings_of_matplotlib_in_the_current_directory_are_not_read(outside):
    folder, done = outside
    assert (folder / "run/report.html").is_file()
    assert "matplotlibrc" not in done.stderr


def test_workers_of_a_daemonic_process_too_tell_what_they_have_and_have_the_threads_that_they_are_given(tmp_path):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(told_by, (tmp_path,)) == [1, 1]


SCRIPT = """
import signal
from pathlib import Path
from toy import in_workers, work

signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background of a shell ignore it
print("started", flush=True)
for told in in_workers(work, [("forever", Path({folder!r}))] * 2, 1):
    print(told, flush=True)
"""


@pytest.fixture
def script(tmp_path):
    """A running script, without a guard around its lines, whose two workers never end; they must end with it."""
    (tmp_path / "script.py").write_text(SCRIPT.format(folder=str(tmp_path)))
    options = {"env": PATHS, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True}
    with subprocess.Popen([sys.executable, tmp_path / "script.py"], **options) as script:
        assert script.stdout.readline() == b"started\n"
        yield script
    wait_until(lambda: not [p for p in tmp_path.glob("*.pid") if is_alive(int(p.stem))], 20)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_the_script_that_started_them(script, number):
    assert [script.stdout.readline() for _ in range(2)] == [b"here\n", b"here\n"]
    script.send_signal(number)


@pytest.mark.parametrize("told", [0, 2], ids=["while they start", "while they work"])
def test_ctrl_c_reaches_all_processes_and_one_says_so(script, told):
    for _ in range(told):
        script.stdout.readline()
    time.sleep(1)
    os.killpg(script.pid, signal.SIGINT)
    assert script.stderr.read().count(b"KeyboardInterrupt") == 1


MEMORY = """
import psutil, torch
from common.runtime.environment import freed_memory_kept

def left():  # MiB, of 200 that were freed
    before = psutil.Process().memory_info().rss
    torch.ones(50 * 2**20)
    return (psutil.Process().memory_info().rss - before) / 2**20

left()
with freed_memory_kept():
    inside = left()
print(inside > 150, abs(left()) < 20, left() < 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc")
def test_freed_memory_is_kept_inside_and_given_back_afterwards():
    done = subprocess.run([sys.executable, "-c", MEMORY], env=PATHS, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["True"] * 3, done.stderr


@pytest.mark.parametrize("first", ["import common, cv2", "import cv2, common"])
@pytest.mark.parametrize("before", [None, "", "/a:", ":/a::/b"])
def test_no_program_that_is_started_looks_for_libraries_in_the_current_directory(first, before):
    environment = {key: value for key, value in PATHS.items() if key != "LD_LIBRARY_PATH"}
    if before is not None:
        environment["LD_LIBRARY_PATH"] = before
    code = f"{first}, os; print(os.environ['LD_LIBRARY_PATH'])"
    done = subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True)
    found = done.stdout.strip().split(":")
    assert done.returncode == 0, done.stderr
    assert "" not in found
    assert [path for path in found if path in ("/a", "/b")] == list(filter(None, (before or "").split(":")))
