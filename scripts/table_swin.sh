#!/usr/bin/env bash
# The authors' table of Mask R-CNN with Swin-T and Swin-S on COCO: W8A8, W6A6 and W4A8; LSQ on the full train2017 and on 2k
# images of it, and ours on synthetic images; beside them our default recipe and calibration alone on noise.
# Usage: COCO=DIR bash scripts/table_swin.sh [--dry-run] [--smoke] [--only PATTERN] [KEY=VALUE ...]   (scripts/table.sh)
source "$(dirname "$0")/help.sh"
source "$(dirname "$0")/table.sh"

for size in t s; do
  for width in "8 8" "6 6" "4 8"; do
    read -r w a <<<"$width"
    two_stage "swin_$size/w${w}a$a" "configs/vit/swin_$size.yaml" $(bits "$w" "$a")
  done
done
finish
