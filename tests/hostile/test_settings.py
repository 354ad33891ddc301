"""Settings, weights, YAML and images that would fail hours later, hang or run: one line each, at once."""

import os
import pickle
import shutil
import signal
import subprocess

import numpy as np
import pytest
import torch
from hostile import forge
from hostile.forge import call, text
from PIL import Image
from safetensors.torch import save_file
from test_code_in_files import CONFIG, quantized
from toy.experiment import write_experiment

from common.checkpoints.read import load_tensors, save_tensors
from common.cli import main
from common.config.load import dump_config, load_config
from common.config.schema import ExperimentConfig
from common.quantization import load_quantized
from common.runtime import environment
from common.runtime.errors import UserError

WORDS = ("evaluate", "run", "synthesize", "train", "sensitivity")


@pytest.fixture
def write(tmp_path):
    def to_file(content, name="experiment.yaml"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return to_file


def line_of(path, *overrides):
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "seed=true",
        "seed=4294967296",
        "seed=18446744073709551616",
        f"seed={'9' * 5000}",
        "synthesis.num_images=true",
        "synthesis.num_images=100000000",
        "synthesis.jitter=1e9",
        "synthesis.learning_rate=1e5",
        "synthesis.weights.task=1e300",
        "synthesis.flip=1",
        "synthesis.flip=[]",
        "synthesis.label_sampling={start: 0.9, stop: 0.1}",
        "synthesis.label_sampling={min_area: 0.9, max_area: 0.1}",
        "synthesis={iterations: 0, low_resolution_iterations: 0}",
        "synthesis={iterations: 0, image: pixels}",
        "synthesis.weights={task: 0, batch_norm: 0, first_batch_norm: 0, patch_similarity: 0}",
        "synthesis={source: batch_norm, weights: {batch_norm: 0, first_batch_norm: 0, patch_similarity: 0}}",
        "synthesis={iterations: 0, low_resolution_iterations: 0, source: batch_norm}",
        "quantization.range_headroom=1e30",
        "quantization.weight_bits=true",
        "quantization.average_bits=true",
        "quantization.mixed_precision_bits=[true]",
        "quantization.layers={a: {weight_bits: true, activation_bits: 8}}",
        "training.learning_rate=2",
        "training.weight_decay=1e300",
        "training.weight_decay=true",
        "training.zoom=[1e5, 1e5]",
        "training.zoom=[1.35, 0.7]",
        "training.zoom=[true, true]",
        "training.epochs=1e12",
        "evaluation.image_size=1000000",
        "evaluation.max_detections=1000000000",
        f"run_dir={'a' * 256}",
        f"run_dir={'ä' * 128}",
        f"run_dir={'a/' * 2500}",
        'data={images: "a\\0b", annotations: b}',
        "data={images: '', annotations: b}",
        "training.zoom=" + "[" * 100_000,
        "training.zoom={[1]: 2}",
        "training.zoom=2001-99-99",
        "training.zoom=!!timestamp x",
        "training.zoom=!!python/object/apply:os.system [id]",
        "a" + ".a" * 100_000 + "=1",
        "data={images: a, images: b}",
        "x\ny=1",
    ],
    ids=lambda text: text[:40],
)
def test_a_value_that_cannot_work_is_one_line_before_any_work(write, override):
    assert len(line_of(write("weights: a.pt\n"), override)) < 1000


@pytest.mark.parametrize(
    "override",
    [
        "synthesis.label_sampling.start=1",
        "synthesis={iterations: 0, low_resolution_iterations: 0, source: noise}",
        "synthesis={iterations: 0}",
        "seed=4294967295",
        "training.learning_rate=1e-4",
        f"run_dir={'a' * 255}",
        "quantization.mixed_precision_bits=[5, 6]",
    ],
)
def test_odd_values_that_work_are_taken(write, override):
    load_config(write("weights: a.pt\n"), [override])


