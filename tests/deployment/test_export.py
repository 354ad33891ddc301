"""From a finished run to a folder for a runtime: what it holds, what it refuses, and what it detects."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from toy.experiment import write_experiment

from common.cli import main
from common.config.load import load_config
from common.deployment.runtime import load_exported
from common.detection.detector import load_detector
from common.pipeline import stages as pipeline
from common.pipeline.export import export_once, write_cards
from common.pipeline.run_dir import results, update_results
from common.quantization import load_quantized
from common.runtime.errors import UserError
from tools.shapes.generate import generate

ROOT = Path(__file__).parents[2]
SMALL = [
    "synthesis.num_images=2",
    "synthesis.image_size=96",
    "synthesis.low_resolution_size=64",
    "synthesis.batch_size=2",
    "synthesis.iterations=1",
    "synthesis.low_resolution_iterations=2",
    "quantization.calibration_images=2",
    "quantization.rounding=nearest",
    "training.epochs=0",
]


def made(folder, config, *settings):
    """A run of the smallest size, without evaluation."""
    words = ["data.images=null", "data.annotations=null", f"synthesis.directory={folder}/sets", f"run_dir={folder}/run"]
    assert main(["train", str(ROOT / "configs" / config), *SMALL, *words, *settings]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    return made(folder, "yolo11/micro_yolo11.yaml", "bits=w4a8", "quantization.profile=full")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return made(tmp_path_factory.mktemp("inputs"), "yolov5/micro_yolov5.yaml", "bits=w8a8")


@pytest.fixture(scope="module")
def exported(full):
    assert main(["export", str(full), "--to", "onnxruntime", "--size", "96", "--dynamic"]) == 0
    return full / "export/onnxruntime"


@pytest.fixture(scope="module")
def of_one_size(full, tmp_path_factory):
    """An export for images of 96 x 96 pixels only, its weights in int8; to be read, not to be changed."""
    out = tmp_path_factory.mktemp("one_size") / "int8"
    assert main(["export", str(full), *f"--to onnxruntime --size 96 --container int8 --out {out}".split()]) == 0
    return out


def test_the_folder_stands_by_itself(exported):
    detector = {"model.onnx", "model.safetensors", "quantization.json", "predict.py"}
    assert {p.name for p in exported.iterdir()} == detector | {"README.md", "parity.json", "export.json"}
    parity = json.loads((exported / "parity.json").read_text())
    assert parity["passed"]
    assert parity["nodes"]["QLinearConv"] > 20
    card = (exported / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "agpl-3.0"
    assert head["base_model"] == "micro_yolo11.safetensors"
    assert "W4A8" in card
    assert "model.0.conv" in card  # in float, with the reason
    assert "`images` [batch, 3, height, width]" in card
    assert "layers, the decoding of boxes, and operators between layers that are none of SiLU" in card
    assert f"Each of {sum(parity['nodes'].values())} integer nodes" in card
    assert "Not measured yet" in card


def test_the_card_is_written_again_with_what_the_run_measures_later(exported, full):
    before = {path.name: path.read_bytes() for path in exported.iterdir() if path.is_file()}
    images = Path(results(full)["imageset"]) / "images"
    assert main(["evaluate", str(full), f"data.images={images}", "evaluation.image_size=96", "device=cpu"]) == 0
    (row,) = results(full)["fidelity"]["rows"]
    card = (exported / "README.md").read_text()
    value = f"{row['AP']:.4f}" if row["objects"] else "n/a"
    assert f"| ptq | W4A8 | {value} | {row['objects']} | 2 |" in card
    assert "images without labels; images with a longer side of 96 pixels, padded to rectangular batches." in card
    assert "Not measured" not in card
    measured = {"name": "ptq", "AP": 0.25, "AP50": 0.5, "images": 7, "image_size": 96, "evaluator": "pycocotools"}
    on = {"image_size": 96, "rectangular": False, "dataset": "/mine/data.yaml", "split": "val"}
    update_results(full, rows=[measured | {"weight_bits": 4, "activation_bits": 8}], measured_on=on)
    assert export_once(full, "onnxruntime") == exported
    card = (exported / "README.md").read_text()
    assert "| ptq | W4A8 | 0.2500 | 0.5000 | 7 | 96 |" in card
    assert "by pycocotools; images with a longer side of 96 pixels, padded to squares." in card
    assert f"| {value} |" in card
    (result,) = yaml.safe_load(card.split("---")[1])["model-index"][0]["results"]
    assert (result["metrics"][0]["value"], result["dataset"]["name"]) == (0.25, "data.yaml val, 7 images")
    after = {path.name: path.read_bytes() for path in exported.iterdir() if path.is_file()}
    assert {name for name in after if after[name] != before.get(name)} == {"README.md"}


def test_a_damaged_export_is_not_measured_and_the_run_makes_it_again(tmp_path, caplog):
    settings = ["quantization.profile=full", "quantization.activation_bits=8", "training.epochs=0"]
    run = pipeline.run(load_config(write_experiment(tmp_path), settings))
    path = export_once(run, "onnxruntime") / "model.onnx"
    path.write_bytes(path.read_bytes()[:-200] + bytes(200))
    with pytest.raises(UserError, match=r"model.onnx: damaged or gone"):
        load_exported(path.parent)
    assert export_once(run, "onnxruntime") == path.parent
    assert f"{path}: damaged or gone" in caplog.text
    load_exported(path.parent)


def test_a_card_that_cannot_be_written_again_is_a_warning(exported, full, caplog):
    kept = (exported / "parity.json").read_text()
    for damaged in ("[]", "{}", "{"):
        (exported / "parity.json").write_text(damaged)
        caplog.clear()
        write_cards(full)
        assert "README.md: not written again" in caplog.text
    (exported / "parity.json").write_text(kept)


FOUR_BITS = {onnx.TensorProto.INT4, onnx.TensorProto.UINT4}


def test_four_bit_weights_are_stored_in_four_bits(exported, of_one_size):
    packed = onnx.load(exported / "model.onnx")
    kinds = {t.data_type for t in packed.graph.initializer}
    assert kinds & FOUR_BITS
    assert not FOUR_BITS & {t.data_type for t in onnx.load(of_one_size / "model.onnx").graph.initializer}
    images = np.random.default_rng(0).random((1, 3, 96, 96), dtype=np.float32)
    (_, ours), (_, theirs) = load_exported(exported), load_exported(of_one_size)
    assert torch.equal(ours(torch.from_numpy(images))[0], theirs(torch.from_numpy(images))[0])


def test_a_graph_of_one_size_is_evaluated_on_squares_of_it(of_one_size, full, tmp_path):
    data = tmp_path / "data"
    annotations = generate(data, 3, 128, 5)
    words = [str(full / "config.yaml"), f"weights={of_one_size}", f"data.images={data}/images"]
    words += [f"data.annotations={annotations}", "evaluation.batch_size=2"]
    found = []
    for more in (["evaluation.image_size=128"], ["evaluation.image_size=96", "evaluation.rectangular=false"]):
        assert main(["evaluate", *words, *more, "--json", str(tmp_path / "found.json")]) == 0
        found.append(json.loads((tmp_path / "found.json").read_text()) | {"seconds": 0})
    assert found[0] == found[1]
    assert found[0]["image_size"] == 96
    assert found[0]["protocol"] == "images with a longer side of 96 pixels, padded to squares"
    alone = ["evaluate", str(of_one_size / "model.onnx"), *words[2:]]
    assert main([*alone, "--json", str(tmp_path / "alone.json")]) == 0
    assert json.loads((tmp_path / "alone.json").read_text())["AP"] == found[0]["AP"]


@pytest.mark.parametrize("size", [(96, 96), (64, 128)])
def test_the_graph_detects_what_the_module_detects(exported, full, size):
    images = torch.nn.functional.interpolate(
        torch.rand(3, 3, 6, 6, generator=torch.Generator().manual_seed(0)), size, mode="bicubic"
    ).clamp(0, 1)
    detector, module = load_quantized(full / "quantized")
    theirs, graph = load_exported(exported)
    for ours, found in zip(
        detector.detect(module, images, 0.01, 0.7, 20), theirs.detect(graph, images, 0.01, 0.7, 20), strict=True
    ):
        top = min(len(ours.scores), len(found.scores), 3)
        assert torch.allclose(ours.scores[:top], found.scores[:top], atol=0.1)
    assert theirs.class_names == detector.class_names


def test_metadata_are_those_of_ultralytics(exported):
    entries = {p.key: p.value for p in onnx.load(exported / "model.onnx").metadata_props}
    assert {"description", "author", "stride", "task", "batch", "imgsz", "names", "channels", "end2end"} <= set(entries)
    assert (entries["task"], entries["stride"], entries["imgsz"]) == ("detect", "32", "[96, 96]")


def test_ultralytics_predicts_with_the_graph_unchanged(exported):
    from ultralytics import YOLO

    image = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    found = YOLO(str(exported / "model.onnx"), task="detect").predict(image, imgsz=96, verbose=False, conf=0.01)
    names = load_detector("yolo11", ROOT / "tools/shapes/micro_yolo11.safetensors").class_names
    assert tuple(found[0].names.values()) == names


def test_predict_needs_neither_torch_nor_zsqdet(exported, tmp_path):
    from PIL import Image

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 80, 3), dtype=np.uint8))
    (turn := picture.getexif())[0x0112] = 6  # a quarter
    picture.save(tmp_path / "a.png", exif=turn)
    picture.resize((1, 900)).save(tmp_path / "thin.png")
    Image.fromarray(np.full((60, 60), 1000, np.uint16)).save(tmp_path / "deep.png")
    blocked = "import sys; sys.modules |= dict.fromkeys(('torch', 'common', 'cv2', 'ultralytics')); import runpy; "
    code = f"{blocked}runpy.run_path({str(exported / 'predict.py')!r}, run_name='__main__')"
    command = [sys.executable, "-c", code, "a.png", "thin.png", "deep.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    turned, thin, deep = (Image.open(tmp_path / f"{name}_detected.png") for name in ("a", "thin", "deep"))
    assert (turned.size, thin.size, np.median(deep)) == ((50, 80), (1, 900), 1000 // 256)
    assert len((exported / "predict.py").read_text().splitlines()) < 60


def test_openvino_gets_its_own_pair_and_gives_the_same_boxes(inputs, tmp_path, capsys):
    assert main(["export", str(inputs), "--to", "openvino", "--size", "96"]) == 0
    folder = inputs / "export/openvino"
    assert {p.name for p in (folder / "model_openvino_model").iterdir()} == {"model.xml", "model.bin", "metadata.yaml"}
    assert main(["benchmark", str(folder), "--threads", "1", "--rounds", "1", "--trace", str(tmp_path / "p")]) == 0
    out = capsys.readouterr().out
    assert "time by kind of node: Convolution" in out
    assert re.search(r"^timed in OpenVINO \d{4}\.\d+.* on the CPU$", out, re.MULTILINE)
    card = (folder / "README.md").read_text()
    assert "`images` [1, 3, 96, 96], RGB in [0, 1] -> `output0` [1, " in card
    assert re.search(r"ONNX Runtime multiplies in float: `[^\n]*model\.0/conv[^\n]*`\.\n", card)  # the first layer
    assert re.search(r"In float: \d+ layers, and all operators between quantized layers\.", card)
    assert re.search(r"The \d+ QuantizeLinear nodes alone, in ONNX Runtime; the rest is left to the device, ag", card)
    assert (tmp_path / "p/execution_graph.xml").is_file()
    # In a process of its own: OpenVINO and ONNX Runtime in one have crashed.
    code = (
        "import sys, torch; from pathlib import Path; from common.deployment.runtime import load_exported; "
        "_, graph = load_exported(Path(sys.argv[1])); torch.manual_seed(0); "
        "print(float(graph(torch.rand(1, 3, 96, 96))[0][0, :4].mean()))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    detector, module = load_quantized(inputs / "quantized")
    torch.manual_seed(0)
    wanted = float(detector.export_module(module)(torch.rand(1, 3, 96, 96))[0, :4].mean())
    assert float(done.stdout) == pytest.approx(wanted, rel=0.05)


def test_a_yolo26_has_the_output_of_ultralytics_own_export_and_needs_no_suppression(tmp_path):
    from ultralytics import YOLO
    from ultralytics.nn.tasks import DetectionModel, yaml_model_load

    small = {"nc": 2, "depth_multiple": 0.33, "width_multiple": 0.125, "max_channels": 512}
    yaml = {k: v for k, v in yaml_model_load("yolo26n.yaml").items() if k not in ("scales", "scale", "yaml_file")}
    torch.manual_seed(0)
    model = DetectionModel(yaml | small, verbose=False)
    with torch.no_grad():
        for _ in range(20):  # BatchNorm statistics of its own
            model(torch.rand(2, 3, 96, 96))
    model.eval()
    model.names, model.end2end = {0: "a", 1: "b"}, True
    for branch in model.model[-1].one2one_cv3:
        branch[-1].bias.data += 8  # scores that differ and are no zeros
    torch.save({"model": model}, tmp_path / "yolo26.pt")
    run = made(
        tmp_path, "yolo11/micro_yolo11.yaml", f"weights={tmp_path}/yolo26.pt", "bits=w8a8", "quantization.profile=full"
    )
    assert main(["export", str(run), "--to", "onnxruntime", "--size", "128"]) == 0
    assert "`output0` [1, 300, 6]" in (run / "export/onnxruntime/README.md").read_text()
    detector, graph = load_exported(run / "export/onnxruntime")
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    rows = graph(image)[0]
    with torch.no_grad():
        wanted = model(image)[0]
    assert rows.shape == wanted.shape == (1, 300, 6)
    assert (rows[0, :-1, 4] >= rows[0, 1:, 4]).all()
    torch.testing.assert_close(rows[..., 4], wanted[..., 4], atol=0.1, rtol=0)
    assert len(detector.detect(graph, image, 0.0, 0.7, 50)[0].boxes) == 50
    found = YOLO(str(run / "export/onnxruntime/model.onnx"), task="detect").predict(
        (image[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8), imgsz=128, verbose=False, conf=0.001, max_det=300
    )
    assert len(found[0].boxes) == (rows[0, :, 4] > 0.001).sum()


REFUSED = [
    (["--to", "tflite"], "export: to: found tflite; allowed are onnxruntime, openvino, opencv, tensorrt"),
    (["--to", "onnxruntime"], "this run has quantization.profile=inputs; onnxruntime is fast with full"),
    (["--to", "openvino", "--size", "100"], "export: found 100x100 pixels; allowed are multiples of 32"),
    (
        ["--to", "tensorrt"],
        "tensorrt has int8 with zero point 0; repeat `zsqdet run` with run_dir=DIR (the synthetic images are used "
        "again) and quantization.activation_range=symmetric",
    ),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_what_a_runtime_cannot_run_is_one_line_and_leaves_nothing(inputs, tmp_path, capsys, words, message):
    assert main(["export", str(inputs), *words, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert sum(line.startswith("error") for line in error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_run_and_one_that_exists_are_refused(exported, full, tmp_path, capsys):
    assert main(["export", str(tmp_path), "--to", "onnxruntime"]) == 2
    assert "folder without a finished quantized checkpoint" in capsys.readouterr().err
    assert main(["export", str(full), "--to", "onnxruntime"]) == 2
    assert "exists already; remove it, or give another folder with --out" in capsys.readouterr().err


def test_a_benchmark_says_the_ratio_to_float_and_keeps_the_runtimes_own_graph_and_times(exported, tmp_path, capsys):
    profile = tmp_path / "profile"
    words = ["benchmark", str(exported), "--threads", "1", "--rounds", "3", "--trace", str(profile)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "quantized  1 thread" in out
    assert out.startswith(f"timed in ONNX Runtime {onnxruntime.__version__} on the CPU\nprocessor: ")
    assert "of float" in out
    assert "QLinearConv" in out
    kinds = Counter(node.op_type for node in onnx.load(profile / "optimized.onnx").graph.node)
    assert kinds["QLinearConv"] > 50
    events = [e for e in json.loads((profile / "profile.json").read_text()) if e["name"].endswith("kernel_time")]
    assert {e["args"]["op_name"] for e in events} <= kinds.keys()
    assert main(words) == 2
    assert "profile: exists; name another folder" in capsys.readouterr().err


def test_a_graph_of_two_images_is_checked_timed_and_fills_up_its_last_batch(inputs, tmp_path, capsys):
    out = tmp_path / "two"
    words = ["--to", "onnxruntime", "--any-profile", "--size", "96", "--batch", "2", "--out", str(out)]
    assert main(["export", str(inputs), *words]) == 0
    detector, graph = load_exported(out)
    images = torch.rand(3, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    together = detector.detect(graph, images, 0.01, 0.7, 20)
    alone = [detector.detect(graph, image[None], 0.01, 0.7, 20)[0] for image in images]
    assert all(torch.allclose(a.boxes, b.boxes) for a, b in zip(together, alone, strict=True))
    assert main(["benchmark", str(out), "--threads", "1", "--rounds", "2"]) == 0


@pytest.fixture(scope="module")
def two_stage(tmp_path_factory):
    words = ("bits=w7a8", "quantization.eight_bit_roles=[]", "quantization.profile=full")  # exact without VNNI, too
    return made(tmp_path_factory.mktemp("two_stage"), "resnet/micro_resnet.yaml", *words)


def test_an_exported_mask_rcnn_detects_several_images_each_by_itself_with_masks(two_stage, tmp_path):
    out = tmp_path / "masks"
    assert main(["export", str(two_stage), "--to", "onnxruntime", "--size", "96", "--out", str(out)]) == 0
    assert not (out / "predict.py").exists()  # that is for the one output of a YOLO
    assert "`masks`" in (out / "README.md").read_text()
    detector, graph = load_exported(out)
    assert detector.has_masks
    images = torch.rand(3, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    quantized, module = load_quantized(two_stage / "quantized")
    for found, wanted in zip(
        detector.detect(graph, images, 0.05, 0.5, 100), quantized.detect(module, images, 0.05, 0.5, 100), strict=True
    ):
        assert found.masks is not None
        assert len(found.masks) == len(found.boxes) == len(found.scores)
        assert abs(len(found.scores) - len(wanted.scores)) <= 1 < len(wanted.scores)


def test_a_batch_of_a_two_stage_detector_is_refused(two_stage, tmp_path, capsys):
    words = ["--to", "onnxruntime", "--size", "96", "--batch", "2", "--out", str(tmp_path / "out")]
    assert main(["export", str(two_stage), *words]) == 2
    assert "this detector's graph has one image: leave --batch out" in capsys.readouterr().err


DAMAGED = {
    "a list": ("export.json", lambda about: []),
    "no size": ("export.json", lambda about: {k: v for k, v in about.items() if k != "size"}),
    "three sides": ("export.json", lambda about: about | {"size": [64, 64, 64]}),
    "an endless size": ("export.json", lambda about: about | {"size": [10**9, 64]}),
    "a target that is no name": ("export.json", lambda about: about | {"target": "\x1b[31m"}),
    "a target that is none": ("export.json", lambda about: about | {"target": "bogus"}),
    "an opset that is none": ("export.json", lambda about: about | {"opset": 16}),
    "a description that is a list": ("quantization.json", lambda about: []),
    "another description": ("quantization.json", lambda about: about | {"family": "vit"}),
}


@pytest.mark.parametrize(("name", "change"), DAMAGED.values(), ids=DAMAGED)
def test_what_a_damaged_export_is_and_how_fast_is_refused_in_one_line(exported, tmp_path, capsys, name, change):
    folder = tmp_path / "export"
    shutil.copytree(exported, folder)
    (folder / name).write_text(json.dumps(change(json.loads((folder / name).read_text()))))
    for command in (["info", str(folder)], ["benchmark", str(folder), "--rounds", "1"]):
        assert main(command) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith(f"error: {folder / name}: damaged")


def test_a_graph_that_takes_other_images_than_its_folder_says_is_not_timed(of_one_size, tmp_path, capsys):
    shutil.copytree(of_one_size, tmp_path / "e")
    kept = json.loads((tmp_path / "e/export.json").read_text())
    for changes in ({"size": [64, 64]}, {"batch": 2}):
        (tmp_path / "e/export.json").write_text(json.dumps(kept | changes))
        capsys.readouterr()
        assert main(["benchmark", str(tmp_path / "e"), "--rounds", "1"]) == 2
        assert "model.onnx: takes images [1, 3, 96, 96], but" in capsys.readouterr().err.splitlines()[0]
