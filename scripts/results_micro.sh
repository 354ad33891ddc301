#!/usr/bin/env bash
# A micro Mask R-CNN, with ResNet or Swin, on 200 drawn images: AP of boxes and masks at four bit-widths, by the published
# quantizer's calibration, by ours and by training, all on the same synthetic images, and three of them again with another
# seed. Hours on one core.
# Usage: bash scripts/results_micro.sh resnet|vit [KEY=VALUE ...]
source "$(dirname "$0")/help.sh"
set -euo pipefail
family=${1:-}
case "$family" in
  resnet) config=configs/resnet/micro_resnet unrounded=first,late,head,output,product ;;
  vit) config=configs/vit/micro_vit unrounded=late,head,output,product ;;
  *) echo "error: found '$family' for the detector; give resnet or vit" >&2; exit 2 ;;
esac
shift
source "$(dirname "$0")/shapes.sh"

runs=runs/micro_$family
published=(quantization=paper training.epochs=0)
zsqdet run "$config.yaml" bits=w4a4 run_dir="$runs/w4a4" "$@"
zsqdet run "$config.yaml" bits=w4a4 "${published[@]}" run_dir="$runs/w4a4_paper" "$@"
zsqdet run "$config.yaml" bits=w4a8 run_dir="$runs/w4a8" "$@"
zsqdet run "$config.yaml" bits=w4a8 "${published[@]}" run_dir="$runs/w4a8_paper" "$@"
zsqdet run "$config.yaml" bits=w6a6 run_dir="$runs/w6a6" "$@"
zsqdet run "$config.yaml" bits=w6a6 "${published[@]}" run_dir="$runs/w6a6_paper" "$@"
zsqdet run "$config.yaml" bits=w8a8 run_dir="$runs/w8a8" "$@"
zsqdet run "$config.yaml" bits=w8a8 "${published[@]}" run_dir="$runs/w8a8_paper" "$@"
# Ours with no layer at other bits, heads included.
for bits in w6a6 w4a8 w4a4; do
  zsqdet run "$config.yaml" bits="$bits" 'quantization.eight_bit_roles=[]' run_dir="$runs/${bits}_uniform" "$@"
done
# Ours with those layers in float that the published quantizer leaves there.
zsqdet run "$config.yaml" bits=w4a8 "quantization.float_roles=[$unrounded]" 'quantization.eight_bit_roles=[]' run_dir="$runs/w4a8_same_layers" "$@"
zsqdet run "$config.yaml" bits=w4a4 "quantization.float_roles=[$unrounded]" 'quantization.eight_bit_roles=[]' run_dir="$runs/w4a4_same_layers" "$@"

# A second seed: other images, and what follows from them.
for bits in w6a6 w4a8 w4a4; do
  zsqdet run "$config.yaml" bits="$bits" seed=1 run_dir="$runs/seed1/$bits" "$@"
  zsqdet run "$config.yaml" bits="$bits" "${published[@]}" seed=1 run_dir="$runs/seed1/${bits}_paper" "$@"
done
# Both seeds on 1000 other drawn images.
many=runs/shapes_1000 measured="results/${family}_micro_1000"
[ -f "$many/annotations.json" ] || { rm -rf "$many" && python -m tools.shapes.generate "$many" --images 1000 --seed 3; }
measure() {
  [ -f "$measured/$1.json" ] ||
    zsqdet evaluate "$config.yaml" weights="$2" data.images="$many/images" data.annotations="$many/annotations.json" --json "$measured/$1.json"
}
measure full "$(sed -n 's/^weights: //p' "$config.yaml")"
for row in {w6a6,w4a8,w4a4}{,_paper}; do
  measure "${row}_seed0" "$runs/$row"
  measure "${row}_seed1" "$runs/seed1/$row"
done
# W8A8 loses so little that it takes 4000 images to see it; calibrated, since training keeps that there.
many=runs/shapes_4000
[ -f "$many/annotations.json" ] || { rm -rf "$many" && python -m tools.shapes.generate "$many" --images 4000 --seed 4; }
on_many=(training.epochs=0 data.images="$many/images" data.annotations="$many/annotations.json")
zsqdet run "$config.yaml" bits=w8a8 "${published[@]}" "${on_many[@]}" run_dir="$runs/w8a8_paper_4000" "$@"
zsqdet run "$config.yaml" bits=w8a8 "${on_many[@]}" run_dir="$runs/w8a8_4000" "$@"
python -m tools.compare_ap "$runs"/w8a8{_paper,}_4000 --json "results/${family}_micro_4000.json"

python -m tools.collect_results "$runs"/{w8a8,w6a6,w4a8,w4a4}{,_paper} "$runs"/{w6a6,w4a8,w4a4}_uniform --csv "results/${family}_micro.csv" --json "results/${family}_micro.json"
python -m tools.collect_results "$runs"/{w4a8,w4a4}_same_layers --csv "results/${family}_same_layers.csv" --json "results/${family}_same_layers.json"
python -m tools.collect_results "$runs"/seed1/{w6a6,w4a8,w4a4}{,_paper} --csv "results/${family}_micro_seed1.csv" --json "results/${family}_micro_seed1.json"
