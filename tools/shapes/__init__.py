"""A synthetic dataset of drawn shapes in COCO format, and micro detectors trained on it, for demo and tests."""
