#!/usr/bin/env bash
# The whole job on a micro detector and drawn shapes: images out of the detector, W4A8 and W4A4 calibrated and trained on
# them, mAP on other drawn shapes, a report. Under four minutes on two CPU cores for yolo11. Can be stopped and started again.
# Usage: bash scripts/demo.sh [yolo11|yolov5|resnet|vit]      (resnet, vit: boxes and masks)
set -euo pipefail
family=${1:-yolo11}
# Fewer images and epochs than the configuration has: for the time, not for the result.
less=(synthesis.num_images=32 training.epochs=6)
case $family in
  -h | --help) sed -n '2,4s/^# //p' "$0" && exit ;;
  yolo11) config=configs/yolo11/micro_yolo11.yaml extra=yolo ;;
  yolov5) config=configs/yolov5/micro_yolov5.yaml extra=yolo ;;
  resnet) config=configs/resnet/micro_resnet.yaml extra=resnet ;;
  vit) config=configs/vit/micro_vit.yaml extra=vit less=() ;;
  *) echo "error: no demo for '$family'; there is one for yolo11, yolov5, resnet and vit" >&2 && exit 2 ;;
esac
cd "$(dirname "$0")/.."
bash scripts/setup.sh $extra
source scripts/environment.sh
drawn=runs/demo/shapes
[ -f $drawn/annotations.json ] || { rm -rf $drawn && python -m tools.shapes.generate $drawn --images 120; }

# As published, before training: a scale for each tensor from one batch.
published=(quantization=paper training.epochs=0)
less+=(data.images=$drawn/images data.annotations=$drawn/annotations.json)
for bits in w4a8 w4a4; do
  run=runs/demo/${family}_$bits
  zsqdet run $config bits=$bits "${less[@]}" "${published[@]}" run_dir="${run}_published"
  zsqdet run $config bits=$bits "${less[@]}" run_dir="$run"
done

python - "$family" <<'TABLE'
import json, sys

def ap(run, row, mask=False):
    rows = json.load(open(f"runs/demo/{sys.argv[1]}_{run}/results.json"))["rows"]
    found = next(r for r in rows if r["name"] == row)
    return f"{found['segm']['AP'] if mask else found['AP']:.3f}"

print("\nmAP on 120 drawn images that nothing was trained on; calibration and training saw synthetic images only\n")
has_masks = "segm" in json.load(open(f"runs/demo/{sys.argv[1]}_w4a4/results.json"))["rows"][0]
for mask in (False, True)[: 1 + has_masks]:
    print(f"{'masks' if mask else 'boxes':<8}{'full precision':>16}{'as published':>16}{'calibrated':>16}{'trained':>16}")
    for bits in ("w4a8", "w4a4"):
        found = [ap(bits, "full precision", mask), ap(f"{bits}_published", "ptq", mask), ap(bits, "ptq", mask)]
        print(f"{bits.upper():<8}", *(f"{value:>15}" for value in (*found, ap(bits, "trained", mask))))
print("\nas published: the paper's initialisation before its training")
print(f"open runs/demo/{sys.argv[1]}_w4a4/report.html to see the images, the losses and every layer")
TABLE
