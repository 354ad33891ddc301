"""A synthetic set as other tools read it: their own readers give its pixels and its boxes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from common.cli import main
from common.deployment.calibration_set import TOOLS, write_calibration_set
from common.deployment.graph import Shape, export_graph
from common.detection.detector import load_detector
from common.runtime.errors import UserError
from common.runtime.image_files import read_image
from common.synthesis.imageset import IMAGES, ImageRecord, ImageSet, image_name, with_range, write_image, write_set

ROOT = Path(__file__).parents[2]
MICRO = ROOT / "tools/shapes/micro_yolo11.safetensors"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    (folder / IMAGES).mkdir()
    generator = torch.Generator().manual_seed(0)
    records = []
    for i, boxes in enumerate(([[4, 8, 44, 56]], [[0, 0, 32, 64], [10, 20, 30, 24]], [])):
        pixels = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8, generator=generator)
        _, digest = write_image(folder / IMAGES / image_name(i), pixels)
        records.append(ImageRecord(digest, 64, 96, boxes, list(range(len(boxes)))))
    write_set(folder, records, load_detector("yolo11", MICRO).class_names, dict)
    return ImageSet(folder)


def test_ultralytics_reads_the_same_boxes_and_classes(images, tmp_path):
    from ultralytics.data.dataset import YOLODataset
    from ultralytics.data.utils import check_det_dataset

    write_calibration_set(images.directory, tmp_path / "out", "ultralytics")
    data = check_det_dataset(str(tmp_path / "out/data.yaml"), autodownload=False)
    assert list(data["names"].values()) == list(images.class_names)
    rows = YOLODataset(img_path=data["val"], data=data, imgsz=96, augment=False).get_labels()
    assert [len(row["cls"]) for row in rows] == [1, 2, 0]
    for i, row in enumerate(rows):
        targets = images.targets(i)
        boxes = torch.from_numpy(row["bboxes"]).view(-1, 4) * torch.tensor([96.0, 64, 96, 64])
        first, second = boxes.chunk(2, 1)
        torch.testing.assert_close(
            torch.cat([first - second / 2, first + second / 2], 1), targets.boxes, atol=1e-3, rtol=0
        )
        assert row["cls"].ravel().tolist() == targets.labels.tolist()


@pytest.mark.parametrize("tool", ["npy", "tensorrt", "openvino"])
def test_an_array_has_the_pixels_exactly(images, tmp_path, tool):
    out = write_calibration_set(images.directory, tmp_path / "out", tool)
    array = np.load(out / "calibration.npy")
    assert (array.shape, array.dtype) == ((3, 3, 64, 96), np.float32)
    pixels = torch.stack([images.image(i) for i in range(3)])
    assert np.array_equal((array * 255).round().astype(np.uint8), pixels.numpy())
    torch.testing.assert_close(torch.from_numpy(array), images.batch(range(3), torch.device("cpu"))[0])
    assert "no real image was used" in (out / "README.md").read_text()


def test_the_script_for_onnx_runtime_quantizes_and_leaves_the_boxes_in_float(images, tmp_path):
    detector = load_detector("yolo11", MICRO)
    plain, made = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    export_graph(detector, detector.build(), plain, Shape((64, 96)))
    out = write_calibration_set(images.directory, tmp_path / "out", "onnxruntime")
    done = subprocess.run([sys.executable, out / "quantize.py", plain, made], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kinds = {node.op_type for node in onnx.load(made).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    image = images.batch([1], torch.device("cpu"))[0].numpy()
    boxes, expected = (
        onnxruntime.InferenceSession(str(f)).run(None, {"images": image})[0][0, :4] for f in (made, plain)
    )
    assert 0 < np.abs(boxes - expected).mean() < 5  # pixels


def test_the_script_for_openvino_gives_one_image_at_a_time(images, tmp_path):
    nncf = pytest.importorskip("nncf")
    out = write_calibration_set(images.directory, tmp_path / "out", "openvino")
    code = f"import sys; sys.path.insert(0, {str(out)!r}); import quantize; print(quantize.dataset().get_length())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()[-1] == "3", nncf


def test_images_that_were_not_clipped_or_stand_elsewhere_are_written_as_they_are_read(tmp_path):
    pixels = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0)) * 1.5 - 0.2
    (tmp_path / "wide/images").mkdir(parents=True)
    codes, bounds = with_range(pixels)
    _, digest = write_image(tmp_path / "wide/images" / image_name(0), codes)
    write_set(tmp_path / "wide", [ImageRecord(digest, 64, 96, [], [], range=bounds)], ["a"], dict)
    real = tmp_path / "real.png"
    _, digest = write_image(real, torch.randint(0, 256, (3, 96, 96), dtype=torch.uint8))
    (tmp_path / "streamed").mkdir()
    record = ImageRecord(digest, 96, 96, [], [], source=real.name)
    write_set(tmp_path / "streamed", [record], ["a"], lambda: {"streamed_from": str(tmp_path)})
    for name in ("wide", "streamed"):
        out = write_calibration_set(tmp_path / name, tmp_path / f"{name}_out", "ultralytics")
        assert torch.equal(read_image(out / "images" / image_name(0)), ImageSet(tmp_path / name).image(0))


def test_other_tools_and_folders_that_exist_are_refused_before_any_image_is_made(tmp_path, capsys):
    words = ["synthesize", str(ROOT / "configs/yolo11/micro_yolo11.yaml"), f"synthesis.directory={tmp_path}/sets"]
    for more, message in (
        (["--for", "coreml"], f"found --for coreml; allowed are {', '.join(TOOLS)}"),
        (["--for", "npy", "--out", str(tmp_path)], "exists already"),
        (["--out", str(tmp_path / "new")], "--out without --for"),
    ):
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_image_leaves_no_folder(images, tmp_path):
    copy = tmp_path / "set"
    (copy / IMAGES).mkdir(parents=True)
    for file in images.directory.rglob("*.*"):
        if file.is_file():
            (copy / file.relative_to(images.directory)).write_bytes(file.read_bytes())
    (copy / IMAGES / image_name(2)).write_bytes(b"no image")
    for tool in ("ultralytics", "npy"):
        with pytest.raises(UserError, match="damaged"):
            write_calibration_set(copy, tmp_path / "out", tool)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
