"""`--gpus N`: as many processes as asked for, and one line whatever ends them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from toy.experiment import write_experiment

from common.cli import main
from common.runtime import launch
from common.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
TWO = ("--standalone", "--nproc_per_node", "2")
PATHS = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}


def start(folder, *settings):
    """Two processes on the CPU that would train for minutes; returns the launcher and the numbers of the two."""
    config = str(write_experiment(folder))
    words = ["run", config, "training.epochs=10000", "training.selection=last", *settings]
    command = [sys.executable, "-m", "common.runtime.launch", *TWO, "-m", "zsqdet", *words]
    launcher = subprocess.Popen(command, env=PATHS, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    wait_until(lambda: (folder / "run/training/history.jsonl").exists())
    return launcher, children(launcher.pid)


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def children(parent):
    return [int(p) for p in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def is_alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_process_that_is_killed_is_one_line_and_the_other_ends_within_seconds(tmp_path):
    launcher, processes = start(tmp_path)
    os.kill(processes[1], signal.SIGKILL)
    _, err = launcher.communicate(timeout=20)
    assert launcher.returncode == 137
    line = "error: rank 1 was ended by SIGKILL, often for lack of memory; the others were ended as well; "
    assert err.splitlines()[-1].startswith(line)
    assert "Traceback" not in err
    assert not any(map(is_alive, processes))


def test_sigterm_ends_all_of_them_with_one_line(tmp_path):
    launcher, processes = start(tmp_path)
    launcher.send_signal(signal.SIGTERM)
    _, err = launcher.communicate(timeout=20)
    assert launcher.returncode == 143
    assert err.count("interrupted; rerun the same command to resume") == 1
    assert "Traceback" not in err
    assert not any(map(is_alive, processes))


def test_the_processes_end_when_the_launcher_is_killed(tmp_path):
    launcher, processes = start(tmp_path)
    launcher.kill()
    launcher.communicate(timeout=20)
    wait_until(lambda: not any(map(is_alive, processes)), seconds=10)


def failure(rank, code, timestamp=0):
    found = launch.ProcessFailure(rank, 1, code, "nowhere")
    found.timestamp = timestamp
    return found


@pytest.mark.parametrize(
    ("codes", "expected"),
    [((2, -15), 2), ((-15, 3), 3), ((1, -9), 137), ((-11, 1), 139), ((-15, -15), 143), ((-2, -15), 130)],
)
def test_the_exit_code_is_that_of_the_process_that_the_others_failed_because_of(codes, expected, capsys):
    assert launch._failed([failure(rank, code, rank) for rank, code in enumerate(codes)]) == expected
    assert len(capsys.readouterr().err.splitlines()) == (expected > 100)


def gpus(monkeypatch, number):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)


@pytest.mark.parametrize(
    ("found", "wanted", "device", "message"),
    [
        (0, 2, "auto", r"--gpus: found 2, but there is no CUDA device here; leave it out to use the CPU"),
        (0, 1, "auto", r"--gpus: found 1, but there is no CUDA device here"),
        (2, 4, "cuda", r"--gpus: found 4, but 2 are visible here; allowed are 1 to 2"),
        (2, 0, "auto", r"--gpus: found 0, but 2 are visible here; allowed are 1 to 2"),
        (2, -1, "auto", r"--gpus: found -1"),
        (2, 2, "cpu", r"--gpus: found 2, but device is cpu; leave out one of them"),
        (2, 2, "cuda:1", r"--gpus: found 2, but device is cuda:1"),
    ],
)
def test_gpus_that_cannot_be_taken_are_refused(monkeypatch, found, wanted, device, message):
    gpus(monkeypatch, found)
    with pytest.raises(UserError, match=message):
        launch.check_gpus(wanted, device)


@pytest.mark.parametrize("command", ["run", "train", "synthesize", "evaluate"])
def test_gpus_starts_the_same_command_in_so_many_processes_and_ends_with_its_exit_code(tmp_path, monkeypatch, command):
    gpus(monkeypatch, 4)
    started = []
    monkeypatch.setattr(launch, "launch", lambda *arguments: started.append(arguments) or 7)
    words = [command, str(write_experiment(tmp_path)), "--gpus", "3", "device=auto"]
    assert main(words) == 7
    assert started == [(3, "zsqdet", words)]


def test_one_gpu_needs_no_launcher(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "launch", lambda *arguments: 1 / 0)
    monkeypatch.setattr(launch, "check_gpus", lambda *arguments: None)
    assert main(["synthesize", str(write_experiment(tmp_path)), "--gpus", "1"]) == 0
