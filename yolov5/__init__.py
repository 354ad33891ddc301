"""The original YOLOv5 (anchors, objectness) from its official checkpoints, wrapped as a detector of zsqdet."""

EXTRA = "yolo"  # of pyproject.toml: the packages that this family needs
