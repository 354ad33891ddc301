"""A dynamic graph takes sizes that it was not traced with, for both YOLO families."""

from pathlib import Path

import pytest
import torch

from common.deployment.graph import Shape, export_graph
from common.deployment.runtime import RuntimeModule, open_session
from common.detection.detector import load_detector

SHAPES = Path(__file__).parents[2] / "tools/shapes"


@pytest.mark.parametrize("family", ["yolo11", "yolov5"])
def test_a_dynamic_float_graph_gives_what_the_module_gives_at_other_sizes(family, tmp_path):
    detector = load_detector(family, SHAPES / f"micro_{family}.safetensors")
    module = detector.build()
    export_graph(detector, module, tmp_path / "a.onnx", Shape((96, 96), dynamic=True))
    graph = RuntimeModule(open_session(tmp_path / "a.onnx"))
    images = torch.rand(2, 3, 64, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = detector.export_module(module)(images)
    for found, own in zip(graph(images), wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
        assert torch.allclose(found, own, atol=2e-3)
