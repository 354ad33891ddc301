"""Several bit-widths of one detector, which share their synthetic images: python examples/sweep.py best.pt FOLDER"""

import sys
from pathlib import Path

import zsqdet

if len(sys.argv) != 3:
    sys.exit("usage: python examples/sweep.py best.pt FOLDER")
checkpoint, folder = sys.argv[1:]
for bits in ("w8a8", "w6a6", "w4a8"):
    run = zsqdet.quantize(checkpoint, bits=bits, run_dir=Path(folder) / bits)
    fidelity = run.results["fidelity"]["rows"][-1]["AP"]
    print(f"{bits}: fidelity {fidelity:.3f}")
