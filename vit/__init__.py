"""Mask R-CNN with a Swin Transformer, of mmdet."""
