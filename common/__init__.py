"""What every detector shares: configuration, synthesis, quantization, distillation, evaluation, reporting."""

import os

# An empty entry means the current directory to every program that is started later, and importing cv2 appends one where
# the variable is not set. /usr/lib is searched anyway.
os.environ["LD_LIBRARY_PATH"] = ":".join(filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":"))) or "/usr/lib"
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime 1.32 counts its users on Linux, too
