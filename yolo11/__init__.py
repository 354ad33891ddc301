"""YOLO11 by Ultralytics, wrapped as a detector of zsqdet."""

EXTRA = "yolo"  # of pyproject.toml: the packages that this family needs
