"""Quantizes a float detector to INT8 with NNCF: python quantize.py FLOAT.onnx INT8.xml

Needs nncf, openvino and numpy. FLOAT is an ONNX file or the .xml of an OpenVINO model.
"""

import sys
from pathlib import Path

import nncf
import numpy as np
import openvino


def dataset() -> nncf.Dataset:
    """The calibration images, each as a batch of one."""
    images = np.load(Path(__file__).with_name("calibration.npy"), mmap_mode="r")
    return nncf.Dataset([np.asarray(images[i : i + 1]) for i in range(len(images))])


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python quantize.py FLOAT.onnx INT8.xml")
    images = dataset()
    model = openvino.Core().read_model(sys.argv[1])
    quantized = nncf.quantize(
        model, images, preset=nncf.QuantizationPreset.MIXED, subset_size=images.get_length() or 300
    )
    openvino.save_model(quantized, sys.argv[2], compress_to_fp16=False)
