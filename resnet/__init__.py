"""Mask R-CNN and Faster R-CNN of torchvision."""

EXTRA = "resnet"  # of pyproject.toml: the packages that this family needs
