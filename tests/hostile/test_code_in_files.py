"""No road by which a file arrives runs anything in it: each is tried with files that would leave a marker.

Every attempt goes through the command line, and has to end with one line and exit code 2.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hostile import forge
from hostile.forge import call, name, text
from toy.experiment import write_experiment

from common.cli import main
from common.detection.detector import build_detector, load_detector
from common.quantization import load_quantized
from common.runtime.errors import UserError
from common.runtime.files import read_checked_json, write_checked_json

CONFIG = """
family: {family}
weights: {weights}
run_dir: {folder}/run
device: cpu
data: {{images: {folder}/images, annotations: {folder}/annotations.json}}
synthesis: {{directory: {folder}/sets, num_images: 2, image_size: 64, low_resolution_size: 32, batch_size: 2,
  iterations: 1, low_resolution_iterations: 1}}
training: {{epochs: 0}}
"""


def commands(tmp_path, family, weights):
    """evaluate, run and predict of that checkpoint."""
    if not (tmp_path / "images").is_dir():
        write_experiment(tmp_path)
    config = tmp_path / "hostile.yaml"
    config.write_text(CONFIG.format(family=family, weights=weights, folder=tmp_path))
    picture = str(tmp_path / "images/1.png")
    yield ["evaluate", str(config)]
    yield ["run", str(config)]
    yield ["predict", str(weights), picture, "--out", str(tmp_path / "out"), "--family", family]


def assert_refused(tmp_path, family, weights, marker, capsys):
    for words in commands(tmp_path, family, weights):
        capsys.readouterr()
        assert main(words) == 2, words
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        assert len(lines[0]) < 700
        assert not marker.exists(), words
    assert not (tmp_path / "run").exists()


def pickles(marker):
    """Name of an attack -> instructions that would leave the marker, or change this process."""
    command = text(f"touch {marker}")
    python = text(f"open({str(marker)!r}, 'w')")
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    defaults = b"}" + text("__defaults__") + b"(" + command + b"t" + b"s"
    inert = name("ultralytics.nn.tasks", "DetectionModel") + b")\x81"
    return {
        "reduce": call("os", "system", command),
        "reduce posix": call("posix", "system", command),
        "reduce subprocess": call("subprocess", "check_output", b"(" + text("touch") + text(str(marker)) + b"l"),
        "eval": call("builtins", "eval", python),
        "exec of python 2": call("__builtin__", "eval", python),
        "import": call("builtins", "__import__", text("antigravity")),
        "dotted name": call("os", "path.os.system", command),
        "module within an allowed one": call("torch", "os.system", command),
        "allowed package, function": call("torch.nn.modules.module", "os.system", command) + b"b",
        "stack global": text("os") + text("system") + b"\x93" + b"(" + command + b"tR",
        "inst": b"(" + command + b"ios\nsystem\n",
        "obj": b"(" + name("os", "system") + command + b"o",
        "newobj": name("os", "system") + b"(" + command + b"t\x81",
        "newobj with keywords": name("os", "system") + b"(" + command + b"t}\x92",
        "extension registry": b"\x82\x01" + b"(" + command + b"tR",
        "build of a function": rebuild + defaults + b"b",
        "build of a class": name("collections", "OrderedDict") + defaults + b"b",
        "build with slots": rebuild + b"N" + defaults + b"\x86b",
        "class in the state": inert + b"}" + text("__class__") + name("os", "system") + b"sb",
        "code in the state": inert + b"}" + text("_modules") + call("os", "system", command) + b"sb",
        "setstate in the state": inert + b"}" + text("__setstate__") + name("builtins", "eval") + b"sb" + python + b"b",
        "getattr": call("builtins", "getattr", name("builtins", "object"), text("__subclasses__")) + b")R",
        "getattr of a module": call("builtins", "getattr", name("torch.nn.modules", "os"), text("system"))
        + b"(" + command + b"tR",
        "getattr called": call("builtins", "getattr", inert, text("__reduce__")) + b"(" + command + b"tR",
        "reconstructor": call("copyreg", "_reconstructor", name("os", "system"), name("builtins", "object"), b"N"),
        "codec": call("_codecs", "encode", command, text("rot13")),
        "storage from bytes": call("torch.storage", "_load_from_bytes", command),
        "torch.load": call("torch", "load", text(str(marker))),
        "torch.hub": call("torch.hub", "load", text(str(marker)), text("x")),
        "torch.jit": call("torch.jit", "load", text(str(marker))),
        "storage that is none": call("torch", "system.Storage", command),
        "a storage's class called": call("torch", "FloatStorage", command),
        "persistent id of text": b"Pstorage\n",
        "persistent id of another kind": b"(" + text("module") + name("os", "system") + b"tQ",
        "persistent id with a function": b"(" + text("storage") + name("builtins", "eval") + command + b"K\x01K\x01tQ",
        "objects of numpy": call("numpy.core.multiarray", "scalar", call("numpy", "dtype", text("O8")), command),
        "functools": call("functools", "partial", name("os", "system"), command),
        "operator": call("operator", "attrgetter", text("system")),
        "pathlib": call("pathlib", "os.system", command),
        "timeit in a package of ours": call("common.cli", "main", b"(" + text("run") + b"l"),
    }  # fmt: skip


ATTACKS = sorted(pickles(Path("x")))


@pytest.mark.parametrize("kind", ["archive", "old file"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_no_instruction_of_a_pickle_runs_anything_in_any_family(attack, kind, tmp_path, marker):
    content = forge.inside_checkpoint(pickles(marker)[attack])
    write = forge.archive if kind == "archive" else forge.old_file
    before = torch._utils._rebuild_tensor_v2.__defaults__
    for family, suffix in (("yolo11", ".pt"), ("resnet", ".pth")):  # one for each reader
        with pytest.raises(UserError) as caught:
            load_detector(family, write(tmp_path / f"bad{suffix}", content))
        assert "\n" not in str(caught.value)
        assert not marker.exists()
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before


@pytest.mark.parametrize("family", ["yolo11", "yolov5", "resnet", "vit"])
def test_every_command_refuses_such_a_pickle_with_one_line_and_exit_code_2(family, tmp_path, marker, capsys):
    for attack in ("reduce", "build of a function"):
        path = forge.archive(tmp_path / "bad.pt", forge.inside_checkpoint(pickles(marker)[attack]))
        assert_refused(tmp_path, family, path, marker, capsys)


def test_torch_itself_would_have_run_it(tmp_path, marker):
    """So the files are what they claim to be."""
    path = forge.archive(tmp_path / "bad.pt", forge.inside_checkpoint(pickles(marker)["reduce posix"]))
    torch.load(path, weights_only=False)
    assert marker.exists()


class Program(torch.nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize("family", ["yolo11", "resnet"])
def test_a_torchscript_archive_is_refused_before_torch_sees_it(family, tmp_path, marker, capsys):
    path = tmp_path / "program.pt"
    torch.jit.save(torch.jit.script(Program()), path)
    assert_refused(tmp_path, family, path, marker, capsys)
    content = forge.inside_checkpoint(b"N")
    for more in ("archive/constants.pkl", "archive/code/__torch__.py", "constants.pkl"):
        with pytest.raises(UserError, match="TorchScript archive, which is a program"):
            load_detector(family, forge.archive(path, content, {more: b"\x80\x02."}))


def evaluated(marker):
    return [
        f"__import__('os').system('touch {marker}')",
        f"torch.nn.SiLU() if open({str(marker)!r}, 'w') else None",
        f"nn.LeakyReLU(open({str(marker)!r}, 'w').fileno())",
        "nn.Module.__subclasses__()",
        "torch.hub.load",
        "nn.SiLU().__class__()",
        "nn.LeakyReLU(1e999)",
        "nn.LeakyReLU(" + "9" * 5000 + ")",
        "SiLU" * 100_000,
    ]


def with_activation(content):
    def change(about):
        about["architecture"]["yaml"]["activation"] = content

    return change


def with_layer(*layer):
    def change(about):
        about["architecture"]["yaml"]["backbone"][0] = list(layer)

    return change


@pytest.mark.parametrize("family", ["yolo11", "yolov5"])
def test_a_text_that_the_parser_would_evaluate_is_refused_in_a_safetensors_file(family, tmp_path, marker, capsys):
    for number, content in enumerate(evaluated(marker)):
        path = forge.own_file(tmp_path / "bad.safetensors", family, with_activation(content))
        if number == 0:
            assert_refused(tmp_path, family, path, marker, capsys)
        with pytest.raises(UserError, match=r"not a known activation|slope"):
            load_detector(family, path)
        assert not marker.exists()


BLOCKS = [
    "os.system", "eval", "torch.hub.load", "torchvision.ops.misc.torch.load", "nn.modules.module.torch.load",
    "__import__", "check_requirements", "TorchVision", "nn.Module", "nn.LSTM", "attempt_load_one_weight", "exec", "",
    "Conv ", "nn.", 7, None, ["Conv"],
]  # fmt: skip


@pytest.mark.parametrize("family", ["yolo11", "yolov5"])
def test_a_block_is_one_of_a_list_and_nothing_that_the_parser_could_look_up(family, tmp_path, marker):
    for block in BLOCKS:
        path = forge.own_file(tmp_path / "bad.safetensors", family, with_layer(-1, 1, block, [f"touch {marker}"]))
        with pytest.raises(UserError, match=r"has a block .*; known ones are"):
            load_detector(family, path)
    hook = f"__import__('os').system('touch {marker}')"
    for arguments in ([64, hook], [[64, hook]], [hook], ["self"], ["torch"], ["d"], [64, 3, {"a": 1}], [[[[1]]]]):
        path = forge.own_file(tmp_path / "bad.safetensors", family, with_layer(-1, 1, "Conv", arguments))
        with pytest.raises(UserError, match="argument"):
            load_detector(family, path)
    assert not marker.exists()


def test_the_texts_of_a_pickled_yolo11_are_not_evaluated(tmp_path, marker, capsys):
    def change(module):
        module.yaml["activation"] = evaluated(marker)[0]
        module.yaml["backbone"] = [[-1, 1, "eval", [evaluated(marker)[0]]]]

    assert_refused(tmp_path, "yolo11", forge.pickled_yolo11(tmp_path / "bad.pt", change), marker, capsys)


@pytest.mark.parametrize("module", ["yolo11.adapter", "yolo11.export", "yolov5.adapter", "yolov5.loss"])
def test_ultralytics_is_told_to_evaluate_and_install_nothing_whatever_is_imported_first(module):
    words = ("ULTRALYTICS_SAFE_LOAD", "YOLO_AUTOINSTALL")
    inherited = {name: value for name, value in os.environ.items() if name not in words}
    code = f"import {module}; from ultralytics.utils import AUTOINSTALL, SAFE_LOAD; print(SAFE_LOAD, AUTOINSTALL)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=inherited, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["True False"], done.stderr


def test_ultralytics_would_have_evaluated_it_without_its_own_wall(tmp_path, marker, monkeypatch):
    yaml = dict(load_detector("yolo11", forge.MICRO["yolo11"]).architecture["yaml"])
    from ultralytics.nn import tasks

    yaml["activation"] = f"torch.nn.SiLU() if open({str(marker)!r}, 'w') else 0"
    monkeypatch.setattr(tasks, "SAFE_LOAD", True)  # as after an import by one of ours; another test may have been first
    with pytest.raises(TypeError):  # the second wall
        tasks.DetectionModel(json.loads(json.dumps(yaml)), verbose=False)
    assert not marker.exists()
    monkeypatch.setattr(tasks, "SAFE_LOAD", False)
    tasks.DetectionModel(json.loads(json.dumps(yaml)), verbose=False)
    assert marker.exists()


def evil_configuration(tmp_path, marker):
    path = tmp_path / "evil.py"
    path.write_text(f"open({str(marker)!r}, 'w')\nmodel = dict(type='MaskRCNN')\n")
    return path


def test_a_configuration_of_mmdet_is_one_of_two_names_and_never_a_path(tmp_path, marker, capsys):
    path = evil_configuration(tmp_path, marker)
    up = "../" * 30
    names = [
        str(path), f"{up}{str(path)[1:]}", f"swin/{up}{str(path)[1:]}", path.name, "", ".", "swin/../evil.py",
        None, 3, [], "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
        "swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py\0",
    ]  # fmt: skip
    bad = tmp_path / "bad.safetensors"
    for number, config in enumerate(names):
        forge.own_file(bad, "vit", lambda about, config=config: about["architecture"].update(config=config))
        if number == 0:
            assert_refused(tmp_path, "vit", bad, marker, capsys)
        with pytest.raises(UserError, match="the architecture of this vit: config"):
            load_detector("vit", bad)
    assert not marker.exists()


OVERRIDES = [
    {"backbone.type": "torch.load"},
    {"backbone": {"type": "SwinTransformer"}},
    {"backbone.init_cfg": {"type": "Pretrained", "checkpoint": "/tmp/x.pth"}},
    {"backbone.depths": "__import__('os')"},
    {"data_preprocessor.type": "os.system"},
    {"_scope_": "mmengine"},
    {"backbone.depths": [2, 2, 10**9, 2]},
    {"backbone.embed_dims": 10**9},
    {"backbone.embed_dims": True},
    {"backbone.embed_dims": 24.5},
    {"backbone.depths": []},
    {"backbone.depths": [[2]]},
    {"../x": 1},
]


def test_overrides_of_a_configuration_are_known_numbers_within_bounds(tmp_path):
    for change in OVERRIDES:
        path = forge.own_file(
            tmp_path / "bad.safetensors", "vit", lambda about, c=change: about["architecture"]["overrides"].update(c)
        )
        with pytest.raises(UserError, match=r"the architecture of this vit: overrides"):
            load_detector("vit", path)


def quantized(tmp_path, family):
    """A calibrated detector in tmp_path/q, as `zsqdet train` leaves it."""
    from common.config.schema import QuantizationConfig
    from common.quantization import calibrate, plan_layers, quantize, save_quantized

    folder = tmp_path / "q"
    detector = load_detector(family, forge.MICRO[family])
    module, config = detector.build(), QuantizationConfig(rounding="nearest", batch_norm_correction=False)
    plan = plan_layers(detector, module, config)
    student = quantize(module, plan, config)
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    calibrate(detector, module, student, plan, [images], config)
    save_quantized(folder, student, plan, family, detector.architecture, config)
    return folder


def edited(folder, change):
    path = folder / "quantization.json"
    content = read_checked_json(path)
    change(content)
    write_checked_json(path, content)


def test_what_a_quantization_json_says_is_not_evaluated_by_any_command(tmp_path, marker, capsys):
    folder = quantized(tmp_path, "yolo11")
    assert load_quantized(folder)[0].class_names[0] == "circle"
    edited(folder, lambda about: with_activation(evaluated(marker)[0])(about))
    (tmp_path / "run2/quantized").mkdir(parents=True)
    for file in folder.iterdir():
        shutil.copy(file, tmp_path / "run2/quantized")
    write_experiment(tmp_path)
    (tmp_path / "run2/config.yaml").write_text(CONFIG.format(family="yolo11", weights="x", folder=tmp_path))
    with pytest.raises(UserError, match="not a known activation"):
        load_quantized(folder)
    picture, config = str(tmp_path / "images/1.png"), tmp_path / "c.yaml"
    config.write_text(CONFIG.format(family="yolo11", weights=tmp_path / "run2", folder=tmp_path))
    for words in (
        ["evaluate", str(config)],
        ["predict", str(tmp_path / "run2"), picture, "--out", str(tmp_path / "o")],
    ):
        capsys.readouterr()
        assert main(words) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    main(["report", str(tmp_path / "run2")])  # shows what is there, and builds no detector from it
    assert not marker.exists()


def test_a_family_is_a_folder_of_ours_or_registered_and_never_just_any_package(tmp_path, marker, monkeypatch):
    (tmp_path / "packages/evil").mkdir(parents=True)
    for file in ("__init__.py", "adapter.py"):
        (tmp_path / "packages/evil" / file).write_text(f"open({str(marker)!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    for family in ("evil", "evil.adapter", "os", "../yolo11", "", "antigravity", "common", "yolo11.adapter", "\0"):
        with pytest.raises(UserError, match="unknown detector"):
            build_detector(family, {})
    assert not marker.exists()
    assert build_detector("toy", {"class_names": ["a"], "width": 4}).class_names == ("a",)


def test_zip_tricks_are_refused(tmp_path, marker):
    good = forge.inside_checkpoint(b"N")
    bad = forge.inside_checkpoint(pickles(marker)["reduce"])
    path = tmp_path / "bad.pt"
    with pytest.warns(UserWarning, match="Duplicate name"):
        forge.archive(path, good, {"archive/data.pkl": bad})
    refused = [("twice", path.read_bytes())]
    forge.archive(path, good, compression=zipfile.ZIP_DEFLATED)
    refused.append(("compressed", path.read_bytes()))
    forge.archive(path, good, {"../../evil/data.pkl": bad, "other/data.pkl": bad})
    refused.append(("holds no data.pkl", path.read_bytes()))
    forge.archive(path, good)
    content = bytearray(path.read_bytes())
    content[content.index(good)] ^= 1
    refused.append(("Bad CRC-32", bytes(content)))
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02")
    content[at + 8] |= 1  # encrypted
    refused.append(("encrypted", bytes(content)))
    content = bytearray(path.read_bytes())
    content[at + 20 : at + 28] = (1 << 30).to_bytes(4, "little") * 2  # sizes
    refused.append(("claims to hold more", bytes(content)))
    for message, data in refused:
        path.write_bytes(data)
        with pytest.raises(UserError, match=message) as caught:
            load_detector("yolo11", path)
        assert "\n" not in str(caught.value)
    assert not marker.exists()
