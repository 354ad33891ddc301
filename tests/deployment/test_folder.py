"""New folders: whole or not at all, also of two processes at once and after one that was killed."""

import os
import subprocess
import sys

import pytest

from common.deployment.folder import new_folder
from common.runtime.errors import UserError
from common.runtime.files import own_prefix


def test_of_two_at_once_the_first_one_done_has_the_name_and_neither_harms_the_other(tmp_path):
    out = tmp_path / "export"

    def slower():
        with new_folder(out) as folder:
            (folder / "a").write_text("slower")
            with new_folder(out) as other:
                (other / "a").write_text("faster")
            assert (folder / "a").read_text() == "slower"

    with pytest.raises(UserError, match="export: exists already; remove it, or give another folder with --out"):
        slower()
    assert (out / "a").read_text() == "faster"
    assert list(tmp_path.iterdir()) == [out]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    out = tmp_path / "export"
    code = (
        "import os, signal, sys; from pathlib import Path; from common.deployment.folder import new_folder\n"
        "with new_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'a').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(out)], env=os.environ, check=False).returncode == -9
    assert len(list(tmp_path.iterdir())) == 1
    mine, foreign = tmp_path / f"{own_prefix(out)}live.part", tmp_path / ".export.notes.part"
    for folder in (mine, foreign):
        folder.mkdir()
    with new_folder(out) as folder:
        (folder / "a").write_text("whole")
    assert sorted(tmp_path.iterdir()) == sorted([out, mine, foreign])


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="on the way"), new_folder(tmp_path / "export"):
        raise ValueError("on the way")
    assert list(tmp_path.iterdir()) == []
