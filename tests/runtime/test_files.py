"""Files and images are complete or one line; commands that others disturb."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from toy.experiment import CONFIG, write_experiment

from common.cli import main
from common.distillation import trainer
from common.evaluation.yolo_labels import read_yolo
from common.runtime import files
from common.runtime.errors import UserError
from common.runtime.files import atomic, disk_problem, lock, own_prefix, read_json, write_json
from common.runtime.image_files import find_images, read_image

ROOT = Path(__file__).parents[2]


def start(code):
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stdin=subprocess.PIPE)


def test_content_is_on_the_disk_before_the_name_and_the_name_before_it_returns(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(files.os, "fsync", lambda handle: done.append(os.readlink(f"/proc/self/fd/{handle}")))
    rename = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: done.append("rename") or rename(self, target))
    write_json(tmp_path / "a.json", 1)
    assert done[1:] == ["rename", str(tmp_path)]
    assert Path(done[0]).name.startswith(".a.json.")


def test_what_a_killed_process_left_goes_when_the_folder_is_opened_and_what_is_being_written_stays(tmp_path):
    code = (
        "from pathlib import Path; from common.runtime.files import atomic\n"
        f"with atomic(Path({str(tmp_path)!r}) / 'deep/state.safetensors') as t: print(t, flush=True); input()"
    )
    writers = [start(code), start(code)]
    paths = [Path(writer.stdout.readline().decode().strip()) for writer in writers]
    (tmp_path / ".hidden.json").write_text("a user's own")
    writers[0].kill()
    writers[0].wait()
    assert all(path.exists() for path in paths)
    with lock(tmp_path):
        assert [path.exists() for path in paths] == [False, True]
    writers[1].communicate(b"\n")
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [".hidden.json", ".lock", "state.safetensors"]


def test_a_number_that_another_process_has_by_now_does_not_keep_a_leftover(tmp_path, monkeypatch):
    names = [f".a.json.{os.getpid()}", own_prefix(Path("a.json")).rpartition("-")[0]]  # of an older version, and now
    with monkeypatch.context() as patch:
        patch.setattr(os, "readlink", lambda path: "pid:[5]")  # another container, where it may be alive
        names.append(own_prefix(Path("a.json")).rpartition("-")[0])
    left = [tmp_path / f"{name}-1.abc_1234.json" for name in names]
    for path in left:
        path.write_text("")
    with lock(tmp_path):
        assert [path.exists() for path in left] == [False, False, True]


def test_a_folder_that_another_process_removes_meanwhile_keeps_nobody_from_the_lock(tmp_path, monkeypatch):
    scan = os.scandir

    def gone(place="."):
        if str(place).endswith("gone"):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(place))
        return scan(place)

    (tmp_path / "gone").mkdir()
    monkeypatch.setattr(os, "scandir", gone)
    with lock(tmp_path):
        assert (tmp_path / ".lock").exists()


def test_a_second_program_says_once_that_it_waits_and_goes_on_when_the_first_is_done(tmp_path):
    code = (
        "import logging, sys; logging.basicConfig(format='%(message)s', stream=sys.stdout, level=20)\n"
        "from pathlib import Path; from common.runtime.files import lock\n"
        f"with lock(Path({str(tmp_path / 'set')!r})): print('inside', flush=True)"
    )
    with lock(tmp_path / "set"):
        second = start(code)
        assert second.stdout.readline().decode() == f"another run holds {tmp_path / 'set'}; waiting\n"
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(0.3)
    assert second.communicate(timeout=60)[0] == b"inside\n"


def test_a_lock_of_a_killed_program_holds_nobody_up(tmp_path):
    code = (
        "from pathlib import Path; from common.runtime.files import lock\n"
        f"with lock(Path({str(tmp_path)!r})): print('inside', flush=True); input()"
    )
    first = start(code)
    first.stdout.readline()
    first.kill()
    first.wait()
    with lock(tmp_path):
        pass


def test_only_the_first_of_several_processes_takes_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "is_first", lambda: False)
    with lock(tmp_path / "set"), lock(tmp_path / "set"):
        assert not (tmp_path / "set").exists()


def test_a_folder_that_may_not_be_written_is_used_without_a_lock(tmp_path, monkeypatch):
    def refused(self, *arguments):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "open", refused)
    with lock(tmp_path):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/set: cannot be written"), lock(tmp_path / "file" / "set"):
        pass


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"rows": [{"AP": 0.5}, {"AP": float("nan")}]}, r"a\.json\.rows\[1\]\.AP: "),
        ({"rows": {"path": Path("x")}}, r"a\.json\.rows\.path: "),
        ([1, {2}], r"a\.json\[1\]: "),
        ({"a": {(1, 2): 3}}, r"a\.json\.a: "),
    ],
)
def test_a_value_that_json_does_not_know_is_named_and_nothing_is_written(tmp_path, value, place):
    with pytest.raises(TypeError, match=f"^{place}"):
        write_json(tmp_path / "a.json", value)
    assert list(tmp_path.iterdir()) == []


DAMAGED = [b"", b"{", b"\xff\xfe\x00", b"nonsense", b'{"a": 1} {', b"[" * 100_000, b'{"a":' * 100_000]


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_json_is_one_line(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json: not valid JSON \(.+\)$"):
        read_json(tmp_path / "a.json")


def test_a_folder_in_the_place_of_a_file_a_missing_one_and_a_name_too_long_are_one_line(tmp_path):
    for path, text in (
        (tmp_path, "Is a directory"),
        (tmp_path / "gone", "No such file or directory"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(UserError, match=rf"cannot be read \({text}\)"):
            read_json(path)
    with pytest.raises(UserError, match=r"cannot be written \(File name too long\)"), atomic(tmp_path / ("x" * 300)):
        pass


def test_a_file_that_may_not_be_read_is_told_from_a_folder_that_may_not_be_written(tmp_path, monkeypatch):
    path = tmp_path / "weights.pt"
    path.touch()
    monkeypatch.setattr(files.os, "access", lambda name, mode: not (str(name) == str(path) and mode == os.R_OK))
    line = disk_problem(PermissionError(errno.EACCES, "Permission denied", str(path)))
    assert line == f"{path}: cannot be read (Permission denied); change its permissions"
    line = disk_problem(PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "new")))
    assert line.startswith(f"{tmp_path / 'new'}: cannot be written (Permission denied); ")
    assert "full" in disk_problem(OSError(errno.ENOSPC, "No space left on device", str(path)))
    assert disk_problem(OSError(errno.EBADF, "Bad file descriptor")) is None
    assert disk_problem(OSError(errno.ENOENT, "No such file", b"/a/b")).startswith("/a/b: does not exist")


NOBODY = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []


@pytest.mark.skipif(bool(NOBODY) and not shutil.which("setpriv"), reason="root may read everything")
def test_what_may_not_be_read_is_called_so_whatever_it_is(tmp_path):
    files = {kind: tmp_path / f"a.{kind}" for kind in ("safetensors", "pt", "png", "json", "yaml")}
    files |= {"head": files["png"], "in a folder": tmp_path / "closed" / "a.png"}
    files["in a folder"].parent.mkdir()
    for path in files.values():
        path.touch()
        path.chmod(0)
    files["in a folder"].parent.chmod(0)
    code = (
        "import sys; from pathlib import Path; from common.checkpoints.archive import read_pickled\n"
        "from common.checkpoints.read import load_tensors\n"
        "from common.runtime.image_files import image_size, read_image\n"
        "from common.config.load import load_config; from common.evaluation.datasets import _is_file\n"
        "from common.runtime.errors import UserError; from common.runtime.files import disk_problem, read_json\n"
        "readers = load_tensors, read_pickled, read_image, read_json, load_config, image_size, _is_file\n"
        "for read, name in zip(readers, sys.argv[1:], strict=True):\n"
        "    try: print(read(Path(name)))\n"
        "    except UserError as error: print(error)\n"
        "    except OSError as error: print(disk_problem(error))\n"
    )
    command = [*NOBODY, sys.executable, "-c", code, *map(str, files.values())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    files["in a folder"].parent.chmod(0o755)
    assert len(done.stdout.splitlines()) == len(files), done.stderr
    for line, path in zip(done.stdout.splitlines(), files.values(), strict=True):
        assert line.startswith(f"{path}: cannot be read (Permission denied)")


@pytest.fixture
def impatient():
    """Ends a test that waits for something that never comes."""
    signal.alarm(20)
    yield
    signal.alarm(0)


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8))


def test_a_damaged_tiff_is_refused_in_one_line_and_not_filled_with_made_up_pixels(tmp_path, capfd):
    path = tmp_path / "a.tif"
    noise().save(path, compression="tiff_lzw")
    content = bytearray(path.read_bytes())
    content[len(content) * 6 // 10 : len(content) * 8 // 10] = bytes(len(content) * 8 // 10 - len(content) * 6 // 10)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a.tif: not a readable image \(TIFF_Error .*\); replace or remove it"):
        read_image(path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_deflate", "jpeg"])
def test_a_whole_tiff_is_read_as_it_is(tmp_path, compression):
    path = tmp_path / "a.tif"
    Image.new("RGB", (32, 16), (200, 100, 50)).save(path, compression=compression)
    assert read_image(path)[:, 8, 16].tolist() == pytest.approx([200, 100, 50], abs=3)


def test_a_transparent_tiff_is_refused_whose_colours_libtiff_would_change(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 4), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "clear.tif")
    with pytest.raises(UserError, match=r"clear.tif: not a readable image \(a TIFF with transparent pixels; save it"):
        read_image(tmp_path / "clear.tif")
    pixels[..., 3] = 255
    Image.fromarray(pixels).save(tmp_path / "opaque.tif")
    assert (read_image(tmp_path / "opaque.tif").permute(1, 2, 0).numpy() == pixels[..., :3]).all()


@pytest.mark.parametrize("frames", [1, 2])
def test_a_flipped_bit_in_the_pixels_of_a_png_is_noticed_also_of_an_animated_one(tmp_path, frames):
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8)) for i in range(frames)]
    images[0].save(tmp_path / "a.png", save_all=frames > 1, append_images=images[1:])
    content = (tmp_path / "a.png").read_bytes()
    assert (read_image(tmp_path / "a.png").permute(1, 2, 0).numpy() == np.asarray(images[0])).all()
    start = content.index(b"IDAT") + 4
    for place in range(start, start + 200, 9):
        (tmp_path / "b.png").write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(UserError, match=r"b.png: not a readable image \(the checksum of its IDAT does not fit\)"):
            read_image(tmp_path / "b.png")


def test_a_pipe_with_the_name_of_an_image_is_not_waited_for(tmp_path, impatient):
    os.mkfifo(tmp_path / "pipe.jpg")
    noise().save(tmp_path / "a.jpg")
    assert [path.name for path in find_images(tmp_path)] == ["a.jpg"]
    with pytest.raises(UserError, match=r"pipe.jpg: not a readable image"):
        read_image(tmp_path / "pipe.jpg")


def test_a_pipe_with_the_name_of_a_label_file_is_not_waited_for(tmp_path, impatient):
    (tmp_path / "data.yaml").write_text("val: .\nnames: [a]\n")
    noise().save(tmp_path / "a.jpg")
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"a.txt: found a file that cannot be read \(.*is no ordinary file\)"):
        read_yolo(tmp_path / "data.yaml", "val")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run, whose set, measurement and run folder are named by what is in them."""
    folder = tmp_path_factory.mktemp("finished")
    assert main(["run", str(write_experiment(folder)), "training.epochs=0"]) == 0
    return folder


