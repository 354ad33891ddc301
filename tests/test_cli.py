"""The command: complete help, and for every mistake of a user one line and no traceback."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from toy.adapter import ToyDetector
from toy.experiment import write_coco, write_experiment

from common.cli import main
from common.config.reference import BITS, known_keys
from common.pipeline import measure
from common.pipeline import stages as pipeline
from common.runtime import environment

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs/yolo11/yolo11n.yaml"


@pytest.fixture
def experiment(undrawn, tmp_path):
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


def help_of(capsys, *words):
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["synthesize", "train", "evaluate", "sensitivity"])
def test_the_help_of_a_command_fits_a_screen_and_says_where_the_keys_are(command, capsys):
    text = help_of(capsys, command)
    assert "CONFIG" in text
    assert "KEY=VALUE" in text
    assert "`zsqdet keys` lists the settings" in text
    assert len(text.splitlines()) < 25


@pytest.mark.parametrize("words", [("run", "--help"), ("keys",)])
def test_the_help_of_run_and_the_command_keys_list_every_key(words, capsys):
    text = help_of(capsys, "run") if "--help" in words else (main(words), capsys.readouterr().out)[1]
    for key in (BITS, *known_keys().values()):
        assert f"  {key.name}  ({key.allowed}; " in text
        assert key.meaning in text


def test_the_help_fits_a_screen_and_has_a_line_for_every_command(capsys):
    text = help_of(capsys)
    names = ("run", "synthesize", "train", "evaluate", "sensitivity", "predict", "report", "info", "keys")
    assert all(re.search(rf"^  {name}  +\w.{{20}}", text, re.MULTILINE) for name in names)
    assert len(text.splitlines()) < 30
    assert max(map(len, text.splitlines())) <= 100
    assert "quantization." not in text
    assert "RUN" in help_of(capsys, "report")


def test_keys_with_a_word_in_their_name(capsys, fails):
    assert main(["keys", "zoom"]) == 0
    assert capsys.readouterr().out.count("\n") == 2
    assert "'zooom', in no name and no description of a key; see" in fails("keys", "zooom")


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("zsqdet ")


@pytest.mark.parametrize("arguments", [[], ["quantize", "a.yaml"], ["run"], ["run", "a.yaml", "--fast"]])
def test_a_wrong_command_line_is_one_line_as_any_other_mistake(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]+; see zsqdet( run)? --help\n", err)
    assert arguments != ["run"] or "the following arguments are required: CONFIG" in err


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
    assert first["protocol"] == "images with a longer side of 64 pixels, padded to rectangular batches"
    assert main(["evaluate", experiment, "evaluation.rectangular=false"]) == 0
    assert capsys.readouterr().out.endswith("\nimages with a longer side of 64 pixels, padded to squares\n")


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
    for content in ("", "{}", "[1, 2"):
        (tmp_path / "annotations.json").write_text(content)
        assert "annotations.json" in fails("evaluate", experiment)


def test_a_corrupt_image(fails, experiment, tmp_path):
    path = tmp_path / "images/2.png"
    path.write_bytes(path.read_bytes()[:200])
    assert str(path) in fails("evaluate", experiment)


def test_no_set_half_a_set_and_a_missing_set(fails, experiment, tmp_path):
    assert "data" in fails("evaluate", experiment, "data={images: null, annotations: null}")
    assert "data.images: not set; data.annotations go with" in fails("run", experiment, "data.images=null")
    assert "without labels a run is compared" in fails("evaluate", experiment, "data.annotations=null")
    two = fails("run", experiment, f"data={tmp_path / 'data.yaml'}", f"data.images={tmp_path / 'images'}")
    assert "dataset: found" in two
    assert "but also data.images; keep one of the two ways" in two
    plain = fails("run", experiment, f"data={tmp_path / 'annotations.json'}")
    assert "a COCO file goes with its images: data.images=DIR data.annotations=FILE" in plain
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
    for name in ("toy.txt", "annotations.json", "experiment.yaml"):
        assert "is one of the inputs" in fails("sensitivity", experiment, "--figure", tmp_path / name)
        assert "is one of the inputs" in fails("evaluate", experiment, "--json", tmp_path / name)
    (tmp_path / "results.json").write_text('{"sha256": "0"}')
    assert "is one of the inputs" in fails("info", tmp_path, "--json", tmp_path / "results.json")
    assert "does not end in .json" in fails("info", experiment, "--json", tmp_path / "toy.txt")
    assert "does not end in .html" in fails("report", tmp_path, tmp_path / "b", "--out", tmp_path / "config.yaml")


def test_a_device_in_the_place_of_a_file_is_refused_and_stays_a_device(fails, experiment, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    message = fails("evaluate", experiment, "--json", str(tmp_path / "pipe"))
    assert "pipe: is no ordinary file; nothing was changed there" in message
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_run_folder(fails, experiment, tmp_path):
    (tmp_path / "run").mkdir(mode=0o555)
    assert str(tmp_path / "run") in fails("run", experiment)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.ENOSPC, "the disk is full; free space or choose another folder"),
        (errno.EDQUOT, "the disk quota is used up; free space"),
        (errno.EROFS, "cannot be written (Read-only file system); choose another folder"),
        (errno.ENAMETOOLONG, "the name is too long; choose a shorter one"),
        (errno.ENOENT, "does not exist, or was removed meanwhile; repeat the command"),
        (errno.EISDIR, "is a folder; a file is needed"),
        (errno.ELOOP, "is a symbolic link that leads to itself"),
    ],
)
def test_what_the_system_refuses_is_one_line_that_says_what_to_do(fails, experiment, monkeypatch, number, text):
    def refused(*arguments, **options):
        raise OSError(number, os.strerror(number), "some/file")

    monkeypatch.setattr(measure, "synthesize_images", refused)
    assert fails("run", experiment).startswith(f"error: some/file: {text}")


def test_a_name_that_is_too_long(fails, experiment):
    for key in ("run_dir", "weights", "data.images", "synthesis.directory"):
        assert "name" in fails("run", experiment, f"{key}=/tmp/{'x' * 300}").lower()


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


def test_a_name_with_a_nul_byte(fails, tmp_path):
    path = write_experiment(tmp_path)
    path.write_text(re.sub("(?m)^run_dir: .*", r'run_dir: "a\\0b"', path.read_text()))
    assert "run_dir: found 'a\\x00b'; allowed: a path" in fails("run", path)


def run_and_signal(experiment, number, after):
    """`zsqdet run` as a process that is sent a signal: its exit code and what it said."""
    command = [sys.executable, "-m", "zsqdet", "run", experiment, "training.epochs=100000"]
    paths = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    process = subprocess.Popen(command, env=paths, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    after()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("seconds", [0.3, 1, 2])
def test_a_signal_during_imports_is_one_line(experiment, number, seconds):
    code, err = run_and_signal(experiment, number, lambda: time.sleep(seconds))
    assert code == 128 + number
    assert err.count("interrupted; rerun the same command to resume") == 1
    assert "Traceback" not in err


def test_sigterm_in_training_is_as_ctrl_c(experiment, tmp_path):
    def training():
        while not (tmp_path / "run/training/history.jsonl").exists():
            time.sleep(0.1)

    code, err = run_and_signal(experiment, signal.SIGTERM, training)
    assert code == 143
    assert err.splitlines()[-1].startswith("interrupted; rerun the same command to resume")
    assert "Traceback" not in err


def test_an_error_that_an_interrupt_was_turned_into_is_an_interrupt(experiment, monkeypatch, capsys):
    def cut_off(*arguments, **options):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as interrupt:
            raise ImportError("cannot import name") from interrupt

    monkeypatch.setattr(pipeline, "run", cut_off)
    assert main(["run", experiment]) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted; ")


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
