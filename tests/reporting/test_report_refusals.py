"""What is no run, or a damaged one, is one line and no report."""

import pytest

from common.reporting.report import write_report
from common.runtime.errors import UserError


@pytest.mark.parametrize("name", ["missing", "empty", "file"])
def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        write_report(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}: not a run folder")
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / name / "report.html").exists()


@pytest.mark.parametrize("name", ["results.json", "config.yaml", "training/history.jsonl", "ptq/model.safetensors"])
@pytest.mark.parametrize("content", [b"{[", b"\xf4", b"5\n"])
def test_a_damaged_file_of_a_run_is_named_in_one_line(run, name, content):
    (run / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        write_report(run)
    assert str(run / name) in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert not (run / "report.html").exists()
