#!/usr/bin/env bash
# Mask R-CNN with ResNet-50 on COCO; on Pascal VOC: python -m tools.experiments run configs/tables/maskrcnn_voc.yaml.
# Usage: COCO=DIR bash scripts/table_maskrcnn.sh [--only PATTERN] [--list] [--dry-run] [--smoke] [--gpus N] [KEY=VALUE ...]
set -euo pipefail
[[ " $* " != *" --help "* ]] || { sed -n '2,3s/^# //p' "$0" && exit; }
export COCO=${COCO:+$(realpath -m "$COCO")}
cd "$(dirname "$0")/.."
bash scripts/setup.sh
source scripts/environment.sh
python -m tools.experiments run configs/tables/maskrcnn.yaml "$@"
