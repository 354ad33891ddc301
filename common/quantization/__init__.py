"""A copy of a detector that rounds its weights and activations, and how its ranges are found without data."""

from common.quantization.calibrate import calibrate
from common.quantization.convert import load_quantized, quantize, save_quantized
from common.quantization.policy import LayerPlan, plan_layers

__all__ = ["LayerPlan", "calibrate", "load_quantized", "plan_layers", "quantize", "save_quantized"]
