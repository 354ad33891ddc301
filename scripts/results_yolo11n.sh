#!/usr/bin/env bash
# YOLO11n on the 800 real images of the shared folder at 320 pixels: full precision, calibration on noise, synthetic and
# real images, training on synthetic images; the default and the paper's quantizer at four bit-widths. Hours on one core.
# Usage: ZSQDET_SHARED=DIR bash scripts/results_yolo11n.sh [KEY=VALUE ...]
set -euo pipefail
: "${ZSQDET_SHARED:?set it to the folder that holds coco/ and weights/}"
SHARED=$(realpath "$ZSQDET_SHARED")
cd "$(dirname "$0")/.."
bash scripts/setup.sh
source scripts/environment.sh
set -- weights="$SHARED/weights/yolo11n.pt" data.images="$SHARED/coco/images/val2017" \
  data.annotations="$SHARED/coco/annotations/instances_val2017_subset.json" "$@"
real=(synthesis.source=real synthesis.real_images="$SHARED/coco/images/train2017_128" synthesis.num_images=128 quantization.borders=false)

# Synthetic images: calibrated and trained.
zsqdet run configs/yolo11/yolo11n_cpu_w8a8.yaml run_dir=runs/results/w8a8 "$@"
zsqdet run configs/yolo11/yolo11n_cpu_w6a6.yaml run_dir=runs/results/w6a6 "$@"
zsqdet run configs/yolo11/yolo11n_cpu_w4a8.yaml run_dir=runs/results/w4a8 "$@"
zsqdet run configs/yolo11/yolo11n_cpu_w4a4.yaml run_dir=runs/results/w4a4 "$@"

# A tenth of the weights at 8 bits, and their inputs: where a scan of the layers without data says, or the first stages.
zsqdet run configs/yolo11/yolo11n_cpu_w4a8.yaml quantization.budget=4.4 training.epochs=0 run_dir=runs/results/w4a8_budget "$@"
zsqdet run configs/yolo11/yolo11n_cpu_w4a4.yaml quantization.budget=4.115 training.epochs=0 run_dir=runs/results/w4a4_budget_small "$@"
zsqdet run configs/yolo11/yolo11n_cpu_w4a4.yaml quantization.budget=4.4 training.epochs=0 run_dir=runs/results/w4a4_budget "$@"
zsqdet run configs/yolo11/yolo11n_cpu_w4a4.yaml 'quantization.eight_bit_roles=[early]' training.epochs=0 run_dir=runs/results/w4a4_early "$@"

# The published quantizer on the same images: calibrated, and with the published training.
zsqdet run configs/yolo11/yolo11n_cpu_w8a8.yaml quantization=paper training.epochs=0 run_dir=runs/results/w8a8_paper_ptq "$@"
zsqdet run configs/yolo11/yolo11n_cpu_w6a6.yaml quantization=paper training.epochs=0 run_dir=runs/results/w6a6_paper_ptq "$@"
zsqdet run configs/yolo11/yolo11n_cpu_w4a8.yaml quantization=paper training.epochs=0 run_dir=runs/results/w4a8_paper_ptq "$@"
zsqdet run configs/yolo11/yolo11n_cpu_w4a4.yaml quantization=paper training.epochs=0 run_dir=runs/results/w4a4_paper_ptq "$@"
zsqdet run configs/yolo11/yolo11n_cpu_w8a8.yaml quantization=paper training=paper training.epochs=6 run_dir=runs/results/w8a8_paper "$@"
zsqdet run configs/yolo11/yolo11n_cpu_w6a6.yaml quantization=paper training=paper training.epochs=6 run_dir=runs/results/w6a6_paper "$@"
zsqdet run configs/yolo11/yolo11n_cpu_w4a8.yaml quantization=paper training=paper training.epochs=6 run_dir=runs/results/w4a8_paper "$@"
zsqdet run configs/yolo11/yolo11n_cpu_w4a4.yaml quantization=paper training=paper training.epochs=6 run_dir=runs/results/w4a4_paper "$@"

