"""Self-contained HTML reports of runs, comparisons, and images with detections."""
