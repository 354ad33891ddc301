# Sourced by results.sh and results_ablations.sh: a table (table.sh) on the images and detectors of the shared folder.
[[ " $* " == *" --smoke "* || " $* " == *" --dry-run "* ]] ||
  : "${ZSQDET_SHARED:?set it to the folder that holds coco/ and weights/}"
ZSQDET_SHARED=$(realpath -m "${ZSQDET_SHARED:-shared}")
COCO=$ZSQDET_SHARED/coco
source "$(dirname "${BASH_SOURCE[0]}")/table.sh"

# shared_data DETECTOR: its weights, the 800 images it is evaluated on, and 128 others, which have no labels.
shared_data() {
  if [ -n "$smoke" ]; then
    real=("${real_full[@]}" quantization.letterbox_padding=false)
    return 0
  fi
  train_labels=$COCO/annotations/instances_val2017_subset.json # for labels_true: those of the images it is evaluated on
  data=(weights="$ZSQDET_SHARED/weights/$1.pt" data.images="$COCO/images/val2017" data.annotations="$train_labels")
  real=(synthesis.source=real synthesis.real_images="$COCO/images/train2017_128" synthesis.num_images=128 quantization.letterbox_padding=false)
}
