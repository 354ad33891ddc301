#!/usr/bin/env bash
# A micro Swin Mask R-CNN on drawn shapes: as published by calibration alone, then ours, on CPU cores.
# Usage: bash scripts/vit_micro.sh [KEY=VALUE ...]
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
source scripts/environment.sh

if [ ! -f runs/shapes/annotations.json ]; then
  rm -rf runs/shapes
  python -m tools.shapes.generate runs/shapes --images 200
fi

zsqdet run configs/vit/micro_vit_w4a8.yaml quantization.preset=paper training.epochs=0 run_dir=runs/micro_vit_w4a8_paper_ptq "$@"
zsqdet run configs/vit/micro_vit_w4a4.yaml quantization.preset=paper training.epochs=0 run_dir=runs/micro_vit_w4a4_paper_ptq "$@"
zsqdet run configs/vit/micro_vit_w4a8.yaml "$@"
zsqdet run configs/vit/micro_vit_w4a4.yaml "$@"
python -m tools.collect_results runs/micro_vit_w4a8_paper_ptq runs/micro_vit_w4a4_paper_ptq runs/micro_vit_w4a8 runs/micro_vit_w4a4 \
  --columns run,bits,quantizer,images,FP,PTQ,trained,seconds
