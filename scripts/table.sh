# Sourced by the scripts of the tables, which are lists of calls of `experiment`. Not a script of its own.
#
# Options of every table:
#   --dry-run       prints the commands and runs nothing
#   --smoke         runs every line at toy size on the CPU, with the micro detector of its family on drawn shapes
#   --only PATTERN  takes the experiments whose name matches, e.g. --only 'yolo11s/w4a8/*'
#   KEY=VALUE       is passed on to every experiment
# COCO names the folder that holds images/ and annotations/ (python -m tools.get_data coco DIR). Results are in
# runs/tables/TABLE. A table can be stopped and started again: finished stages are not repeated. An experiment that fails
# does not stop the others; its name is printed at the end. Several GPUs are used by torchrun, see environment.sh.
set -euo pipefail
COCO=${COCO:+$(realpath -m "$COCO")}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
table=${table:-$(basename "$0" .sh)} table=${table#table_}
dry="" smoke="" only="*" extra=() found=0 made=() failed=()
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry=1 ;;
    --smoke) smoke=1 ;;
    --only) only=${2:-} && shift $(($# > 1)) ;;
    *=*) extra+=("$1") ;;
    *) echo "error: unknown argument '$1'; there are --dry-run, --smoke, --only PATTERN and KEY=VALUE" >&2 && exit 2 ;;
  esac
  shift
done
if [ -z "$dry" ]; then
  if [ -z "$smoke" ]; then
    : "${COCO:?set it to the folder that holds images/ and annotations/ (python -m tools.get_data coco DIR)}"
    for part in images/val2017 annotations; do
      [ -d "$COCO/$part" ] || { echo "error: COCO: $COCO/$part does not exist" >&2 && exit 2; }
    done
  fi
  bash scripts/setup.sh
  source scripts/environment.sh
  trap 'exit 130' INT # and not on with the next experiment
fi
COCO=${COCO:-COCO}
runs=${runs:-runs/tables/$table}
first_2k=runs/data/first_2366 # 2 % of train2017 by name, the "2k" of the published code

# The set that is evaluated on, and real images with their labels.
data=(data.images="$COCO/images/val2017" data.annotations="$COCO/annotations/instances_val2017.json")
train=$COCO/images/train2017 train_labels=$COCO/annotations/instances_train2017.json
real=(synthesis.source=real synthesis.labels=true_label)
real_full=("${real[@]}" synthesis.num_images=118287 synthesis.real_images="$train" synthesis.annotations="$train_labels")
real_2k=("${real[@]}" synthesis.num_images=2366 synthesis.real_images="$first_2k/images" synthesis.annotations="$first_2k/annotations.json")
if [ -n "$smoke" ]; then
  runs=runs/smoke/$table
  shapes=runs/smoke/shapes
  data=(data.images="$shapes/images" data.annotations="$shapes/annotations.json")
  real_full=("${real[@]}" synthesis.real_images="$shapes/images" synthesis.annotations="$shapes/annotations.json")
  real_2k=("${real_full[@]}") train_labels=$shapes/annotations.json
fi
# The baselines: the published quantizer, trained with the detector's own loss alone; 16, since YOLO multiplies it by the batch.
lsq=(quantization=paper training=paper training.task_weight=16 training.logit_weight=0 training.feature_weight=0)
lsq_plus=("${lsq[@]}" quantization.quantizer=lsq+)
# Ours with evenly spaced levels, as the published quantizers have; at 8 bits ours are those.
even=(quantization.quantizer=lsq)
# The fair ones: the same quantizers on the same images with the published distillation.
distilled=(quantization=paper training=paper)
distilled_plus=("${distilled[@]}" quantization.quantizer=lsq+)

# Settings of a toy-sized run. Lines without training stay without.
toy=(device=cpu synthesis.num_images=4 synthesis.image_size=64 synthesis.low_resolution_size=32 synthesis.batch_size=2
  synthesis.iterations=2 synthesis.low_resolution_iterations=4 synthesis.label_sampling.every=2 synthesis.directory=runs/smoke/synthetic
  quantization.calibration_images=4 quantization.calibration_batch_size=2 training.batch_size=2
  evaluation.image_size=64 evaluation.batch_size=4 evaluation.directory=runs/smoke/measured)

# bits W A: the settings of a bit-width.
bits() { echo "bits=w$1a$2"; }

