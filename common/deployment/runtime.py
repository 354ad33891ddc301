"""An exported detector in its runtime, behind the same protocol as the module it was made from."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from common.checkpoints.strict_json import read_strictly
from common.config.schema import EvaluationConfig
from common.config.yaml_text import parse_yaml, read_text
from common.detection.detector import Detector, ExportableDetector, build_detector, has_masks, takes_batches
from common.detection.types import Detections
from common.runtime.environment import needed
from common.runtime.errors import UserError
from common.runtime.files import is_same

log = logging.getLogger("zsqdet")
ONNX, OPENVINO = ".onnx", ".xml"
MOST_IMAGES = 1024  # of a batch that is fixed
MOST_METADATA = 20_000_000  # bytes; the names of 10,000 classes stand in it twice


class Session(Protocol):
    """A graph that a runtime has loaded."""

    metadata: dict[str, str]
    input_shape: tuple[int | None, ...]  # [B, 3, H, W], None where it may change

    def __call__(self, images: np.ndarray) -> list[np.ndarray]:
        """The outputs for images float32 [B, 3, H, W] in [0, 1]."""


def open_session(path: Path, threads: int = 0) -> Session:
    """Loads an .onnx file into ONNX Runtime or the .xml of an OpenVINO pair into OpenVINO, on the CPU.

    Args:
        path: the file, or a folder that holds one of them.
        threads: that one inference uses; 0 leaves it to the runtime.

    Raises:
        UserError: not such a file, or the runtime is not installed.
    """
    path = graph_file(path)
    return _OnnxRuntime(path, threads) if path.suffix == ONNX else _OpenVino(path, threads)


def graph_file(path: Path) -> Path:
    """The graph that `path` is or holds.

    Raises:
        UserError: there is none, or more than one.
    """
    if path.is_dir():
        found = sorted([*path.glob(f"*{ONNX}"), *path.glob(f"*{OPENVINO}"), *path.glob(f"*/*{OPENVINO}")])
        if len(found) != 1:
            what = "name one of them" if found else "give a folder of `zsqdet export`, as RUN/export/onnxruntime"
            raise UserError(f"{path}: holds {len(found)} .onnx and .xml files; {what}")
        return found[0]
    if path.suffix not in (ONNX, OPENVINO) or not path.is_file():
        raise UserError(f"{path}: found no such graph; give an .onnx file, or the .xml file of an OpenVINO model")
    return path


def check_export(folder: Path) -> None:
    """Compares the detector's files in a folder of `zsqdet export` with their recorded hashes.

    Raises:
        UserError: one is damaged, gone or of another export; or export.json is damaged.
    """
    about = read_strictly(folder / "export.json")
    files = about.get("files") if isinstance(about, dict) else None
    for name, digest in files.items() if isinstance(files, dict) else ():  # older versions did not note them
        if not is_same(folder / name, digest):
            raise UserError(f"{folder / name}: damaged or gone, its SHA-256 is not the recorded one; export again")


def find_graph(path: Path) -> Path | None:
    """The graph that `path` is, or that it holds as a folder of `zsqdet export`; None for anything else."""
    if path.suffix in (ONNX, OPENVINO) or (path / "export.json").is_file():
        return graph_file(path)
    return None


def onnxruntime_session(path: Path, threads: int = 0, **settings: Any) -> Any:
    """A session of ONNX Runtime on the CPU, exact on every processor where it can be.

    A processor without VNNI adds pairs of UINT8 x INT8 products in 16 bits, which saturates. With the entry
    `session.x64quantprecision` ONNX Runtime takes UINT8 weights there, whose products it adds exactly; on other
    processors that changes nothing. Where layers share a weight, as the heads of an FPN do, it fails and is left out.

    Args:
        path: of the graph.
        threads: that one inference uses; 0 for all cores.
        settings: attributes of SessionOptions.

    Raises:
        UserError: it cannot be loaded, or ONNX Runtime is not installed.
    """
    runtime: Any = needed("onnxruntime", "export")
    for exact in (True, False):
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 4 if exact else 3
        options.add_session_config_entry("session.x64quantprecision", str(int(exact)))
        for name, value in settings.items():
            setattr(options, name, value)
        try:
            return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors have no common class
            if not exact or "existing tensor" not in str(error):
                raise UserError(f"{path}: ONNX Runtime cannot load it ({_first_line(error)})") from error
    raise AssertionError


class _OnnxRuntime:
    def __init__(self, path: Path, threads: int) -> None:
        self.session = onnxruntime_session(path, threads)
        self.metadata = dict(self.session.get_modelmeta().custom_metadata_map)
        given = self.session.get_inputs()
        self.input_name = given[0].name if given else ""
        shapes = [tuple(n if isinstance(n, int) else None for n in entry.shape) for entry in given]
        self.input_shape = _images_shape(path, shapes)

    def __call__(self, images: np.ndarray) -> list[np.ndarray]:
        return list(self.session.run(None, {self.input_name: images}))


class _OpenVino:
    def __init__(self, path: Path, threads: int) -> None:
        openvino: Any = needed("openvino", "export")
        core = openvino.Core()
        try:
            model = core.read_model(path)
            settings = {"PERFORMANCE_HINT": "LATENCY"} | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
            self.compiled = core.compile_model(model, "CPU", settings)
        except Exception as error:
            raise UserError(f"{path}: OpenVINO cannot load it ({_first_line(error)})") from error
        self.metadata = _metadata_file(path.with_name("metadata.yaml"))
        found = [entry.partial_shape for entry in self.compiled.inputs]
        shapes = [
            tuple(n.get_length() if n.is_static else None for n in shape) if shape.rank.is_static else ()
            for shape in found
        ]
        self.input_shape = _images_shape(path, shapes)

    def __call__(self, images: np.ndarray) -> list[np.ndarray]:
        result = self.compiled(images)
        return [result[output] for output in self.compiled.outputs]


class RuntimeModule(nn.Module):
    """A session as a module: images [B, 3, H, W] to the graph's outputs. A graph of batch 1 runs image by image."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    def forward(self, images: Tensor) -> list[Tensor]:
        """Raises UserError where the graph has another size."""
        batch, _, *size = self.session.input_shape
        if any(fixed not in (None, side) for fixed, side in zip(size, images.shape[2:], strict=True)):
            raise UserError(
                f"evaluation: found images of {images.shape[2]}x{images.shape[3]} pixels, but this graph has a fixed "
                f"size of {size[0]}x{size[1]}; set evaluation.image_size={size[0]} and evaluation.rectangular=false, "
                "or export it with --dynamic"
            )
        values = images.cpu().numpy().astype(np.float32)
        step = batch or len(values)
        parts = [self._run(values[i : i + step], step) for i in range(0, len(values), step)]
        return [torch.from_numpy(np.concatenate(rows)) for rows in zip(*parts, strict=True)]

    def _run(self, values: np.ndarray, count: int) -> list[np.ndarray]:
        """One inference; the last batch of a graph with a fixed one is filled up with its first image."""
        missing = max(count - len(values), 0)
        filled = np.concatenate([values, values[:1].repeat(missing, 0)]) if missing else values
        try:
            outputs = self.session(filled)
        except Exception as error:  # the runtimes' errors have no common class
            raise UserError(f"graph: cannot be run ({_first_line(error)}); export it again") from error
        if any(rows.dtype.kind == "f" and np.isnan(rows).any() for rows in outputs):
            raise UserError("graph: its outputs hold NaN, as of a damaged file; export it again")
        return [rows[:-missing] for rows in outputs] if missing else outputs


