#!/usr/bin/env bash
# YOLO11s at four bit-widths, with the default and with the paper's settings; results are in runs/.
# Usage: COCO=DIR bash scripts/yolo11_s.sh [KEY=VALUE ...]
source "$(dirname "$0")/help.sh"
set -euo pipefail
: "${COCO:?set it to the folder that holds images/val2017 and annotations/instances_val2017.json}"
COCO=$(realpath "$COCO")
cd "$(dirname "$0")/.."
bash scripts/setup.sh
source scripts/environment.sh
set -- data.images="$COCO/images/val2017" data.annotations="$COCO/annotations/instances_val2017.json" "$@"

zsqdet run configs/yolo11/yolo11s.yaml bits=w8a8 "$@"
zsqdet run configs/yolo11/yolo11s.yaml bits=w6a6 "$@"
zsqdet run configs/yolo11/yolo11s.yaml bits=w4a8 "$@"
zsqdet run configs/yolo11/yolo11s.yaml bits=w4a4 "$@"
zsqdet run configs/yolo11/yolo11s.yaml bits=w8a8 preset=paper run_dir=runs/yolo11s_paper_w8a8 "$@"
zsqdet run configs/yolo11/yolo11s.yaml bits=w6a6 preset=paper run_dir=runs/yolo11s_paper_w6a6 "$@"
zsqdet run configs/yolo11/yolo11s.yaml bits=w4a8 preset=paper run_dir=runs/yolo11s_paper_w4a8 "$@"
zsqdet run configs/yolo11/yolo11s.yaml bits=w4a4 preset=paper run_dir=runs/yolo11s_paper_w4a4 "$@"
