"""The trained detector as a folder for a runtime: an ONNX graph in 8 bits, and what checks and times it."""
