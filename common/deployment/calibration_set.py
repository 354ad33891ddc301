"""A synthetic set as other people's quantizers read their calibration images."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml

from common.deployment.folder import check_new, new_folder
from common.runtime.errors import UserError
from common.synthesis.imageset import ImageSet, image_name, write_image

ARRAY = "calibration.npy"
SCRIPTS = Path(__file__).parent / "scripts"
PIXELS = f"`{ARRAY}`: float32 [N, 3, H, W], RGB in [0, 1], as the detector's graph takes them"


def write_calibration_set(imageset: Path, out: Path, tool: str) -> Path:
    """Makes a folder that a tool reads, whole or not at all.

    Args:
        imageset: a finished set.
        out: the new folder.
        tool: one of `TOOLS`, as `calibration_folder` checks.

    Returns:
        `out`.

    Raises:
        UserError: `out` exists, or the set is damaged.
    """
    images = ImageSet(imageset)
    with new_folder(out) as folder:
        use = TOOLS[tool](images, folder, out)
        if tool != "ultralytics":
            _write_array(images, folder / ARRAY)
        source = f"{len(images)} images that were made out of a detector by zsqdet; no real image was used."
        (folder / "README.md").write_text(f"# Calibration images\n\n{source}\n\n{use}\n", encoding="utf-8")
    return out


def calibration_folder(tool: str | None, out: Path | None) -> Path | None:
    """The folder that `zsqdet synthesize --for TOOL --out OUT` is to make; None without a tool.

    Raises:
        UserError: no such tool, a folder that exists, or one without a tool.
    """
    if tool is None:
        if out:
            raise UserError("synthesize: found --out without --for; the set itself goes to synthesis.directory")
        return None
    if tool not in TOOLS:
        raise UserError(f"synthesize: found --for {tool}; allowed are {', '.join(TOOLS)}")
    out = out or Path(f"calibration_{tool}")
    check_new(out)
    return out


def _write_array(images: ImageSet, path: Path) -> None:
    """One image at a time goes to the disk, so that a set of any size fits into memory."""
    first = images.image(0)
    header = {"descr": "<f4", "fortran_order": False, "shape": (len(images), *first.shape)}
    with path.open("wb") as stream:  # not mapped: a full disk would end the program (SIGBUS)
        np.lib.format.write_array_header_1_0(stream, header)
        for i in range(len(images)):
            image = images.image(i)
            if image.shape != first.shape:
                raise UserError(
                    f"{images.directory}: image {i} has {tuple(image.shape[1:])} pixels, the first one "
                    f"{tuple(first.shape[1:])}; an array needs images of one size"
                )
            stream.write((image.numpy() / np.float32(255)).astype("<f4").tobytes())


def _ultralytics(images: ImageSet, folder: Path, out: Path) -> str:
    """data.yaml, images/ and labels/ with a line `class x y width height` for each box, relative to the image."""
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    for i in range(len(images)):
        name = image_name(i)
        image = images.image(i)
        _, height, width = image.shape
        write_image(folder / "images" / name, image)  # no copy: files of a set may have 16 bits or stand elsewhere
        targets = images.targets(i)
        rows = []
        for (x1, y1, x2, y2), label in zip(targets.boxes.tolist(), targets.labels.tolist(), strict=True):
            box = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
            rows.append(f"{label} " + " ".join(f"{value:.6f}" for value in box))
        (folder / "labels" / name).with_suffix(".txt").write_text("".join(f"{row}\n" for row in rows))
    data = {
        "path": str(out.resolve()),
        "train": "images",
        "val": "images",
        "names": dict(enumerate(images.class_names)),
    }
    (folder / "data.yaml").write_text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return f"    yolo export model=best.pt format=openvino quantize=8 data={out}/data.yaml"


def _script(name: str, command: str) -> Callable[[ImageSet, Path, Path], str]:
    def write(images: ImageSet, folder: Path, out: Path) -> str:
        shutil.copyfile(SCRIPTS / name, folder / "quantize.py")
        return f"{PIXELS}. `quantize.py` shows how it is read:\n\n    {command.format(out=out)}"

    return write


def _tensorrt(images: ImageSet, folder: Path, out: Path) -> str:
    command = f"python -m modelopt.onnx.quantization --onnx_path=best.onnx --calibration_data={out}/{ARRAY}"
    return f"{PIXELS}. With NVIDIA's ModelOpt, whose graph TensorRT builds:\n\n    {command} --quantize_mode=int8"


def _npy(images: ImageSet, folder: Path, out: Path) -> str:
    return f"{PIXELS}. A compiler that wants bytes: `(numpy.load(...) * 255).round().astype('uint8')`, exact."


TOOLS: dict[str, Callable[[ImageSet, Path, Path], str]] = {
    "ultralytics": _ultralytics,
    "onnxruntime": _script("quantize_onnxruntime.py", "python {out}/quantize.py best.onnx best_int8.onnx"),
    "openvino": _script("quantize_openvino.py", "python {out}/quantize.py best.onnx best_int8.xml"),
    "tensorrt": _tensorrt,
    "npy": _npy,
}