LAUGHS = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{y}: &{y} [{', '.join(['*' + x] * 9)}]\n" for x, y in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (LAUGHS, "line 2: found the alias *a; write its value out"),
        ("a: &a [*a]\n", "line 1: found the alias *a"),
        (
            "quantization: {layers: {*.cv2: {weight_bits: 8, activation_bits: 8}}}\n",
            "line 1: expected alphabetic or numeric character, but found '.'; quote a text that begins with *",
        ),
        ("training: " + "[" * 50_000, "line 1: nested more than 20 levels deep"),
        ("training: " + "{a: " * 20_000, "line 1: nested more than 20 levels deep"),
        ("- " * 50_000 + "a", "line 1: nested more than 20 levels deep"),
        ("a: " + "b" * 300_000, "more than 200000 bytes"),
        ("[1, 2]: 3\n", "line 1: found a list or mapping as a key; keys are text"),
        ("{a: 1}: 3\n", "line 1: found a list or mapping as a key; keys are text"),
        ("weights: a.pt\n1: 3\n", "line 2: found '1' as a key; keys are text"),
        ("on: 3\n", "line 1: found 'on' as a key; keys are text"),
        ("<<: {seed: 1}\n", "line 1: found '<<' as a key; keys are text"),
        (b"weights: a\0.pt\n", "not valid YAML"),
        (b"\0" * 100, "not valid YAML"),
        (b"\x80\x81", "not valid YAML"),
        ("seed: " + "9" * 5000, "not valid YAML"),
        ("seed: 2001-02-30\n", "not valid YAML"),
        ("seed: !!int ''\n", "found the tag"),
        ("seed: !!python/name:os.system\n", "found the tag"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ('weights: a.pt\n"a\\nb": 1\n', "a\\nb: found 1"),
        ("5\n", "found 5; allowed are lines of `key: value`"),
        ("[]\n", "found []; allowed are lines of `key: value`"),
    ],
    ids=range(23),
)
def test_a_file_that_is_no_settings_is_one_line(write, content, said):
    path = write(content)
    line = line_of(path)
    assert line.startswith(f"{path}: ")
    assert said in line
    assert len(line) < 1000


def test_a_file_that_cannot_be_opened_is_one_line(tmp_path):
    assert "Is a directory" in line_of(tmp_path)
    assert "File name too long" in line_of(tmp_path / ("a" * 300))
    assert "null byte" in line_of(tmp_path / "a\0b.yaml")
    assert "cannot be read" in line_of(tmp_path / "none.yaml")


def test_an_empty_file_and_a_byte_order_mark_are_no_mistake(write):
    assert load_config(write(""), ["weights=a.pt"]) == load_config(write(b"\xef\xbb\xbfweights: a.pt\n"))


def test_numbers_and_switches_are_not_taken_for_each_other_from_python_either():
    for values in ({"seed": True}, {"synthesis": {"flip": 0}}, {"training": {"zoom": (True, 2)}}):
        with pytest.raises(ValueError, match="true or false, and only there"):
            ExperimentConfig(weights="a.pt", **values)


@pytest.mark.parametrize("family", forge.MICRO)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")], ids=str)
def test_a_checkpoint_with_nan_or_infinity_is_refused_by_every_command_with_the_tensors_name(
    family, value, tmp_path, capsys
):
    tensors, about = load_tensors(forge.MICRO[family])
    name = sorted(n for n, t in tensors.items() if t.is_floating_point() and t.numel() > 4)[-1]
    tensors[name].view(-1)[3] = value
    weights = tmp_path / "bad.safetensors"
    save_tensors(weights, tensors, about)
    write_experiment(tmp_path)
    (tmp_path / "c.yaml").write_text(CONFIG.format(family=family, weights=weights, folder=tmp_path))
    picture = str(tmp_path / "images/1.png")
    commands = [[word, str(tmp_path / "c.yaml")] for word in WORDS]
    commands.append(["predict", str(weights), picture, "--family", family, "--out", str(tmp_path / "out")])
    for command in commands:
        capsys.readouterr()
        assert main(command) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"{name} holds NaN or infinity" in line
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "sets").exists()


def test_a_pickled_checkpoint_with_nan_is_refused_by_name(tmp_path):
    from common.detection.detector import load_detector

    def change(module):
        module.model[3].bn.running_mean[1] = float("nan")

    with pytest.raises(UserError, match=r"model\.3\.bn\.running_mean holds NaN or infinity"):
        load_detector("yolo11", forge.pickled_yolo11(tmp_path / "bad.pt", change))


