#!/usr/bin/env bash
# The whole job on a micro detector and drawn shapes, in minutes on two CPU cores: images out of the detector, W4A8 and W4A4
# by calibration and by training, mAP on held-out shapes, a report. Can be stopped and started again.
# Usage: bash scripts/demo.sh [yolo11|yolov5|resnet|vit]      (resnet, vit: boxes and masks)
source "$(dirname "$0")/help.sh"
set -euo pipefail
columns=run,bits,quantizer,images,FP,PTQ,trained
settings=()
case "${1:-yolo11}" in
  yolo11) config=configs/yolo11/micro_yolo11 ;;
  yolov5) config=configs/yolov5/micro_yolov5 ;;
  # Half of the images that results_micro.sh makes, for half of the time.
  resnet) config=configs/resnet/micro_resnet columns+=",FP masks,PTQ masks,trained masks" settings=(synthesis.num_images=32) ;;
  vit) config=configs/vit/micro_vit columns+=",FP masks,PTQ masks,trained masks" ;;
  *) echo "error: no demo for '$1'; there is one for yolo11, yolov5, resnet and vit" >&2; exit 2 ;;
esac
run=runs/$(basename "$config")
source "$(dirname "$0")/shapes.sh"

# As published: a step size for each tensor from one batch, calibration only.
published=(quantization=paper training.epochs=0)
zsqdet run "$config.yaml" bits=w4a8 ${settings[@]+"${settings[@]}"} "${published[@]}" run_dir="${run}_w4a8_paper_ptq"
zsqdet run "$config.yaml" bits=w4a4 ${settings[@]+"${settings[@]}"} "${published[@]}" run_dir="${run}_w4a4_paper_ptq"
# Ours: calibration (the row PTQ) and training on the same synthetic images.
zsqdet run "$config.yaml" bits=w4a8 ${settings[@]+"${settings[@]}"}
zsqdet run "$config.yaml" bits=w4a4 ${settings[@]+"${settings[@]}"}

echo
echo "mAP50-95 on 200 drawn images that the detector was not trained on; training saw synthetic images only"
python -m tools.collect_results "${run}_w4a8_paper_ptq" "${run}_w4a4_paper_ptq" "${run}_w4a8" "${run}_w4a4" \
  --columns "$columns,seconds"
echo
echo "open ${run}_w4a4/report.html to see the images, the losses and every layer"
