"""Several bit-widths of one detector, which share their synthetic images: python examples/sweep.py best.pt FOLDER"""

import sys
from pathlib import Path

import zsqdet

checkpoint, folder = sys.argv[1:]
for bits in ("w8a8", "w6a6", "w4a8"):
    run = zsqdet.quantize(checkpoint, bits=bits, run_dir=Path(folder) / bits)
    fidelity = run.results["fidelity"]["rows"][-1]["AP"]
    size = (run.folder / "quantized/model.safetensors").stat().st_size
    print(f"{bits}: fidelity {fidelity:.3f}, {size / 1e6:.1f} MB")
