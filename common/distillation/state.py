"""What training needs to go on exactly where it was, in one file that is complete or absent."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from common.checkpoints.read import load_tensors, save_tensors
from common.runtime.errors import UserError
from common.runtime.files import sha256

log = logging.getLogger("zsqdet")
FILE = "state.safetensors"


@dataclass
class Progress:
    """How far training is. Epoch 0 is the state before it."""

    epoch: int = 0
    updates: int = 0
    best_epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


def save_state(directory: Path, progress: Progress, parts: dict[str, dict[str, Tensor]]) -> None:
    """Writes the progress and named groups of tensors.

    Raises:
        UserError: the folder cannot be written; what was there before stays.
    """
    tensors = {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}
    save_tensors(directory / FILE, tensors, vars(progress))


def load_state(directory: Path) -> tuple[Progress, dict[str, dict[str, Tensor]]] | None:
    """What `save_state` wrote, or None where there is nothing or a damaged file: then training starts over.

    Raises:
        UserError: the file is whole, but none that `save_state` wrote.
    """
    path = directory / FILE
    if not path.exists():
        return None
    try:
        tensors, description = load_tensors(path)
    except UserError as error:
        sha256(path)  # an OSError where it cannot be read, which is another matter
        log.warning("%s; training starts over", error)
        return None
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = value
    try:
        return Progress(**description), parts
    except TypeError as error:
        raise UserError(f"{path}: not a state of training ({error}); remove it to start over") from error


def take_over(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Loads a state into a module, in place.

    Raises:
        UserError: it is not of this module.
    """
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise UserError(f"{path}: of another detector; remove it to start over") from error
