# Sourced by table_ablations.sh and results_ablations.sh after table.sh: the list of what is left out or replaced, once.

# ablations NAME CONFIG KEY=VALUE...: one experiment for each; NAME/WHAT, or NAME/WHAT/$last where `last` is set.
ablations() {
  local at=$1 config=$2 settings=("${@:3}")
  try() { experiment "$at/$1${last:+/$last}" "$config" "${settings[@]}" "${@:2}"; }
  try ours
  # Labels: one box, several boxes, both kept as drawn; edited by the detector; those of real images; none at all.
  try labels_one_box synthesis.labels=one_box synthesis.low_resolution_iterations=0
  try labels_multi_box synthesis.labels=multi_box synthesis.low_resolution_iterations=0
  try labels_adaptive_one_box synthesis.labels=one_box
  try labels_true synthesis.labels=true_label synthesis.annotations="$train_labels" synthesis.low_resolution_iterations=0
  try images_noise synthesis.source=noise
  try images_statistics_only synthesis.source=batch_norm
  try images_pixels synthesis.image=pixels
  # Loss terms of stage one.
  try loss_without_task synthesis.weights.task=0
  try loss_without_batch_norm synthesis.weights.batch_norm=0 synthesis.weights.first_batch_norm=0
  try loss_without_total_variation synthesis.weights.total_variation=0
  try loss_published synthesis=paper "${published_loss[@]}"
  # Ingredients of calibration.
  try calibration_without_gptq quantization.rounding=nearest
  try calibration_without_batch_norm quantization.batch_norm_correction=false
  try calibration_without_search quantization.initial_step=lsq
  try calibration_without_bars quantization.borders=false
  try calibration_published quantization=paper
  # Terms of training.
  try training_none training.epochs=0
  try training_weights_fixed training.learning_rate=0
  try training_weights_slow training.learning_rate=2e-5
  try training_without_features training.feature_weight=0
  try training_without_logits training.logit_weight=0
  try training_task_only training.logit_weight=0 training.feature_weight=0 training.task_weight=1
  try training_with_task training.task_weight=0.1
  try training_published training=paper "${published_training[@]}"
  # The number of images; calibration sees no more than there are.
  local count
  for count in "${counts[@]}"; do
    try "images_$count" synthesis.num_images="$count"
  done
}
