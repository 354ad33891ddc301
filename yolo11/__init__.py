"""YOLO11 by Ultralytics, wrapped as a detector of zsqdet."""