@pytest.mark.parametrize("part", ["weight", "step", "zero step"])
def test_a_quantized_detector_with_numbers_that_are_none_is_refused_by_every_command(part, tmp_path, capsys):
    folder = quantized(tmp_path, "yolov5")
    tensors, about = load_tensors(folder / "model.safetensors")
    scales = [n for n in tensors if "quantizer" in n and n.endswith((".step", ".scale"))]
    name = "model.3.conv.weight" if part == "weight" else scales[0]
    tensors[name].view(-1)[0] = 0.0 if part == "zero step" else float("nan")
    save_tensors(folder / "model.safetensors", tensors, about)
    with pytest.raises(UserError, match=rf"{name} holds (NaN or infinity|a scale of 0)"):
        load_quantized(folder)
    write_experiment(tmp_path)
    (tmp_path / "c.yaml").write_text(CONFIG.format(family="yolov5", weights=folder, folder=tmp_path))
    for command in (["evaluate", str(tmp_path / "c.yaml")], ["predict", str(folder), str(tmp_path / "images/1.png")]):
        capsys.readouterr()
        assert main(command) == 2
        assert name in capsys.readouterr().err


def test_a_flipped_byte_in_a_file_of_ours_is_noticed_although_safetensors_has_no_checksum(tmp_path):
    tensors, about = load_tensors(forge.MICRO["yolov5"])
    path = tmp_path / "a.safetensors"
    save_tensors(path, tensors, about)
    assert load_tensors(path)[1] == about
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="its checksum is another one"):
        load_tensors(path)
    save_file(tensors, path)  # a file that others wrote has none
    assert load_tensors(path)[1] == {}


def test_a_yaml_cannot_make_objects_or_explode(tmp_path, marker, capsys):
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    texts = [
        f"family: !!python/object/apply:os.system ['touch {marker}']\n",
        f"family: !!python/object/new:os.system ['touch {marker}']\n",
        "!!python/name:os.system : 1\n",
        "weights: !!python/module:antigravity\n",
        laughs + "family: *a29\nweights: x\n",
        "&x [*x]\n",
        "family: &x {a: *x}\nweights: x\n",
        "[" * 3000,
        "family: " + "[" * 3000 + "]" * 3000 + "\n",
        "? [a, b]\n: 1\n",
        "? {a: b}\n: 1\n",
        "family: \0\n",
    ]
    for content in texts:
        path = tmp_path / "bad.yaml"
        path.write_text(content)
        capsys.readouterr()
        assert main(["run", str(path)]) == 2, content[:40]
        lines = capsys.readouterr().err.strip().splitlines()
        assert all(line.startswith("error: ") and len(line) < 1000 for line in lines), content[:40]
        assert not marker.exists()


def test_an_image_is_decoded_by_a_decoder_of_images_only(tmp_path, marker):
    from common.runtime.image_files import read_image

    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "good.png")
    (tmp_path / "a.png").write_bytes(pickle.dumps(print))
    forge.archive(tmp_path / "b.png", forge.inside_checkpoint(call("os", "system", text(f"touch {marker}"))))
    for name_ in ("a.png", "b.png"):
        with pytest.raises(UserError, match="not a readable image"):
            read_image(tmp_path / name_)
    assert read_image(tmp_path / "good.png").shape == (3, 8, 8)
    assert not marker.exists()


def test_a_saved_training_state_is_tensors_and_json_only(tmp_path):
    """What `pickle` would need is not even in the format."""
    save_tensors(tmp_path / "state.safetensors", {"a": torch.ones(1)}, {"epoch": 1})
    assert load_tensors(tmp_path / "state.safetensors")[1] == {"epoch": 1}
    torch.save({"a": torch.ones(1)}, tmp_path / "state.safetensors")
    with pytest.raises(UserError, match="damaged safetensors file"):
        load_tensors(tmp_path / "state.safetensors")


@pytest.mark.parametrize("number", ["010", "-012", "1:30", "1:30.5", "0_10"])
def test_a_number_that_yaml_reads_as_another_one_is_refused(write, number):
    path = write("family: yolov5\nweights: a.pt\nrun_dir: b\n")
    line = line_of(path, f"training.epochs={number}")
    assert f"found {number}, which YAML reads as octal or base 60" in line


PIPED = {
    "environment.json": [["evaluate", "RUN"], ["report", "RUN"]],
    "results.json": [["info", "RUN"], ["report", "RUN"], ["export", "RUN", "--to", "openvino"]],
    "config.yaml": [["run", "RUN/config.yaml"], ["info", "RUN"]],
    "quantized/quantization.json": [["info", "RUN"], ["evaluate", "RUN"], ["export", "RUN", "--to", "openvino"]],
    "quantized/model.safetensors": [["info", "RUN"], ["evaluate", "RUN"]],
    "training/history.jsonl": [["report", "RUN"]],
}


