"""Two commands at once on one folder: the second waits, and takes what the first has made."""

import threading
import time

import pytest
from toy.experiment import write_experiment

from common.cli import main
from common.runtime.files import lock


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
