"""The command: complete help, and for every mistake of a user one line and no traceback."""

import errno
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from toy.adapter import ToyDetector
from toy.experiment import write_coco, write_experiment

from common import pipeline
from common.cli import main
from common.config.reference import BITS, known_keys
from common.runtime import environment

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs/yolo11/yolo11n.yaml"


@pytest.fixture
def experiment(tmp_path):
    return str(write_experiment(tmp_path))


@pytest.fixture
def fails(capsys):
    """Runs a command that must fail by a user's mistake; returns its one line."""

    def run(*arguments):
        assert main([str(argument) for argument in arguments]) == 2
        err = capsys.readouterr().err
        assert "Traceback" not in err
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, err
        return lines[0]

    return run


@pytest.mark.parametrize("command", ["synthesize", "train", "evaluate", "run"])
def test_the_help_of_a_command_lists_every_key(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert "CONFIG" in text
    assert "KEY=VALUE" in text
    for key in (BITS, *known_keys().values()):
        assert f"  {key.name}  ({key.allowed}; " in text
        assert key.meaning in text


def test_the_help_names_every_command_and_report_takes_runs(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n    {command}" in text for command in ("synthesize", "train", "evaluate", "run", "report"))
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    assert "RUN" in capsys.readouterr().out


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("zsqdet ")


@pytest.mark.parametrize("arguments", [[], ["quantize", "a.yaml"], ["run"], ["run", "a.yaml", "--fast"]])
def test_a_wrong_command_line_ends_with_usage(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: zsqdet" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["7", "-0.1", "nan", "much"])
def test_a_confidence_that_is_none_is_one_line(value, capsys):
    with pytest.raises(SystemExit) as end:
        main(["predict", "run", "images", f"--confidence={value}"])
    assert end.value.code == 2
    assert f"--confidence: found '{value}'; allowed: a number from 0 to 1" in capsys.readouterr().err


def test_evaluate_writes_the_numbers_as_json_wherever_the_option_stands(experiment, tmp_path, capsys):
    assert main(["evaluate", experiment, "--json", str(tmp_path / "a.json"), "evaluation.batch_size=3"]) == 0
    assert main(["evaluate", experiment, "evaluation.batch_size=3", "--json", str(tmp_path / "b.json")]) == 0
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    for name in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR100"):
        assert first[name] == second[name]
        assert f"{name:<10} {first[name]:.4f}" in capsys.readouterr().out or name != "AP"
    assert set(first["per_class"]) == {"circle", "square"}


def test_run_makes_a_folder_with_a_report_and_prints_the_rows(experiment, tmp_path, capsys):
    assert main(["run", experiment, f"run_dir={tmp_path / 'elsewhere'}"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("full precision", "ptq", "trained", "report.html"))
    for name in ("config.yaml", "environment.json", "results.json", "report.html", "ptq", "quantized", "training"):
        assert (tmp_path / "elsewhere" / name).exists(), name


def test_synthesize_and_train_print_where_their_output_is(experiment, tmp_path, capsys):
    assert main(["synthesize", experiment]) == 0
    imageset = Path(capsys.readouterr().out.strip())
    assert (imageset / "annotations.json").exists()
    assert not (tmp_path / "run").exists()
    assert main(["train", experiment]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run")
    assert (tmp_path / "run/quantized/model.safetensors").exists()


def test_a_mistake_in_the_configuration(fails, experiment):
    assert "did you mean quantization.weight_bits?" in fails("run", experiment, "quantization.weightbits=4")
    assert "allowed: an integer" in fails("run", experiment, "training.epochs=many")
    assert "cannot be read" in fails("run", "nowhere.yaml")


def test_all_mistakes_in_the_configuration_come_at_once(experiment, capsys):
    assert main(["run", experiment, "seed=-1", "training.epochs=many", "nonsense=1"]) == 2
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == ["error"] * 3


def test_an_unknown_detector(fails, experiment):
    assert "known ones are" in fails("run", experiment, "family=yolo99")
    assert "known ones are" in fails("run", experiment, "family=json")


@pytest.mark.parametrize(("device", "allowed"), [("cuda:99", "use device=cpu"), ("gpu", "allowed are auto, cpu, cuda")])
def test_a_device_that_is_not_there(fails, experiment, device, allowed):
    line = fails("run", experiment, f"device={device}")
    assert line.startswith(f"error: device: found '{device}'")
    assert allowed in line


def test_a_missing_checkpoint(fails, tmp_path):
    assert str(tmp_path / "no.pt") in fails("synthesize", CONFIG, f"weights={tmp_path / 'no.pt'}")


@pytest.mark.parametrize("name", ["cut.pt", "cut.safetensors"])
def test_a_truncated_checkpoint(fails, tmp_path, name):
    path = tmp_path / name
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00." * 100)
    path.write_bytes(path.read_bytes()[:300])
    assert str(path) in fails("synthesize", CONFIG, f"weights={path}")


def test_a_truncated_quantized_checkpoint(fails, experiment, tmp_path):
    assert main(["train", experiment]) == 0
    path = tmp_path / "run/quantized/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert str(path) in fails("evaluate", experiment, f"weights={tmp_path / 'run'}")


def test_a_run_that_is_not_finished_is_not_evaluated_as_if_it_were(fails, experiment, tmp_path):
    (tmp_path / "run").mkdir()
    assert "without a finished quantized checkpoint" in fails("evaluate", experiment, f"weights={tmp_path / 'run'}")


def test_a_run_is_no_float_checkpoint(fails, experiment, tmp_path):
    (tmp_path / "run").mkdir()
    assert "needs a float checkpoint" in fails("train", experiment, f"weights={tmp_path / 'run'}")


def test_a_set_with_another_number_of_classes(fails, experiment, tmp_path):
    write_coco(tmp_path, boxes=3, classes=("circle", "square", "star"))
    line = fails("evaluate", experiment)
    assert "annotations.json" in line
    assert "3" in line
    assert "2" in line


def test_annotation_files_that_are_empty_or_damaged(fails, experiment, tmp_path):
    for content in ("", "{}", '{"images": [], "annotations": [], "categories": []}', "[1, 2"):
        (tmp_path / "annotations.json").write_text(content)
        assert "annotations.json" in fails("evaluate", experiment)


def test_a_corrupt_image(fails, experiment, tmp_path):
    path = tmp_path / "images/2.png"
    path.write_bytes(path.read_bytes()[:200])
    assert str(path) in fails("evaluate", experiment)


def test_no_set_half_a_set_and_a_missing_set(fails, experiment, tmp_path):
    assert "data" in fails("evaluate", experiment, "data={images: null, annotations: null}")
    assert "data.annotations: found nothing" in fails("run", experiment, "data.annotations=null")
    line = fails("run", experiment, f"data.images={tmp_path / 'gone'}")
    assert line.startswith(f"error: data.images: found {tmp_path / 'gone'}, which does not exist")
    line = fails("run", experiment, f"data.images={tmp_path / 'annotations.json'}")
    assert line == f"error: data.images: found {tmp_path / 'annotations.json'}, a file; give the folder of the images"
    assert "a folder; give the COCO JSON file" in fails("run", experiment, f"data.annotations={tmp_path}")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written(fails, experiment, tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in fails("run", experiment, f"run_dir={tmp_path / 'file' / 'run'}")
    assert str(tmp_path / "file") in fails(
        "synthesize", experiment, f"synthesis.directory={tmp_path / 'file' / 'sets'}"
    )


def test_a_folder_in_the_place_of_a_file_is_refused_before_any_work(fails, experiment, tmp_path, monkeypatch):
    def work(config):
        raise AssertionError

    monkeypatch.setattr(pipeline, "evaluate", work)
    monkeypatch.setattr(pipeline, "sensitivity", work)
    for arguments in (("evaluate", "--json"), ("sensitivity", "--json"), ("sensitivity", "--figure")):
        assert "is no ordinary file" in fails(arguments[0], experiment, arguments[1], str(tmp_path))


def test_a_device_in_the_place_of_a_file_is_refused_and_stays_a_device(fails, experiment, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    message = fails("evaluate", experiment, "--json", str(tmp_path / "pipe"))
    assert "pipe: is no ordinary file; nothing was changed there" in message
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_run_folder(fails, experiment, tmp_path):
    (tmp_path / "run").mkdir(mode=0o555)
    assert str(tmp_path / "run") in fails("run", experiment)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_disk_and_a_read_only_one(fails, experiment, monkeypatch, number):
    def full(*arguments, **options):
        raise OSError(number, os.strerror(number), "some/file")

    monkeypatch.setattr(pipeline, "synthesize_images", full)
    assert fails("run", experiment).startswith(f"error: some/file: {os.strerror(number)}")


def test_ctrl_c_is_one_line_keeps_the_state_and_the_same_command_goes_on(experiment, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.trainer, "train", _interrupt)
        assert main(["run", experiment]) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted; ")
    assert (tmp_path / "run/ptq/model.safetensors").exists()
    assert not (tmp_path / "run/quantized").exists()
    monkeypatch.setattr(pipeline, "quantize", _interrupt)  # calibration is not repeated
    assert main(["run", experiment]) == 0
    assert (tmp_path / "run/quantized/model.safetensors").exists()


def test_a_bug_keeps_its_traceback(experiment, monkeypatch):
    monkeypatch.setattr(ToyDetector, "build", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["evaluate", experiment])


def test_a_distribution_that_hides_a_detectors_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "other" / "shadowed").mkdir(parents=True)
    (tmp_path / "other" / "shadowed" / "__init__.py").write_text("")
    (tmp_path / "ours" / "shadowed").mkdir(parents=True)
    (tmp_path / "ours" / "shadowed" / "adapter.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "other"))
    monkeypatch.setattr(environment, "ROOT", tmp_path / "ours")
    with pytest.raises(
        environment.UserError, match=r"import name 'shadowed': found .*other/shadowed .*scripts/setup.sh"
    ):
        environment.check_installation()


def test_a_distribution_that_hides_common_itself_is_named(tmp_path):
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "__init__.py").write_text("")
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    for command in ([sys.executable, "-m", "zsqdet", "--help"], [sys.executable, "-m", "yolo11.train", "a.yaml"]):
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
        )
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: import name 'common': found {tmp_path / 'common'} instead of {ROOT}")
        assert len(done.stderr.splitlines()) == 1


def test_torchvision_operators_that_do_not_load_are_explained(monkeypatch):
    def missing(*arguments):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("torchvision.ops.nms", missing)
    with pytest.raises(environment.UserError, match=r"operator torchvision::nms does not exist.*bash scripts/setup.sh"):
        environment.check_installation()


def _interrupt(*arguments, **options):
    raise KeyboardInterrupt