@pytest.mark.parametrize("name", PIPED)
def test_a_pipe_in_the_place_of_a_file_of_a_run_is_waited_for_by_no_command(run, name):
    def hang(*_):
        raise AssertionError("waits for the pipe")

    (run / name).unlink()
    os.mkfifo(run / name)
    before = signal.signal(signal.SIGALRM, hang)
    for words in PIPED[name]:
        signal.alarm(60)
        try:
            assert main([word.replace("RUN", str(run)) for word in words]) in (0, 2)
        finally:
            signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_names_are_shown_and_do_nothing_to_the_terminal_or_to_the_lines(tmp_path, capsys):
    assert main(["info", str(tmp_path / "a\nerror: b\x1b[31m.pt")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "a\\nerror: b\\x1b[31m.pt" in lines[0]


def test_a_key_that_is_no_text_is_an_unknown_one(write):
    assert "allowed are known keys only" in line_of(write("family: yolov5\nweights: a.pt\n"), "\udcff=3")


def test_a_folder_of_something_else_is_not_written_into(tmp_path, capsys):
    """Files of a run's names that no run has made: a project's own settings, results or report."""
    write_experiment(tmp_path)
    mine = tmp_path / "mine"
    for name in ("config.yaml", "results.json", "report.html"):
        mine.mkdir()
        if name == "config.yaml":
            (mine / name).write_bytes((tmp_path / "experiment.yaml").read_bytes())
            config = mine / name
        else:
            (mine / name).write_text('{"my": "own"}')
            config = tmp_path / "experiment.yaml"
        before = {p: p.read_bytes() for p in mine.iterdir() if p.is_file()}
        assert main(["run", str(config), f"run_dir={mine}"]) == 2
        assert f"error: {mine}: has {name}, which a run would replace, but is none; choose" in capsys.readouterr().err
        assert {p: p.read_bytes() for p in mine.iterdir() if p.is_file()} == before
        shutil.rmtree(mine)


@pytest.mark.parametrize("change", ["weight_bits: 4/weight_bits: 6", "seed: 0/seed: 7"])
def test_settings_that_were_changed_in_the_folder_of_a_run_are_not_taken_for_those_it_was_made_with(
    tmp_path, capsys, change
):
    words = ["run", str(write_experiment(tmp_path)), "training.epochs=0"]
    assert main(words) == 0
    path = tmp_path / "run/config.yaml"
    path.write_text(path.read_text().replace(*change.split("/")))
    results = (tmp_path / "run/results.json").read_bytes()
    capsys.readouterr()
    assert main(["run", str(path)]) == 2
    assert f"error: {tmp_path}/run: was made with other settings" in capsys.readouterr().err
    assert main([*words, *(["seed=7"] if "seed" in change else ["quantization.weight_bits=6"])]) == 2
    assert (tmp_path / "run/results.json").read_bytes() == results


@pytest.mark.parametrize("name", ["nel\x85dir", "ls\u2028dir", "\ufeffmark"])
def test_a_name_with_a_line_break_of_yaml_comes_back_from_the_settings_of_a_run(tmp_path, name):
    config = load_config(write_experiment(tmp_path), [f'run_dir="{tmp_path}/{name}"'])
    dump_config(config, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config


def test_a_repository_that_the_environment_names_is_not_asked_and_runs_nothing(tmp_path, monkeypatch):
    for words in (["init", "-q"], ["config", "core.fsmonitor", f"touch {tmp_path}/marker; true"]):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    own = environment.describe(torch.device("cpu"))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert environment.describe(torch.device("cpu")) == own
    assert not (tmp_path / "marker").exists()


def test_a_run_does_not_take_the_root_or_the_home_for_its_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "link").symlink_to("/")
    config = write_experiment(tmp_path)
    for folder in ("/", tmp_path / "home", tmp_path / "link"):
        assert main(["run", str(config), f"run_dir={folder}"]) == 2
        assert f"error: run_dir: found {folder}; a run has a folder of its own" in capsys.readouterr().err
    assert not [*(tmp_path / "home").iterdir()]
