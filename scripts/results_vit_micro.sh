#!/usr/bin/env bash
# The micro Swin Mask R-CNN on 200 drawn images: AP of boxes and masks at four bit-widths, by the published quantizer's calibration,
# by ours and by training, all on the same synthetic images. About 20 minutes on one core.
# Usage: bash scripts/results_vit_micro.sh [KEY=VALUE ...]
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
source scripts/environment.sh

if [ ! -f runs/shapes/annotations.json ]; then
  rm -rf runs/shapes
  python -m tools.shapes.generate runs/shapes --images 200
fi

zsqdet run configs/vit/micro_vit_w4a4.yaml run_dir=runs/micro_vit/w4a4 "$@"
zsqdet run configs/vit/micro_vit_w4a4.yaml quantization=paper training.epochs=0 run_dir=runs/micro_vit/w4a4_paper "$@"
zsqdet run configs/vit/micro_vit_w4a8.yaml run_dir=runs/micro_vit/w4a8 "$@"
zsqdet run configs/vit/micro_vit_w4a8.yaml quantization=paper training.epochs=0 run_dir=runs/micro_vit/w4a8_paper "$@"
zsqdet run configs/vit/micro_vit_w6a6.yaml run_dir=runs/micro_vit/w6a6 "$@"
zsqdet run configs/vit/micro_vit_w6a6.yaml quantization=paper training.epochs=0 run_dir=runs/micro_vit/w6a6_paper "$@"
zsqdet run configs/vit/micro_vit_w8a8.yaml run_dir=runs/micro_vit/w8a8 "$@"
zsqdet run configs/vit/micro_vit_w8a8.yaml quantization=paper training.epochs=0 run_dir=runs/micro_vit/w8a8_paper "$@"

python -m tools.collect_results runs/micro_vit/w8a8 runs/micro_vit/w6a6 runs/micro_vit/w4a8 runs/micro_vit/w4a4 runs/micro_vit/w8a8_paper runs/micro_vit/w6a6_paper runs/micro_vit/w4a8_paper runs/micro_vit/w4a4_paper --csv results/vit_micro.csv --json results/vit_micro.json
