#!/usr/bin/env bash
# Mask R-CNN with Swin-T at four bit-widths, with the default and with the paper's settings; results are in runs/.
# Usage: COCO=DIR bash scripts/vit_t.sh [KEY=VALUE ...]
source "$(dirname "$0")/help.sh"
set -euo pipefail
: "${COCO:?set it to the folder that holds images/val2017 and annotations/instances_val2017.json}"
COCO=$(realpath "$COCO")
cd "$(dirname "$0")/.."
bash scripts/setup.sh
source scripts/environment.sh
set -- data.images="$COCO/images/val2017" data.annotations="$COCO/annotations/instances_val2017.json" "$@"

zsqdet run configs/vit/swin_t.yaml bits=w8a8 "$@"
zsqdet run configs/vit/swin_t.yaml bits=w6a6 "$@"
zsqdet run configs/vit/swin_t.yaml bits=w4a8 "$@"
zsqdet run configs/vit/swin_t.yaml bits=w4a4 "$@"
zsqdet run configs/vit/swin_t.yaml bits=w8a8 preset=paper run_dir=runs/swin_t_paper_w8a8 "$@"
zsqdet run configs/vit/swin_t.yaml bits=w6a6 preset=paper run_dir=runs/swin_t_paper_w6a6 "$@"
zsqdet run configs/vit/swin_t.yaml bits=w4a8 preset=paper run_dir=runs/swin_t_paper_w4a8 "$@"
zsqdet run configs/vit/swin_t.yaml bits=w4a4 preset=paper run_dir=runs/swin_t_paper_w4a4 "$@"