@dataclass
class ExportedDetector:
    """Detects with a runtime; all that evaluation and prediction ask of a detector."""

    inner: ExportableDetector
    class_names: tuple[str, ...]
    stride: int
    has_masks: bool

    def detect(
        self, module: nn.Module, images: Tensor, confidence: float, iou: float, max_detections: int
    ) -> list[Detections]:
        """As the module that was exported detects."""
        limits = (confidence, iou, max_detections)
        if takes_batches(self.inner):
            return self._decoded(module(images), *limits)
        return [found for image in images for found in self._decoded(module(image[None]), *limits)]

    def _decoded(self, outputs: list[Tensor], *limits: Any) -> list[Detections]:
        """Raises UserError where the outputs are those of another network than the metadata describe."""
        try:
            found = self.inner.detections(outputs, *limits)
        except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            shapes = ", ".join(str(list(rows.shape)) for rows in outputs)
            raise UserError(
                f"graph: its outputs have the shapes {shapes}, which are not those of the detector in its metadata "
                f"({_first_line(error)}); export it again"
            ) from error
        highest = max((int(one.labels.max()) for one in found if len(one.labels)), default=0)
        if highest >= len(self.class_names):
            raise UserError(
                f"graph: detects class {highest}, but its metadata name {len(self.class_names)}; export it again"
            )
        return found


