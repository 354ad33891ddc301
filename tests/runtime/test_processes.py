"""Several processes, by torchrun or `--gpus N`, do what one does; what ends them, or a full disk, is one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from toy.experiment import write_experiment

from common.checkpoints.read import load_tensors
from common.cli import main
from common.pipeline.run_dir import results
from common.runtime import environment, launch
from common.runtime.distributed import all_reduce, gather, rank_zero, shard
from common.runtime.errors import UserError
from common.runtime.files import read_json

ROOT = Path(__file__).parents[2]
TWO = ("--standalone", "--nproc_per_node", "2")
PATHS = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
# 6 images: 4 are trained on, in steps of 3 and 1, so that the second process has none in every second step.
WHOLE = ("synthesis.batch_size=2", "training.batch_size=3", "training.epochs=3", "training.selection=last")
# What a step does to the running statistics alone: nothing is learnt.
STATISTICS = (
    *("synthesis.source=noise", "training.epochs=1", "training.batch_size=3", "training.selection=last"),
    *("training.freeze_batch_norm=false", "training.ema_decay=0", "training.learning_rate=0"),
    *("training.affine_learning_rate=0", "training.scale_learning_rate=0", "data.images=null", "data.annotations=null"),
)


def start(folder):
    """Two processes on the CPU that would train for minutes; returns the launcher and the numbers of the two."""
    config = str(write_experiment(folder))
    words = ["train", config, "training.epochs=10000", "training.selection=last", "synthesis.source=noise"]
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


def experiment(folder, name, settings):
    return ["run", str(write_experiment(folder)), f"run_dir={folder}/{name}", *settings]


def in_two_processes(folder, commands):
    (folder / "commands.json").write_text(json.dumps(commands))
    words = [sys.executable, "-m", "common.runtime.launch", *TWO, "-m", "toy.experiment", folder / "commands.json"]
    return subprocess.run(words, env=PATHS, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder with the runs of one process."""
    folder = tmp_path_factory.mktemp("alone")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, settings in (("whole", WHOLE), ("statistics", STATISTICS)):
        assert main(experiment(folder, name, settings)) == 0
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folder with those of two, of which two are interrupted in their second epoch and go on, one of them alone."""
    folder = tmp_path_factory.mktemp("both")
    commands = [experiment(folder, name, settings) for name, settings in (("whole", WHOLE), ("statistics", STATISTICS))]
    interrupted, changed = (experiment(folder, name, WHOLE) for name in ("interrupted", "changed"))
    done = in_two_processes(folder, [*commands, [2, *changed], [2, *interrupted], interrupted])
    assert done.returncode == 0, done.stderr
    assert main(changed) == 0
    return folder, done


def history(run):
    rows = [json.loads(line) for line in (run / "training/history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def tensors(run):
    return load_tensors(run / "quantized/model.safetensors")[0]


def test_two_processes_make_the_same_set_to_the_byte(alone, both):
    sets = [Path(results(folder / "whole")["imageset"]) for folder in (alone, both[0])]
    files = [{p.relative_to(s) for p in s.rglob("*.png")} for s in sets]
    assert files[0] == files[1]
    assert len(files[0]) > 6  # the snapshots as well
    for name in [*files[0], Path("annotations.json")]:
        assert (sets[0] / name).read_bytes() == (sets[1] / name).read_bytes(), name
    assert read_json(sets[0] / "set.json")["history"] == read_json(sets[1] / "set.json")["history"]


def test_two_processes_share_the_images_of_a_step_and_learn_the_same(alone, both):
    one, two = alone / "whole", both[0] / "whole"
    assert len(history(one)) == len(history(two)) == 4
    for row, own in zip(history(one), history(two), strict=True):
        assert own == pytest.approx(row, rel=1e-4, abs=1e-8)
    assert (one / "ptq/model.safetensors").read_bytes() == (two / "ptq/model.safetensors").read_bytes()
    begun = load_tensors(one / "ptq/model.safetensors")[0]
    for name, value in tensors(one).items():
        torch.testing.assert_close(tensors(two)[name], value, rtol=1e-3, atol=1e-5)
    assert any((value - begun[name]).abs().max() > 1e-3 for name, value in tensors(one).items())  # it did learn
    found = [(folder / "predictions/full_precision.json").read_bytes() for folder in (one, two)]
    assert found[0] == found[1]
    assert len(found[0]) > 1000
    assert read_json(two / "environment.json")["processes"] == 2


def test_running_statistics_are_those_of_the_images_of_all_processes(alone, both):
    name = "blocks.0.bn.running_mean"
    begun = load_tensors(alone / "statistics/ptq/model.safetensors")[0][name]
    one, two = (tensors(folder / "statistics")[name] for folder in (alone, both[0]))
    assert (one - begun).abs().max() > 0.01
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)


def test_one_of_the_processes_reports(both):
    folder, done = both
    assert done.stdout.count(str(folder / "whole/report.html")) == 1
    rows = done.stdout.splitlines()
    of_ap, of_fidelity = ([row for row in rows if f"  {kind} " in row] for kind in ("AP", "fidelity"))
    assert sum("full precision" in row for row in of_ap) == sum("trained " in row for row in of_ap) == 2
    assert sum("trained " in row for row in of_fidelity) == 1  # of the run without data
    assert (folder / "whole/report.html").is_file()
    assert len(list((folder / "whole/training/tensorboard").iterdir())) == 1


def test_one_of_the_processes_holds_the_detections_of_all(both):
    folder, done = both
    told = [line.split() for line in done.stdout.splitlines() if line.startswith("process ")]
    held = [{int(words[2]) for words in told if words[1] == process} for process in ("0:", "1:")]
    assert len(read_json(folder / "whole/predictions/full_precision.json")) in held[0]
    assert held[1] == {0}


def test_interrupted_training_of_two_processes_ends_as_if_it_had_not_been(both):
    folder, done = both
    assert "interrupted; rerun the same command to resume" in done.stderr
    assert "training goes on after epoch 1" in done.stderr
    for name in ("ptq", "quantized"):
        path = f"{name}/model.safetensors"
        assert (folder / "interrupted" / path).read_bytes() == (folder / "whole" / path).read_bytes()
    assert history(folder / "interrupted") == history(folder / "whole")


def test_training_goes_on_with_another_number_of_processes(alone, both):
    one, changed = alone / "whole", both[0] / "changed"
    assert read_json(changed / "environment.json")["processes"] == 2  # it began with two
    assert len(history(changed)) == len(history(one))
    for row, own in zip(history(one), history(changed), strict=True):
        assert own == pytest.approx(row, rel=1e-4, abs=1e-8)
    for name, value in tensors(one).items():
        torch.testing.assert_close(tensors(changed)[name], value, rtol=1e-3, atol=1e-5)


def test_each_process_takes_its_own_gpu_and_too_many_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    launched = {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in (launched | {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "3"}).items():
        monkeypatch.setenv(name, value)
    assert environment.choose_device("auto") == environment.choose_device("cuda") == torch.device("cuda:3")
    assert environment.choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match=r"device: found 'cuda:1', but there are 4 processes"):
        environment.choose_device("cuda:1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(UserError, match=r"torchrun: found 8 processes for 4 GPUs"):
        environment.choose_device("auto")


@pytest.mark.parametrize(
    ("settings", "message"),
    [(("data.images=nothing",), "data.images: found nothing"), (("seed=1",), "was made with other settings: seed")],
    ids=["before they have joined", "afterwards"],
)
def test_a_mistake_is_told_once_and_torchrun_adds_nothing(alone, settings, message):
    command = [sys.executable, "-m", "common.runtime.launch", *TWO, "-m", "zsqdet"]
    command += experiment(alone, "whole", (*WHOLE, *settings))
    done = subprocess.run(command, env=PATHS, capture_output=True, text=True, timeout=900)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "torch/distributed" not in done.stderr


@pytest.mark.parametrize(
    "said",
    [
        {"WORLD_SIZE": "8", "RANK": "3"},
        {"TORCHELASTIC_RUN_ID": "x"},
        {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "a", "MASTER_PORT": "1", "WORLD_SIZE": "two", "RANK": ""},
        {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "1"},
    ],
    ids=["a cluster's", "an id alone", "no numbers", "no address"],
)
def test_without_torchrun_there_is_one_process_whatever_the_environment_says(monkeypatch, said):
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    value = torch.tensor([2.0])
    all_reduce([value])
    assert (value.item(), shard([1, 2, 3]), gather([1]), rank_zero(lambda: 5)) == (2.0, [1, 2, 3], [1], 5)
    assert environment.is_first()


MOUNTED = """
import subprocess, sys
from pathlib import Path
from common.cli import main
folder, words = sys.argv[1], sys.argv[2:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", folder], check=True)
for options in ("size=40k", "size=100m,ro", "size=100m,rw"):
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
    code = main(words)
    print(code, [path.name for path in Path(folder).rglob(".*") if path.name != ".lock"], file=sys.stderr)
sys.exit(not (Path(folder) / "run/report.html").is_file())
"""


def test_a_full_disk_and_a_read_only_one_are_one_line_each_and_with_space_the_same_command_ends(tmp_path):
    own = ["unshare", "--map-root-user", "--mount"]  # file systems may be mounted in there
    if not shutil.which("unshare") or subprocess.run([*own, "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs namespaces of Linux")
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["run", str(write_experiment(tmp_path)), f"run_dir={folder}/run", "training.epochs=0"]
    words += [f"synthesis.directory={folder}/sets", f"evaluation.directory={folder}/measured"]
    command = [*own, sys.executable, "-c", MOUNTED, str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=PATHS)
    assert done.returncode == 0, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert errors[0].startswith(f"error: {folder}/")
    assert "No space left" in errors[0] or "the disk is full" in errors[0]
    assert "Read-only file system" in errors[1]
    assert [line for line in done.stderr.splitlines() if line[:3] in ("0 [", "2 [")] == ["2 []", "2 []", "0 []"]
