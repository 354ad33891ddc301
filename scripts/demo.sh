#!/usr/bin/env bash
# The whole job on a micro detector and drawn shapes, in minutes on two CPU cores: images out of the detector, W4A8 and W4A4
# by calibration and by training, mAP on held-out shapes, a report. Can be stopped and started again.
# Usage: bash scripts/demo.sh [yolo11|yolov5|resnet|vit]      (resnet, vit: boxes and masks)
set -euo pipefail
[[ " $* " != *" --help "* ]] || { sed -n '2,4s/^# //p' "$0" && exit; }
settings=()
case "${1:-yolo11}" in
  yolo11) config=configs/yolo11/micro_yolo11.yaml ;;
  yolov5) config=configs/yolov5/micro_yolov5.yaml ;;
  resnet) config=configs/resnet/micro_resnet.yaml settings=(synthesis.num_images=32) ;; # half of them, for half of the time
  vit) config=configs/vit/micro_vit.yaml ;;
  *) echo "error: no demo for '$1'; there is one for yolo11, yolov5, resnet and vit" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/.."
bash scripts/setup.sh
source scripts/environment.sh
[ -f runs/shapes/annotations.json ] || { rm -rf runs/shapes && python -m tools.shapes.generate runs/shapes --images 200; }

# As published: a scale for each tensor from one batch, calibration only.
published=(quantization=paper training.epochs=0)
run=runs/$(basename "$config" .yaml)
for bits in w4a8 w4a4; do
  zsqdet run "$config" bits=$bits ${settings[@]+"${settings[@]}"} "${published[@]}" run_dir="${run}_${bits}_paper_ptq"
  # Ours: calibration (the column PTQ) and training on the same synthetic images.
  zsqdet run "$config" bits=$bits ${settings[@]+"${settings[@]}"} run_dir="${run}_$bits"
done

echo
echo "mAP50-95 on 200 drawn images that the detector was not trained on; training saw synthetic images only"
python -m tools.experiments collect "${run}_w4a8_paper_ptq" "${run}_w4a4_paper_ptq" "${run}_w4a8" "${run}_w4a4"
echo
echo "open ${run}_w4a4/report.html to see the images, the losses and every layer"
