"""A copy of a detector that rounds its weights and activations, and how its ranges are found without data."""

from common.quantization.calibrate import calibrate
from common.quantization.convert import load_quantized, quantize, save_quantized, saved_plan
from common.quantization.layernorm_fold import fold_norms
from common.quantization.observers import feeds
from common.quantization.policy import LayerPlan, plan_layers
from common.quantization.sensitivity import Sensitivity, check_budget, meet_budget, scan

__all__ = [
    "LayerPlan",
    "Sensitivity",
    "calibrate",
    "check_budget",
    "feeds",
    "fold_norms",
    "load_quantized",
    "meet_budget",
    "plan_layers",
    "quantize",
    "save_quantized",
    "saved_plan",
    "scan",
]
