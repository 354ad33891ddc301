"""How good a detector is on a set in COCO format."""
