"""Training of a quantized detector to do what its full-precision original does."""
