#!/usr/bin/env bash
# Ablations and baselines for YOLO11n and YOLOv5n on the 800 real images of the shared folder at 320 pixels: three seeds of
# each, mean and spread into results/. 32 images, images and calibration without training, training to the last epoch, so
# that every line shows what it changes. About 220 experiments of 2 to 8 minutes on one core: use --only.
# Usage: ZSQDET_SHARED=DIR [BITS="4 4"] bash scripts/results_ablations.sh [--dry-run] [--smoke] [--only PATTERN] [KEY=VALUE ...]
source "$(dirname "$0")/help.sh"
runs=runs/results_ablations
source "$(dirname "$0")/shared.sh"
source scripts/ablations.sh

read -r w a <<<"${BITS:=4 4}"
# The published settings, at the iterations and epochs that all other lines have; its rate, where the file has another.
set_of=(synthesis.num_images=32 quantization.calibration_images=32 training.epochs=12)
untrained=(training.epochs=0) terms=(training.selection=last)
published_loss=(synthesis.low_resolution_iterations=70 synthesis.iterations=25 synthesis.label_sampling.every=20) published_training=(training.learning_rate=1e-5) counts=(16 64)
for model in yolo11n yolov5n; do
  shared_data "$model"
  config=configs/${model%n}/${model}_cpu.yaml at=$model/w${w}a$a
  for seed in 0 1 2; do
    last=seed$seed
    settings=($(bits "$w" "$a") seed="$seed" "${set_of[@]}")
    ablations "$at" "$config" "${settings[@]}"
    # Baselines: real images, calibrated and trained as ours and as published; noise and synthetic images as published.
    experiment "$at/baseline_real/$last" "$config" "${settings[@]}" "${real[@]}" "${set_of[@]}"
    experiment "$at/baseline_real_published/$last" "$config" "${settings[@]}" "${real[@]}" "${set_of[@]}" quantization=paper training=paper "${published_training[@]}"
    experiment "$at/baseline_noise_published/$last" "$config" "${settings[@]}" synthesis.source=noise quantization=paper training.epochs=0
    experiment "$at/baseline_published/$last" "$config" "${settings[@]}" preset=paper "${published_loss[@]}" "${published_training[@]}"
  done
done
out=results/ablations
[ -z "$smoke" ] || out=$runs/ablations
finish --seeds --csv "$out.csv" --json "$out.json"
