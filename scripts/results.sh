#!/usr/bin/env bash
# YOLO11n or YOLOv5n on the 800 real images of the shared folder at 320 pixels: full precision, calibration on noise,
# synthetic and real images, training on synthetic images; the default and the paper's quantizer at four bit-widths. Hours
# on one core. The table goes into results/, the runs into runs/results_DETECTOR.
# Usage: ZSQDET_SHARED=DIR bash scripts/results.sh yolo11n|yolov5n [--dry-run] [--smoke] [--only PATTERN] [KEY=VALUE ...]
source "$(dirname "$0")/help.sh"
model=${1:-}
[[ $model == yolo11n || $model == yolov5n ]] || { echo "error: found '$model' for the detector; give yolo11n or yolov5n" >&2 && exit 2; }
shift
table=results_$model runs=runs/results_$model
source "$(dirname "$0")/shared.sh"
shared_data "$model"

config=configs/${model%n}/${model}_cpu.yaml
for at in w8a8 w6a6 w4a8 w4a4; do
  # Synthetic images: calibrated and trained.
  experiment "$at" "$config" bits="$at"
  # The published quantizer on the same images: calibrated, and with the published training.
  experiment "${at}_paper_ptq" "$config" bits="$at" quantization=paper training.epochs=0
  experiment "${at}_paper" "$config" bits="$at" quantization=paper training=paper training.epochs=6 training.learning_rate=1e-5
  # Calibration on noise, and on 128 real images (not zero-shot).
  experiment "${at}_noise" "$config" bits="$at" synthesis.source=noise training.epochs=0
  experiment "${at}_real" "$config" bits="$at" "${real[@]}" training.epochs=0
  experiment "${at}_paper_noise" "$config" bits="$at" quantization=paper synthesis.source=noise training.epochs=0
  experiment "${at}_paper_real" "$config" bits="$at" quantization=paper "${real[@]}" training.epochs=0
done

# A tenth of the weights at 8 bits, and their inputs: where a scan of the layers without data says, or the first stages.
experiment w4a8_budget "$config" bits=w4a8 quantization.average_bits=4.4 training.epochs=0
experiment w4a4_budget "$config" bits=w4a4 quantization.average_bits=4.4 training.epochs=0
# The same bits on average, where 5 and 6 may be given too.
experiment w4a8_budget_widths "$config" bits=w4a8 quantization.average_bits=4.4 'quantization.mixed_precision_bits=[5,6,8]' training.epochs=0
experiment w4a4_budget_widths "$config" bits=w4a4 quantization.average_bits=4.4 'quantization.mixed_precision_bits=[5,6,8]' training.epochs=0
experiment w4a4_early "$config" bits=w4a4 'quantization.eight_bit_roles=[early]' training.epochs=0
if [ "$model" = yolo11n ]; then
  # As many weights as the first stages have; 5 bits on average, and 5 bits everywhere.
  experiment w4a4_budget_small "$config" bits=w4a4 quantization.average_bits=4.115 training.epochs=0
  experiment w4a8_budget_5 "$config" bits=w4a8 quantization.average_bits=5 training.epochs=0
  experiment w4a8_budget_5_widths "$config" bits=w4a8 quantization.average_bits=5 'quantization.mixed_precision_bits=[5,6,8]' training.epochs=0
  experiment w5a8 "$config" bits=w5a8 training.epochs=0
fi

# At 640 pixels: full precision, calibrated, and what training made of it at W4A8.
evaluate 640_full "$config" bits=w4a8 evaluation.image_size=640
for at in w8a8 w6a6 w4a8 w4a4; do
  evaluate "640_${at}_ptq" "$config" bits="$at" evaluation.image_size=640 weights="$runs/$at/ptq"
done
evaluate 640_w4a8_trained "$config" bits=w4a8 evaluation.image_size=640 weights="$runs/w4a8"

out=results/$model
[ -z "$smoke" ] || out=$runs/$model
finish --csv "$out.csv" --json "$out.json"
