#!/usr/bin/env bash
# Ablations: where the labels come from, the loss terms of stage one, the terms of training, and the number of images.
# Everything else is our default recipe; MODEL and BITS choose the detector and the bit-width.
# Usage: COCO=DIR [MODEL=yolo11/yolo11s] [BITS="4 8"] bash scripts/table_ablations.sh [--dry-run] [--smoke] [--only PATTERN]
source "$(dirname "$0")/table.sh"

config=configs/${MODEL:=yolo11/yolo11s}.yaml
read -r w a <<<"${BITS:=4 8}"
at="$(basename "$MODEL")/w${w}a$a"
bits=($(bits "$w" "$a"))
try() { experiment "$at/$1" "$config" "${bits[@]}" "${@:2}"; }

try ours
# Labels: one box, several boxes, both kept as drawn; edited by the detector; those of real images; none at all.
try labels_one_box synthesis.labels=one_box synthesis.low_resolution_iterations=0
try labels_multi_box synthesis.labels=multi_box synthesis.low_resolution_iterations=0
try labels_adaptive_one_box synthesis.labels=one_box
try labels_true synthesis.labels=true_label synthesis.annotations="$train_labels" synthesis.low_resolution_iterations=0
try images_noise synthesis.source=noise
try images_statistics_only synthesis.source=batch_norm
# Loss terms of stage one.
try loss_without_task synthesis.weights.task=0
try loss_without_batch_norm synthesis.weights.batch_norm=0 synthesis.weights.first_batch_norm=0
try loss_without_total_variation synthesis.weights.total_variation=0
try loss_published synthesis=paper
# Terms of training.
try training_none training.epochs=0
try training_without_features training.feature_weight=0
try training_without_logits training.logit_weight=0
try training_task_only training.logit_weight=0 training.feature_weight=0 training.task_weight=1
try training_with_task training.task_weight=0.1
try training_published training=paper
# The number of images; calibration sees no more than there are.
for count in 64 256 1024 4096; do
  try "images_$count" synthesis.num_images=$count
done
finish
