#!/usr/bin/env bash
# Mask R-CNN R50 on COCO and on Pascal VOC 2007 test: W8A8, W6A6 and W4A8; the published recipe, ours, and real images.
# The authors give no numbers for it, and nobody publishes a checkpoint for VOC: its lines need one of your own
# (configs/resnet/maskrcnn_r50_voc.yaml) and VOC, the folder of VOCdevkit with voc2007_test.json (same file says how).
# Usage: COCO=DIR VOC=DIR bash scripts/table_maskrcnn.sh [--dry-run] [--smoke] [--only PATTERN] [KEY=VALUE ...]
source "$(dirname "$0")/help.sh"
VOC=$(realpath -m "${VOC:-$(dirname "$0")/../data/voc}")
source "$(dirname "$0")/table.sh"

for width in "8 8" "6 6" "4 8"; do
  read -r w a <<<"$width"
  two_stage "maskrcnn_r50/w${w}a$a" configs/resnet/maskrcnn_resnet50_fpn.yaml $(bits "$w" "$a")
done

[ -n "$smoke" ] || data=(data.images="$VOC/VOCdevkit/VOC2007/JPEGImages" data.annotations="$VOC/voc2007_test.json")
for width in "8 8" "6 6" "4 8"; do
  read -r w a <<<"$width"
  bits=($(bits "$w" "$a"))
  config=configs/resnet/maskrcnn_r50_voc.yaml at="maskrcnn_r50_voc/w${w}a$a"
  experiment "$at/ours_published" "$config" "${bits[@]}" preset=paper
  experiment "$at/ours" "$config" "${bits[@]}"
  [[ $at == *w8a8 ]] || experiment "$at/ours_even" "$config" "${bits[@]}" "${even[@]}"
  experiment "$at/ptq_noise" "$config" "${bits[@]}" synthesis.source=noise training.epochs=0
done
finish
