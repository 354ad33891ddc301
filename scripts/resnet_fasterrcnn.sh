#!/usr/bin/env bash
# Faster R-CNN with ResNet-50 at four bit-widths, and what calibration alone gives with the published quantizer; results are in runs/.
# Usage: COCO=DIR bash scripts/resnet_fasterrcnn.sh [KEY=VALUE ...]
source "$(dirname "$0")/help.sh"
set -euo pipefail
: "${COCO:?set it to the folder that holds images/val2017 and annotations/instances_val2017.json}"
COCO=$(realpath "$COCO")
cd "$(dirname "$0")/.."
bash scripts/setup.sh
source scripts/environment.sh
set -- data.images="$COCO/images/val2017" data.annotations="$COCO/annotations/instances_val2017.json" "$@"

zsqdet run configs/resnet/fasterrcnn_resnet50_fpn.yaml bits=w8a8 "$@"
zsqdet run configs/resnet/fasterrcnn_resnet50_fpn.yaml bits=w6a6 "$@"
zsqdet run configs/resnet/fasterrcnn_resnet50_fpn.yaml bits=w4a8 "$@"
zsqdet run configs/resnet/fasterrcnn_resnet50_fpn.yaml bits=w4a4 "$@"
zsqdet run configs/resnet/fasterrcnn_resnet50_fpn.yaml bits=w8a8 quantization=paper training.epochs=0 run_dir=runs/fasterrcnn_resnet50_fpn_paper_w8a8 "$@"
zsqdet run configs/resnet/fasterrcnn_resnet50_fpn.yaml bits=w6a6 quantization=paper training.epochs=0 run_dir=runs/fasterrcnn_resnet50_fpn_paper_w6a6 "$@"
zsqdet run configs/resnet/fasterrcnn_resnet50_fpn.yaml bits=w4a8 quantization=paper training.epochs=0 run_dir=runs/fasterrcnn_resnet50_fpn_paper_w4a8 "$@"
zsqdet run configs/resnet/fasterrcnn_resnet50_fpn.yaml bits=w4a4 quantization=paper training.epochs=0 run_dir=runs/fasterrcnn_resnet50_fpn_paper_w4a4 "$@"