# experiment NAME CONFIG KEY=VALUE...: one cell of the table.
experiment() {
  local name=$1 config=$2 verb=${verb:-run} words
  shift 2
  # shellcheck disable=SC2053
  [[ $name == $only ]] || return 0
  found=$((found + 1))
  words=("${data[@]}" "$@" ${extra[@]+"${extra[@]}"})
  if [ "$verb" = run ]; then words+=(run_dir="$runs/$name"); else words+=(--json "$runs/$name.json"); fi
  if [ -n "$smoke" ]; then
    local family
    family=$(basename "$(dirname "$config")")
    config=configs/$family/micro_$family.yaml
    if [ ! -f "$config" ]; then
      echo "skipped $name: family $family has no micro detector" >&2
      return 0
    fi
    words+=("${toy[@]}")
    [[ " $* " == *" training.epochs=0 "* ]] || words+=(training.epochs=1)
  fi
  if [ -n "$dry" ]; then
    printf 'zsqdet %s %s' "$verb" "$config"
    printf ' %q' "${words[@]}"
    echo
    return 0
  fi
  prepare "${words[@]}"
  [ -z "$smoke" ] || fresh "$runs/$name" "${words[@]}"
  echo "== $table: $name"
  local status=0
  [ "$verb" = evaluate ] && [ -f "$runs/$name.json" ] || zsqdet "$verb" "$config" "${words[@]}" || status=$?
  [ $status -ne 130 ] || exit 130
  if [ $status -ne 0 ]; then failed+=("$name"); elif [ "$verb" = run ]; then made+=("$runs/$name"); fi
}

# two_stage NAME CONFIG KEY=VALUE...: the rows of a two-stage detector at one bit-width. The published ones, and ours.
two_stage() {
  local at=$1 config=$2 settings=("${@:3}")
  experiment "$at/lsq_full" "$config" "${settings[@]}" "${real_full[@]}" "${lsq[@]}"
  experiment "$at/lsq_2k" "$config" "${settings[@]}" "${real_2k[@]}" "${lsq[@]}"
  experiment "$at/ours_published" "$config" "${settings[@]}" preset=paper
  experiment "$at/ours" "$config" "${settings[@]}"
  [[ $at == *w8a8 ]] || experiment "$at/ours_even" "$config" "${settings[@]}" "${even[@]}"
  experiment "$at/lsq_full_distilled" "$config" "${settings[@]}" "${real_full[@]}" "${distilled[@]}"
  experiment "$at/lsq_2k_distilled" "$config" "${settings[@]}" "${real_2k[@]}" "${distilled[@]}"
  experiment "$at/real_2k" "$config" "${settings[@]}" "${real_2k[@]}"
  experiment "$at/ptq_noise" "$config" "${settings[@]}" synthesis.source=noise training.epochs=0
}

# evaluate NAME CONFIG weights=FILE KEY=VALUE...: the AP of one checkpoint, into NAME.json.
evaluate() { verb=evaluate experiment "$@"; }

# fresh FOLDER WORD...: forgets a smoke run of other settings, or of a version with other defaults or detectors.
fresh() {
  local from=$1.from now
  now=$(printf '%s\n' "$@" | cat - common/config/schema.py common/config/presets.py configs/*/micro* tools/shapes/*.safetensors | sha256sum)
  [ "$(cat "$from" 2>/dev/null)" = "$now" ] || rm -rf "$1" "$1.json"
  mkdir -p "$(dirname "$from")"
  echo "$now" >"$from"
}

# Makes the data that a line needs and that can be made here.
prepare() {
  if [ -n "$smoke" ] && [ ! -f "$shapes/annotations.json" ]; then
    rm -rf "$shapes"
    python -m tools.shapes.generate "$shapes" --images 8
  fi
  if [[ " $* " == *"$first_2k"* ]] && [ ! -f "$first_2k/annotations.json" ]; then
    python -m tools.subset "$COCO/annotations/instances_train2017.json" "$COCO/images/train2017" "$first_2k" --count 2366
  fi
}

# finish [OPTION...]: the table of what is there, beside the paper's numbers or with other options, and what failed.
finish() {
  [ $found -gt 0 ] || { echo "error: --only: no line of this table is called '$only'; --dry-run shows them all" >&2 && exit 2; }
  [ -z "$dry" ] || return 0
  local options=("$@")
  [ $# -gt 0 ] || options=(--paper "$table" --csv "$runs/table.csv" --json "$runs/table.json")
  if [ ${#made[@]} -gt 0 ]; then python -m tools.collect_results "${made[@]}" "${options[@]}"; fi
  if [ ${#failed[@]} -gt 0 ]; then
    echo "error: failed: ${failed[*]}" >&2
    exit 1
  fi
}
