"""Files are complete or absent, folders have one user at a time, and what is damaged is one line."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.runtime import files
from common.runtime.errors import UserError
from common.runtime.files import atomic, disk_problem, lock, read_json, write_json

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


def test_a_number_that_another_process_has_by_now_does_not_keep_a_leftover(tmp_path):
    left = tmp_path / f".a.json.{os.getpid()}-1.abc_1234.json"
    left.write_text("")
    with lock(tmp_path):
        assert not left.exists()


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
