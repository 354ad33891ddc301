"""A detector without data becomes INT8 for ONNX Runtime: python examples/quantize.py best.pt FOLDER"""

import sys

import zsqdet

if len(sys.argv) != 3:
    sys.exit("usage: python examples/quantize.py best.pt FOLDER")
checkpoint, folder = sys.argv[1:]
run = zsqdet.quantize(checkpoint, bits="w8a8", settings={"quantization.profile": "full"}, run_dir=folder)
for row in run.results["fidelity"]["rows"]:
    print(f"{row['name']}: fidelity {row['AP']:.3f} of {row['objects']} objects")
print(run.report)
print(run.export("onnxruntime", dynamic=True))