# Calibration on noise, and on 128 real images (not zero-shot).
zsqdet run configs/yolo11/yolo11n_cpu_w8a8.yaml synthesis.source=noise training.epochs=0 run_dir=runs/results/w8a8_noise "$@"
zsqdet run configs/yolo11/yolo11n_cpu_w8a8.yaml "${real[@]}" training.epochs=0 run_dir=runs/results/w8a8_real "$@"
zsqdet run configs/yolo11/yolo11n_cpu_w6a6.yaml synthesis.source=noise training.epochs=0 run_dir=runs/results/w6a6_noise "$@"
zsqdet run configs/yolo11/yolo11n_cpu_w6a6.yaml "${real[@]}" training.epochs=0 run_dir=runs/results/w6a6_real "$@"
zsqdet run configs/yolo11/yolo11n_cpu_w4a8.yaml synthesis.source=noise training.epochs=0 run_dir=runs/results/w4a8_noise "$@"
zsqdet run configs/yolo11/yolo11n_cpu_w4a8.yaml "${real[@]}" training.epochs=0 run_dir=runs/results/w4a8_real "$@"
zsqdet run configs/yolo11/yolo11n_cpu_w4a4.yaml synthesis.source=noise training.epochs=0 run_dir=runs/results/w4a4_noise "$@"
zsqdet run configs/yolo11/yolo11n_cpu_w4a4.yaml "${real[@]}" training.epochs=0 run_dir=runs/results/w4a4_real "$@"
zsqdet run configs/yolo11/yolo11n_cpu_w8a8.yaml quantization=paper synthesis.source=noise training.epochs=0 run_dir=runs/results/w8a8_paper_noise "$@"
zsqdet run configs/yolo11/yolo11n_cpu_w8a8.yaml quantization=paper "${real[@]}" training.epochs=0 run_dir=runs/results/w8a8_paper_real "$@"
zsqdet run configs/yolo11/yolo11n_cpu_w6a6.yaml quantization=paper synthesis.source=noise training.epochs=0 run_dir=runs/results/w6a6_paper_noise "$@"
zsqdet run configs/yolo11/yolo11n_cpu_w6a6.yaml quantization=paper "${real[@]}" training.epochs=0 run_dir=runs/results/w6a6_paper_real "$@"
zsqdet run configs/yolo11/yolo11n_cpu_w4a8.yaml quantization=paper synthesis.source=noise training.epochs=0 run_dir=runs/results/w4a8_paper_noise "$@"
zsqdet run configs/yolo11/yolo11n_cpu_w4a8.yaml quantization=paper "${real[@]}" training.epochs=0 run_dir=runs/results/w4a8_paper_real "$@"
zsqdet run configs/yolo11/yolo11n_cpu_w4a4.yaml quantization=paper synthesis.source=noise training.epochs=0 run_dir=runs/results/w4a4_paper_noise "$@"
zsqdet run configs/yolo11/yolo11n_cpu_w4a4.yaml quantization=paper "${real[@]}" training.epochs=0 run_dir=runs/results/w4a4_paper_real "$@"

# At 640 pixels: full precision, calibrated, trained.
zsqdet evaluate configs/yolo11/yolo11n_cpu_w4a8.yaml "$@" evaluation.image_size=640 --json runs/results/640_full.json
zsqdet evaluate configs/yolo11/yolo11n_cpu_w4a8.yaml "$@" weights=runs/results/w4a8/ptq evaluation.image_size=640 --json runs/results/640_w4a8_ptq.json
zsqdet evaluate configs/yolo11/yolo11n_cpu_w4a8.yaml "$@" weights=runs/results/w4a8 evaluation.image_size=640 --json runs/results/640_w4a8_trained.json

python -m tools.collect_results runs/results/*/ --csv results/yolo11n.csv --json results/yolo11n.json