def load_exported(path: Path, threads: int = 0) -> tuple[Any, nn.Module]:
    """The detector and the module of a graph that `zsqdet export` made.

    Raises:
        UserError: another graph, or one that the runtime cannot load.
    """
    for folder in (path, *path.parents[:2]):  # the folder, or that of the .onnx file or of the .xml file
        if (folder / "export.json").is_file():
            check_export(folder)
            break
    session = open_session(path, threads)
    _, inner = _about(path, session)
    assert isinstance(inner, ExportableDetector)
    return ExportedDetector(inner, inner.class_names, inner.stride, has_masks(inner)), RuntimeModule(session)


def _about(path: Path, session: Session) -> tuple[str, Detector]:
    try:
        about = json.loads(session.metadata["zsqdet"])
        return about["family"], build_detector(about["family"], about["architecture"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not an export of zsqdet (its metadata has no key `zsqdet` that can be read)"
        ) from error


def family_of(graph: Path) -> str:
    """Of the detector that an exported graph is.

    Raises:
        UserError: another graph, or one that the runtime cannot load.
    """
    return _about(graph, open_session(graph, 1))[0]


def in_size_of(module: nn.Module, config: EvaluationConfig) -> EvaluationConfig:
    """The settings with letterboxed squares of the size of a graph of `load_exported` that has only one."""
    assert isinstance(module, RuntimeModule)
    height, width = module.session.input_shape[2:]
    if config.resize != "letterbox" or height is None or height != width:
        return config
    if config.rectangular or config.image_size != height:
        log.info("evaluation: the graph has one size; images are letterboxed to squares of %d pixels", height)
    return config.model_copy(update={"image_size": height, "rectangular": False})


def _images_shape(path: Path, shapes: Sequence[tuple[int | None, ...]]) -> tuple[int | None, ...]:
    """The shape of the only input.

    Raises:
        UserError: the graph does not take images alone.
    """
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][1] not in (None, 3):
        found = " and ".join(str(list(shape)) for shape in shapes) or "none"
        raise UserError(
            f"{path}: found the inputs {found}; needed is one for images [B, 3, H, W]; give a graph that "
            "`zsqdet export` made"
        )
    batch = shapes[0][0]
    if batch is not None and not 1 <= batch <= MOST_IMAGES:
        raise UserError(f"{path}: found a batch of {batch}; allowed are 1 to {MOST_IMAGES}, or a dynamic one")
    return shapes[0]


def _metadata_file(path: Path) -> dict[str, str]:
    """The texts of an OpenVINO pair's metadata; empty where there are none.

    Raises:
        UserError: not plain YAML.
    """
    if not path.is_file():
        return {}
    try:
        found, _ = parse_yaml(read_text(path, MOST_METADATA), numbers=True)
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(str(path)) else f"{path}: {text}") from error
    return {str(k): v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