@pytest.mark.parametrize("kind", ["synthetic", "measured", "run", "fidelity"])
def test_a_second_command_waits_for_the_folder_that_it_needs(finished, kind, capsys):
    """A run of other bits for what runs share; the same run, or its fidelity, for its own folder."""
    (folder,) = [finished / "run"] if kind in ("run", "fidelity") else (finished / kind).iterdir()
    words = ["run", str(finished / "experiment.yaml"), "training.epochs=0"]
    if kind == "fidelity":
        words = ["evaluate", str(finished / "run"), f"data.images={finished / 'images'}"]
    elif kind != "run":
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


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")  # a traceback of TensorBoard's
@pytest.mark.parametrize("part", ["run", "run/training", "run/ptq", "synthetic"])
def test_a_folder_that_is_removed_during_training_is_one_line_and_the_same_command_makes_it_again(
    tmp_path, part, monkeypatch, capsys
):
    words, chosen = ["run", str(write_experiment(tmp_path)), "training.epochs=2"], trainer.choose

    def removed(job, progress, average, best, row):
        if row["epoch"] == 1:
            shutil.rmtree(tmp_path / part)
        return chosen(job, progress, average, best, row)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "choose", removed)
        assert main(words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {tmp_path}/")
    assert main(words) == 0
    assert len(read_json(tmp_path / "run/results.json")["rows"]) == 3


def test_a_run_that_is_disturbed_at_random_ends_as_if_it_had_not_been(tmp_path):
    write_experiment(tmp_path)
    (tmp_path / "experiment.yaml").unlink()
    config = yaml.safe_load(CONFIG.format(folder=".").replace("./synthetic", "./sets"))
    small = {"num_images": 4, "batch_size": 2, "image_size": 32, "iterations": 1, "low_resolution_iterations": 1}
    config["synthesis"] |= small
    config["training"] |= {"epochs": 1}
    config["evaluation"] |= {"image_size": 32}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    kinds = ["kill and damage", "too large", "twice"]
    words = ["--inputs", str(tmp_path), "--times", str(len(kinds)), "--seed", "11", "--kinds", *kinds]
    command = [sys.executable, "-m", "tools.torture", *words]
    paths = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=paths)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("3 of 3 good\n")


def test_a_command_in_a_directory_that_was_removed_is_one_line(tmp_path):
    words = f"mkdir gone && cd gone && rmdir ../gone && exec {sys.executable} -m zsqdet info any.pt"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(["bash", "-c", words], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: the current directory was removed; change to one that exists\n"
