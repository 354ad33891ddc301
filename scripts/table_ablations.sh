#!/usr/bin/env bash
# Ablations: where the labels come from, the loss terms of stage one, the ingredients of calibration, the terms of training,
# and the number of images. Everything else is our default recipe; MODEL and BITS choose the detector and the bit-width.
# Usage: COCO=DIR [MODEL=yolo11/yolo11s] [BITS="4 8"] bash scripts/table_ablations.sh [--dry-run] [--smoke] [--only PATTERN]
source "$(dirname "$0")/help.sh"
source "$(dirname "$0")/table.sh"
source scripts/ablations.sh

MODEL=${MODEL:-yolo11/yolo11s}
read -r w a <<<"${BITS:=4 8}"
published_loss=() published_training=() counts=(64 256 1024 4096)
ablations "$(basename "$MODEL")/w${w}a$a" "configs/$MODEL.yaml" $(bits "$w" "$a")
finish
