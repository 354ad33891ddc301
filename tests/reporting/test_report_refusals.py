"""What is no run, or a damaged one, is one line and no report."""

import json

import pytest

from common.cli import main
from common.reporting.report import write_report
from common.runtime.errors import UserError
from common.runtime.files import read_checked_json, write_checked_json


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


FORGED = {
    "results.json": [
        {"rows": [{}]},
        {"rows": ["a"]},
        {"rows": [{"name": "ptq", "AP": "a"}]},
        {"layers": ["a"]},
        {"layers": [{}]},
        {"layers": [{"name": "a", "role": "body", "reason": "", "weight_bits": "8", "activation_bits": None}]},
        {"layers": [{"name": "a", "role": "body", "reason": "", "weight_bits": 8, "activation_bits": 8}]},
        {"seconds": {"ptq": "a"}},
        {"files": {"ptq": ["a"]}},
        {"imageset": 5},
        {"data_read": [{}]},
        {"fidelity": 5},
        {"measured_on": 5},
    ],
    "environment.json": [{"versions": []}, {"continued_with": [5]}, {"weights_sha256": ""}, {"weights_sha256": 5}],
}


@pytest.mark.parametrize(
    ("name", "changes"), [(name, changes) for name, rows in FORGED.items() for changes in rows], ids=str
)
def test_a_file_with_a_right_hash_and_other_content_is_named_in_one_line(run, name, changes, capsys):
    write_checked_json(run / name, read_checked_json(run / name) | changes)
    with pytest.raises(
        UserError, match=rf"^{run / name}: damaged: {next(iter(changes))}.*: found .*; .*[^\n]*$"
    ) as error:
        write_report(run)
    assert len(str(error.value).splitlines()) == 1
    assert not (run / "report.html").exists()
    if name == "results.json":
        assert main(["info", str(run)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_changed_environment_is_noticed_by_the_report(run):
    content = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(content | {"platform": "another"}))
    with pytest.raises(UserError, match=r"environment.json: damaged, it is not what was written"):
        write_report(run)
