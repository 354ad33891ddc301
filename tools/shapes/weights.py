"""How the weights of the micro detectors are stored, and which drawn images they may be trained on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from common.checkpoints.read import save_tensors

TRAIN_SEED = 1  # the generator's default, 2, is for images that the detectors never saw


def write_weights(
    path: Path, state: Mapping[str, Tensor], family: str, architecture: Mapping[str, Any], made: Mapping[str, Any]
) -> None:
    """Writes a detector in half precision, with its architecture and with how it was made."""
    half = {name: t.half() if t.is_floating_point() else t for name, t in state.items()}
    training = {"drawn_with_seed": TRAIN_SEED, **made}
    save_tensors(path, half, {"family": family, "architecture": dict(architecture), "training": training})
