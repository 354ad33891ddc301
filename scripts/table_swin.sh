#!/usr/bin/env bash
# The authors' table of Mask R-CNN with Swin-T and Swin-S on COCO: W8A8, W6A6 and W4A8; LSQ on the full train2017 and on 2k
# images of it, and ours on synthetic images; beside them our default recipe and calibration alone on noise.
# Usage: COCO=DIR bash scripts/table_swin.sh [--dry-run] [--smoke] [--only PATTERN] [KEY=VALUE ...]   (scripts/table.sh)
source "$(dirname "$0")/table.sh"

for size in t s; do
  config=configs/vit/swin_$size.yaml
  for width in "8 8" "6 6" "4 8"; do
    read -r w a <<<"$width"
    at="swin_$size/w${w}a$a"
    bits=($(bits "$w" "$a"))
    experiment "$at/lsq_full" "$config" "${bits[@]}" "${real_full[@]}" "${lsq[@]}"
    experiment "$at/lsq_2k" "$config" "${bits[@]}" "${real_2k[@]}" "${lsq[@]}"
    experiment "$at/ours_published" "$config" "${bits[@]}" preset=paper
    experiment "$at/ours" "$config" "${bits[@]}"
    experiment "$at/lsq_full_distilled" "$config" "${bits[@]}" "${real_full[@]}" "${distilled[@]}"
    experiment "$at/lsq_2k_distilled" "$config" "${bits[@]}" "${real_2k[@]}" "${distilled[@]}"
    experiment "$at/ptq_noise" "$config" "${bits[@]}" synthesis.source=noise training.epochs=0
  done
done
finish
