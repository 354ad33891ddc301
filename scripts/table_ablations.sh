#!/usr/bin/env bash
# The paper's ablations, for YOLO11s at W4A8 on COCO: labels, loss terms, calibration, training, number of images.
# Usage: COCO=DIR bash scripts/table_ablations.sh [--only PATTERN] [--list] [--dry-run] [--smoke] [--gpus N] [KEY=VALUE ...]
set -euo pipefail
[[ " $* " != *" --help "* ]] || { sed -n '2,3s/^# //p' "$0" && exit; }
export COCO=${COCO:+$(realpath -m "$COCO")}
cd "$(dirname "$0")/.."
bash scripts/setup.sh
source scripts/environment.sh
python -m tools.experiments run configs/tables/ablations.yaml "$@"
