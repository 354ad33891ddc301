#!/usr/bin/env bash
# The paper's table of YOLO11 or YOLOv5 s, m and l on COCO: W8A8, W6A6 and W4A8; LSQ and LSQ+ on the full train2017 and on
# 2k images of it, and ours on synthetic images. Beside the paper's: our default recipe, the fair baselines (real images *with*
# distillation) and calibration alone on noise. The set of all 118287 real images takes about 70 GB as PNG files.
# Usage: COCO=DIR bash scripts/table_yolo.sh yolo11|yolov5 [--dry-run] [--smoke] [--only PATTERN] [KEY=VALUE ...]   (table.sh)
source "$(dirname "$0")/help.sh"
table=${1:-}
[[ $table == yolo11 || $table == yolov5 ]] || { echo "error: found '$table' for the detector; give yolo11 or yolov5" >&2 && exit 2; }
shift
source "$(dirname "$0")/table.sh"

for size in s m l; do
  config=configs/$table/$table$size.yaml
  for width in "8 8" "6 6" "4 8"; do
    read -r w a <<<"$width"
    at="$table$size/w${w}a$a"
    bits=($(bits "$w" "$a"))
    # The paper's rows.
    experiment "$at/lsq_full" "$config" "${bits[@]}" "${real_full[@]}" "${lsq[@]}"
    experiment "$at/lsq+_full" "$config" "${bits[@]}" "${real_full[@]}" "${lsq_plus[@]}"
    experiment "$at/lsq_2k" "$config" "${bits[@]}" "${real_2k[@]}" "${lsq[@]}"
    experiment "$at/lsq+_2k" "$config" "${bits[@]}" "${real_2k[@]}" "${lsq_plus[@]}"
    experiment "$at/ours_published" "$config" "${bits[@]}" preset=paper
    # What the paper does not have.
    experiment "$at/ours" "$config" "${bits[@]}"
    [[ $at == *w8a8 ]] || experiment "$at/ours_even" "$config" "${bits[@]}" "${even[@]}"
    experiment "$at/lsq_full_distilled" "$config" "${bits[@]}" "${real_full[@]}" "${distilled[@]}"
    experiment "$at/lsq+_full_distilled" "$config" "${bits[@]}" "${real_full[@]}" "${distilled_plus[@]}"
    experiment "$at/lsq_2k_distilled" "$config" "${bits[@]}" "${real_2k[@]}" "${distilled[@]}"
    experiment "$at/lsq+_2k_distilled" "$config" "${bits[@]}" "${real_2k[@]}" "${distilled_plus[@]}"
    experiment "$at/real_2k" "$config" "${bits[@]}" "${real_2k[@]}"
    experiment "$at/ptq_noise" "$config" "${bits[@]}" synthesis.source=noise training.epochs=0
  done
done
finish
