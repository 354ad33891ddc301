"""Quantizes a float ONNX detector to INT8 with ONNX Runtime: python quantize.py FLOAT.onnx INT8.onnx

Needs onnxruntime, onnx and numpy. What comes after the last convolution stays in float: boxes in pixels and scores
share one tensor there, and one scale for both would round every score to zero.
"""

import sys
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, quantize_static


class Reader(CalibrationDataReader):
    """Gives the calibration images one after the other."""

    def __init__(self, input_name: str) -> None:
        images = np.load(Path(__file__).with_name("calibration.npy"), mmap_mode="r")
        self.feeds = ({input_name: np.asarray(images[i : i + 1])} for i in range(len(images)))

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


def tail(graph: onnx.GraphProto) -> list[str]:
    """Names of the nodes from which no convolution is reached."""
    needed: set[str] = set()
    found = []
    for node in reversed(graph.node):
        if node.op_type == "Conv" or needed & set(node.output):
            needed.update(node.input)
        else:
            found.append(node.name)
    return found


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python quantize.py FLOAT.onnx INT8.onnx")
    graph = onnx.load(sys.argv[1]).graph
    quantize_static(sys.argv[1], sys.argv[2], Reader(graph.input[0].name), nodes_to_exclude=tail(graph))
