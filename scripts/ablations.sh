# Sourced by table_ablations.sh and results_ablations.sh after table.sh: the list of what is left out or replaced, once.

# ablations NAME CONFIG KEY=VALUE...: one experiment for each; NAME/WHAT, or NAME/WHAT/$last where `last` is set. The
# arrays `untrained` and `terms` hold settings of those lines that concern images and calibration, and training.
ablations() {
  local at=$1 config=$2 settings=("${@:3}")
  try() { experiment "$at/$1${last:+/$last}" "$config" "${settings[@]}" "${@:2}"; }
  before() { try "$@" ${untrained[@]+"${untrained[@]}"}; }
  training() { try "$@" ${terms[@]+"${terms[@]}"}; }
  try ours
  # Labels: one box, several boxes, both kept as drawn; edited by the detector; those of real images; none at all.
  before labels_one_box synthesis.labels=one_box synthesis.low_resolution_iterations=0
  before labels_multi_box synthesis.labels=multi_box synthesis.low_resolution_iterations=0
  before labels_adaptive_one_box synthesis.labels=one_box
  before labels_scene synthesis.labels=scene synthesis.label_sampling.start=1 synthesis.weights.task=4
  before labels_true synthesis.labels=true_label synthesis.annotations="$train_labels" synthesis.low_resolution_iterations=0
  before images_noise synthesis.source=noise
  before images_statistics_only synthesis.source=batch_norm
  before images_pixels synthesis.image=pixels
  # Loss terms of stage one.
  before loss_without_task synthesis.weights.task=0
  before loss_without_batch_norm synthesis.weights.batch_norm=0 synthesis.weights.first_batch_norm=0
  before loss_without_total_variation synthesis.weights.total_variation=0
  before loss_published synthesis=paper "${published_loss[@]}"
  # Ingredients of calibration: each left out, and then none of them left but one.
  before calibration_even_levels quantization.quantizer=lsq
  before calibration_gptq quantization.rounding=gptq
  before calibration_without_gptq quantization.rounding=nearest
  before calibration_without_batch_norm quantization.batch_norm_correction=false
  before calibration_without_search quantization.scale_init=lsq
  before calibration_without_bars quantization.letterbox_padding=false
  before calibration_search_alone quantization.rounding=nearest quantization.batch_norm_correction=false quantization.letterbox_padding=false
  before calibration_published quantization=paper
  before calibration_published_gptq quantization=paper quantization.rounding=gptq
  before calibration_published_batch_norm quantization=paper quantization.batch_norm_correction=true
  # Terms of training.
  training training_none training.epochs=0
  training training_weights_fixed training.learning_rate=0
  training training_weights_slow training.learning_rate=2e-5
  training training_without_features training.feature_weight=0
  training training_without_logits training.logit_weight=0
  training training_task_only training.logit_weight=0 training.feature_weight=0 training.task_weight=1
  training training_with_task training.task_weight=0.1
  training training_published training=paper "${published_training[@]}"
  # The number of images; calibration sees no more than there are.
  local count
  for count in "${counts[@]}"; do
    before "images_$count" synthesis.num_images="$count" quantization.calibration_images="$count"
  done
}
