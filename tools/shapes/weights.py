"""Checkpoints of the micro detectors, and the command line of their training scripts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from common.checkpoints.read import save_tensors

TRAIN_SEED = 1  # of the training images; the default of `generate`, 2, gives a disjoint test set


def write_weights(
    path: Path, state: Mapping[str, Tensor], family: str, architecture: Mapping[str, Any], made: Mapping[str, Any]
) -> None:
    """Writes the weights in half precision, with the architecture and the training settings as metadata."""
    half = {name: t.half() if t.is_floating_point() else t for name, t in state.items()}
    training = {"drawn_with_seed": TRAIN_SEED, **made}
    save_tensors(path, half, {"family": family, "architecture": dict(architecture), "training": training})
