"""A copy of a detector that rounds its weights and activations, and how its ranges are found without data."""

from common.quantization.calibrate import calibrate
from common.quantization.convert import (
    bits_label,
    load_quantized,
    mean_weight_bits,
    quantize,
    save_quantized,
    saved_plan,
)
from common.quantization.full_placement import with_tensors
from common.quantization.hooks import feeds
from common.quantization.norms import fold_layernorm
from common.quantization.placement import find_placement
from common.quantization.policy import LayerPlan, idle_levels, plan_layers
from common.quantization.sensitivity import Sensitivity, allocate_bits, check_average_bits, scan

__all__ = [
    "LayerPlan",
    "Sensitivity",
    "allocate_bits",
    "bits_label",
    "calibrate",
    "check_average_bits",
    "feeds",
    "find_placement",
    "fold_layernorm",
    "idle_levels",
    "load_quantized",
    "mean_weight_bits",
    "plan_layers",
    "quantize",
    "save_quantized",
    "saved_plan",
    "scan",
    "with_tensors",
]
