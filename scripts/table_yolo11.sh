#!/usr/bin/env bash
# The paper's table of YOLO11 s, m and l on COCO: real images, the published method, ours, and fairer baselines.
# Usage: COCO=DIR bash scripts/table_yolo11.sh [--only PATTERN] [--list] [--dry-run] [--smoke] [--gpus N] [KEY=VALUE ...]
set -euo pipefail
[[ " $* " != *" --help "* ]] || { sed -n '2,3s/^# //p' "$0" && exit; }
export COCO=${COCO:+$(realpath -m "$COCO")}
cd "$(dirname "$0")/.."
bash scripts/setup.sh
source scripts/environment.sh
python -m tools.experiments run configs/tables/yolo11.yaml "$@"
