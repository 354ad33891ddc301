"""Commands that are disturbed: by a second one on the same folder, by signals, damage and a full disk."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from toy.experiment import CONFIG, write_experiment

from common.cli import main
from common.runtime.files import lock

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run, whose set, measurement and run folder are named by what is in them."""
    folder = tmp_path_factory.mktemp("finished")
    assert main(["run", str(write_experiment(folder)), "training.epochs=0"]) == 0
    return folder


@pytest.mark.parametrize("kind", ["synthetic", "measured", "run"])
def test_a_second_command_waits_for_the_folder_that_it_needs(finished, kind, capsys):
    """A run of other bits for what runs share; the same run for its own folder."""
    (folder,) = [finished / "run"] if kind == "run" else (finished / kind).iterdir()
    words = ["run", str(finished / "experiment.yaml"), "training.epochs=0"]
    if kind != "run":
        words += ["bits=w8a8", f"run_dir={finished / f'other_{kind}'}"]
    codes = []
    second = threading.Thread(target=lambda: codes.append(main(words)))
    said = ""
    with lock(folder):
        second.start()
        end = time.monotonic() + 60
        while f"another run holds {folder}; waiting" not in said and time.monotonic() < end:
            time.sleep(0.05)
            said += capsys.readouterr().err
        assert second.is_alive()
    second.join(120)
    said += capsys.readouterr().err
    assert codes == [0]
    assert said.count("; waiting") == 1
    assert "images match" not in said  # the set was not made again
    assert "evaluating full precision" not in said or kind != "run"


def test_a_run_that_is_disturbed_at_random_ends_as_if_it_had_not_been(tmp_path):
    write_experiment(tmp_path)
    (tmp_path / "experiment.yaml").unlink()
    config = CONFIG.format(folder=".").replace("./synthetic", "./sets").replace("epochs: 2", "epochs: 1")
    (tmp_path / "c.yaml").write_text(config)
    kinds = ["kill and damage", "too large", "twice"]
    words = ["--inputs", str(tmp_path), "--times", str(len(kinds)), "--seed", "11", "--kinds", *kinds]
    command = [sys.executable, "-m", "tools.torture", *words]
    paths = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=paths)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("3 of 3 good\n")
