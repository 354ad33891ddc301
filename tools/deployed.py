"""AP of what runs: exports of our runs, and INT8 files of other tools, each in its runtime, by one evaluator.

    python -m tools.deployed configs/yolo11/yolo11n_cpu.yaml weights=yolo11n.pt data.images=... data.annotations=... \\
        --runs runs/a runs/b --size 320 640 --images synthetic=runs/synthetic/X/images real=FOLDER \\
        --others quantize_static quantize_static_body nncf ultralytics_onnx ultralytics_openvino

The other tools are no dependencies of ours: install nncf beside it.
Each gets the first 128 images of a folder. A row that the CSV file has already is not measured again.
"""

import argparse
import csv
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from common.config.load import load_config
from common.deployment.folder import to_openvino
from common.deployment.graph import Shape, add_metadata, export_graph, metadata_of
from common.deployment.runtime import graph_file
from common.deployment.targets import Options
from common.detection.detector import load_detector
from common.evaluation.resize import as_floats, place
from common.pipeline import stages
from common.pipeline.export import export
from common.pipeline.run_dir import stored_settings
from common.runtime.errors import Parser, UserError
from common.runtime.image_files import read_image

COLUMNS = ["tool", "calibrated_on", "runtime", "image_size", "ap", "ap50", "bytes", "relative_bytes"]
CALIBRATION_IMAGES = 128
RUNTIME = {"full": "onnxruntime", "inputs": "openvino"}  # of a run, by its profile
Maker = Callable[[Path, list[Path], int, Path, list[str]], Path]  # float graph, images, size, new folder, settings


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file of the detector")
    parser.add_argument("settings", nargs="*", help="key=value; weights, data.images and data.annotations at least")
    parser.add_argument("--runs", nargs="*", default=[], type=Path, help="finished runs of `zsqdet run`")
    parser.add_argument("--others", nargs="*", default=[], choices=list(OTHERS), help="other tools")
    parser.add_argument("--images", nargs="*", default=[], help="NAME=FOLDER of calibration images, for other tools")
    parser.add_argument("--size", nargs="+", type=int, default=[320], help="side of the square images in pixels")
    parser.add_argument("--out", type=Path, default=Path("runs/deployed/deployed.csv"), help="CSV file; rows are added")
    arguments = parser.parse_intermixed_args()
    try:
        for size in arguments.size:
            _measure(arguments, arguments.out.with_suffix("") / str(size), size)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _measure(arguments: argparse.Namespace, work: Path, size: int) -> None:
    settings = [arguments.config, *arguments.settings, f"evaluation.image_size={size}", "evaluation.rectangular=false"]
    plain = work / "float/model.onnx"
    if not plain.exists():
        _apart(_export_float, plain, [], size, plain.parent, settings)

    def row(tool: str, images: str, runtime: str, make: Maker, files: list[Path], source: Path) -> None:
        if (tool, images, runtime, str(size)) in _rows(arguments.out):
            return
        folder = work / f"{tool}_{images}_{runtime}"
        try:
            made = folder if folder.exists() else _apart(make, source, files, size, folder, settings)
            measured = source if runtime == "pytorch" else graph_file(made)
            metrics = _apart(_evaluate, [*settings, f"weights={measured}"])
        except Exception as error:  # of a tool that is not ours: one row less, and the next one
            shutil.rmtree(folder, ignore_errors=True)
            print(f"{tool}, {images}, {runtime}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
            return
        count = 0 if runtime == "pytorch" else _bytes(measured)
        figures = [f"{metrics['AP']:.4f}", f"{metrics['AP50']:.4f}", count, f"{count / _bytes(plain):.3f}"]
        _append(arguments.out, [tool, images, runtime, size, *figures])

    row("float", "none", "onnxruntime", _same, [], plain)
    row("float", "none", "openvino", _pair, [], plain)
    for run in arguments.runs:
        stored = stored_settings(run)
        runtime = RUNTIME[str(stored["quantization.profile"])]
        row("-".join(run.parts[-3:]), "synthetic", "pytorch", _same, [], run)
        row("-".join(run.parts[-3:]), "synthetic", runtime, _export_run, [], run)
    for entry in arguments.images:
        name, place_of = entry.split("=", 1)
        files = sorted(p for p in Path(place_of).iterdir() if p.suffix in (".png", ".jpg"))[:CALIBRATION_IMAGES]
        for tool in arguments.others:
            runtime, make = OTHERS[tool]
            row(tool, name, runtime, make, files, plain)


def _apart(function: Callable[..., Any], *values: Any) -> Any:
    """Calls a function in a process of its own: OpenVINO and ONNX Runtime in one have crashed."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *values).result()


def _evaluate(settings: list[str]) -> dict[str, Any]:
    return stages.evaluate(load_config(Path(settings[0]), settings[1:]))


def _export_float(_: Path, files: list[Path], size: int, folder: Path, settings: list[str]) -> Path:
    config = load_config(Path(settings[0]), settings[1:])
    detector = load_detector(config.family, config.weights, config.detector.given)
    graph, shape = folder / "model.onnx", Shape((size, size))
    folder.mkdir(parents=True)
    export_graph(detector, detector.build(), graph, shape)
    add_metadata(graph, metadata_of(detector, config.family, shape, "float"))
    return graph


def _same(source: Path, files: list[Path], size: int, folder: Path, settings: list[str]) -> Path:
    return source


def _pair(source: Path, files: list[Path], size: int, folder: Path, settings: list[str]) -> Path:
    return to_openvino(source, folder)


def _export_run(source: Path, files: list[Path], size: int, folder: Path, settings: list[str]) -> Path:
    target = RUNTIME[str(stored_settings(source)["quantization.profile"])]
    out, _ = export(source, Options(target, (size, size)), folder)
    return graph_file(out)


def _quantize_static(source: Path, files: list[Path], size: int, folder: Path, settings: list[str]) -> Path:
    return _static(source, files, size, folder, lambda graph: [])


def _quantize_static_body(source: Path, files: list[Path], size: int, folder: Path, settings: list[str]) -> Path:
    """Without what comes after the last convolution, where boxes and scores share one tensor."""
    from common.deployment.scripts.quantize_onnxruntime import tail

    return _static(source, files, size, folder, tail)


def _static(source: Path, files: list[Path], size: int, folder: Path, excluded: Callable[[Any], list[str]]) -> Path:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.images = _images(files, size)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.images, None)
            return None if image is None else {"images": image}

    folder.mkdir(parents=True)
    prepared, graph = folder / "prepared.onnx", folder / "model.onnx"
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    names = excluded(onnx.load(prepared).graph)
    quantize_static(str(prepared), str(graph), Reader(), nodes_to_exclude=names)
    prepared.unlink()
    return _with_metadata(source, graph)


def _nncf(source: Path, files: list[Path], size: int, folder: Path, settings: list[str]) -> Path:
    import nncf
    import openvino

    model = nncf.quantize(
        openvino.Core().read_model(source),
        nncf.Dataset(list(_images(files, size))),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(files),
    )
    folder.mkdir(parents=True)
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)
    return _with_metadata(source, folder / "model.xml")


def _ultralytics_onnx(source: Path, files: list[Path], size: int, folder: Path, settings: list[str]) -> Path:
    made = _ultralytics(files, size, folder, settings, "onnx")
    return _with_metadata(source, made.replace(folder / "model.onnx"))


def _ultralytics_openvino(source: Path, files: list[Path], size: int, folder: Path, settings: list[str]) -> Path:
    made = _ultralytics(files, size, folder, settings, "openvino")
    pair = next(made.glob("*.xml"))
    for path in (pair, pair.with_suffix(".bin")):
        path.replace(folder / f"model{path.suffix}")
    return _with_metadata(source, folder / "model.xml")


def _ultralytics(files: list[Path], size: int, folder: Path, settings: list[str], form: str) -> Path:
    """What `yolo export` makes of the checkpoint; it takes its calibration images from a data.yaml."""
    from ultralytics import YOLO

    config = load_config(Path(settings[0]), settings[1:])
    checkpoint = _copy_of(config.weights, folder / "work")
    data = _data_yaml(files, folder / "work", config.weights)
    made = YOLO(checkpoint).export(format=form, quantize=8, data=str(data), imgsz=size, batch=1)
    return Path(made)


OTHERS: dict[str, tuple[str, Maker]] = {
    "quantize_static": ("onnxruntime", _quantize_static),
    "quantize_static_body": ("onnxruntime", _quantize_static_body),
    "nncf": ("openvino", _nncf),
    "ultralytics_onnx": ("onnxruntime", _ultralytics_onnx),
    "ultralytics_openvino": ("openvino", _ultralytics_openvino),
}


def _images(files: list[Path], size: int) -> Iterator[np.ndarray]:
    """Letterboxed [1, 3, size, size] float32 in [0, 1]."""
    for path in files:
        yield as_floats(place(read_image(path), size, size, size)[0][None]).numpy()


def _copy_of(weights: Path, folder: Path) -> Path:
    """Ultralytics writes beside the checkpoint that it exports."""
    folder.mkdir(parents=True)
    return Path(shutil.copy(weights, folder / weights.name))


def _data_yaml(files: list[Path], folder: Path, weights: Path) -> Path:
    (folder / "images").mkdir()
    for path in files:
        shutil.copy(path, folder / "images")
    names = dict(enumerate(load_detector("yolo11", weights).class_names))
    data = folder / "data.yaml"
    data.write_text(yaml.safe_dump({"path": str(folder.resolve()), "train": "images", "val": "images", "names": names}))
    return data


def _with_metadata(source: Path, graph: Path) -> Path:
    """Gives a graph the metadata of the float one, by which it is evaluated."""
    import onnx

    entries = {entry.key: entry.value for entry in onnx.load(source).metadata_props}
    if graph.suffix == ".onnx":
        add_metadata(graph, entries)
    else:
        graph.with_name("metadata.yaml").write_text(yaml.safe_dump(entries, sort_keys=False))
    return graph


def _bytes(graph: Path) -> int:
    parts = [graph, graph.with_suffix(".bin")] if graph.suffix == ".xml" else [graph]
    return sum(part.stat().st_size for part in parts)


def _rows(path: Path) -> set[tuple[str, ...]]:
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {(row["tool"], row["calibrated_on"], row["runtime"], row["image_size"]) for row in csv.DictReader(file)}


def _append(path: Path, row: list[Any]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        writer.writerow(row)
    print(*row)


if __name__ == "__main__":
    sys.exit(main())
