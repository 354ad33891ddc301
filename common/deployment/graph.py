"""A detector as an ONNX graph: traced, slimmed, with the metadata that Ultralytics, Triton and OpenCV code expects."""

import json
import logging
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.deployment.containers import Levels
from common.deployment.qdq import Codes, traceable, weight_levels
from common.detection.detector import Detector, ExportableDetector, has_fixed_size, is_one_to_one, takes_batches
from common.quantization.full_placement import placed
from common.runtime.environment import free_memory, needed, temporarily, version
from common.runtime.errors import UserError

LARGE = 1536 * 1536  # pixels of a batch, from which on its memory is looked at before
SMALL = 8  # strides, the side of the image that it is looked at with
HELD = 0.5  # of the outputs of all layers, what is surely in memory at once; .65 and .68 were measured of YOLO11n
OPSET = 17  # the first with everything in it; ONNX Runtime 1.12 and OpenVINO 2022.3 read it


@dataclass(frozen=True)
class Shape:
    """Of the graph's input [batch, 3, height, width]; `dynamic` lets all but the channels differ from call to call."""

    size: tuple[int, int]  # height and width in pixels, multiples of the detector's stride
    batch: int = 1
    dynamic: bool = False


class _Graph(nn.Module):
    """What is traced: from images to the graph's outputs, every tensor through its quantizer."""

    def __init__(self, detector: ExportableDetector, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.outputs = detector.export_module(module)

    def forward(self, images: Tensor) -> Any:
        with placed(self.module, repeat=True):
            return self.outputs(images)


def export_graph(
    detector: Detector, module: nn.Module, path: Path, shape: Shape, *, opset: int = OPSET, codes: Codes = "uint8"
) -> dict[str, Levels]:
    """Writes the ONNX file of a quantized or a float detector.

    Args:
        detector: the adapter of the module; an `ExportableDetector`.
        module: in eval mode on the CPU.
        path: of the file; its folder exists.
        shape: of the input.
        opset: version of the operators, 17 or more.
        codes: of activations.

    Returns:
        What the weights' codes can be, by the name of their initializer.

    Raises:
        UserError: the family cannot be exported, or the size does not fit its stride.
    """
    if not isinstance(detector, ExportableDetector):
        raise UserError(f"export: {type(detector).__name__} has no export to ONNX yet")
    if any(side % detector.stride for side in shape.size):
        raise UserError(
            f"export: found {shape.size[0]}x{shape.size[1]} pixels; allowed are multiples of {detector.stride}"
        )
    if shape.batch != 1 and not takes_batches(detector):
        raise UserError(f"export: found --batch {shape.batch}; this detector's graph has one image: leave --batch out")
    if shape.dynamic and has_fixed_size(detector):
        raise UserError("export: found --dynamic; this detector's graph has one size: leave --dynamic out, give --size")
    graph = _Graph(detector, traceable(detector, module, codes)).eval()
    _check_memory(graph, shape, detector.stride * SMALL)
    example = torch.zeros(shape.batch, 3, *shape.size)
    axes = {"images": {0: "batch", 2: "height", 3: "width"}} | {n: dict(a) for n, a in detector.export_outputs.items()}
    log = logging.getLogger("torch.onnx")  # it says nothing that a user could act on
    with torch.no_grad(), warnings.catch_warnings(), temporarily(log, disabled=True):
        warnings.simplefilter("ignore")  # of the tracer, about shapes that are constants on purpose
        torch.onnx.export(
            graph,
            (example,),
            str(path),
            input_names=["images"],
            output_names=list(detector.export_outputs),
            opset_version=opset,
            dynamo=False,
            dynamic_axes=axes if shape.dynamic else None,
        )
    return {f"module.{name}.codes": levels for name, levels in weight_levels(graph.module).items()}


def _check_memory(graph: nn.Module, shape: Shape, side: int) -> None:
    """Refuses a size that no memory holds, by the outputs of all layers of a small image."""
    pixels = shape.batch * math.prod(shape.size)
    if pixels < LARGE:
        return
    size = 0

    def count(module: nn.Module, inputs: object, output: object) -> None:
        nonlocal size
        outputs = output if isinstance(output, tuple | list) else (output,)
        size += sum(t.numel() * t.element_size() for t in outputs if isinstance(t, Tensor))

    hooks = [part.register_forward_hook(count) for part in graph.modules() if not list(part.children())]
    with torch.no_grad():
        graph(torch.zeros(1, 3, side, side))
    for hook in hooks:
        hook.remove()
    least, free = size * pixels / side**2 * HELD, free_memory()
    if least > free:
        raise UserError(
            f"export: {shape.batch} x {shape.size[0]} x {shape.size[1]} pixels take {least / 2**30:.0f} GiB of memory "
            f"and more, and {free / 2**30:.0f} are free; give a smaller --size"
        )


def add_metadata(path: Path, entries: Mapping[str, Any]) -> None:
    """Adds texts to the file's metadata, as Ultralytics' exports have them: every value as `str` gives it."""
    onnx: Any = needed("onnx", "export")
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {key: str(value) for key, value in entries.items()})
    onnx.checker.check_model(model)
    onnx.save(model, path)


def metadata_of(detector: Detector, family: str, shape: Shape, description: str) -> dict[str, Any]:
    """Ultralytics' keys, and `zsqdet` with what `load_exported` needs."""
    own = {"family": family, "architecture": detector.architecture, "dynamic": shape.dynamic}
    return {
        "description": description,
        "author": f"zsqdet {version('zsqdet')}",
        "stride": detector.stride,
        "task": "segment" if "output1" in getattr(detector, "export_outputs", {}) else "detect",
        "batch": shape.batch,
        "imgsz": list(shape.size),
        "names": dict(enumerate(detector.class_names)),
        "channels": 3,
        "end2end": is_one_to_one(detector),
        "args": {"batch": shape.batch, "dynamic": shape.dynamic, "int8": True, "nms": False},
        "zsqdet": json.dumps(own),
    }
