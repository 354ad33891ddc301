"""The original YOLOv5 (anchors, objectness) from its official checkpoints, wrapped as a detector of zsqdet."""
