"""What every detector shares: configuration, synthesis, quantization, distillation, evaluation, reporting."""
