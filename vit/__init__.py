"""Mask R-CNN with a Swin Transformer, of mmdet."""

EXTRA = "vit"  # of pyproject.toml: the packages that this family needs
