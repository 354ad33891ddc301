"""What training writes: its state, to go on exactly where it was, and its numbers, for TensorBoard and the like."""

import contextlib
import hashlib
import importlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from common.checkpoints.read import load_tensors, save_tensors
from common.checkpoints.strict_json import Strict, checked
from common.runtime.environment import is_first
from common.runtime.errors import UserError
from common.runtime.files import sha256

log = logging.getLogger("zsqdet")
FILE = "state.safetensors"

Write = Callable[[int, Mapping[str, float]], None]  # epoch, values by name


@dataclass
class Progress:
    """How far training is. Epoch 0 is the state before it."""

    epoch: int = 0
    updates: int = 0
    best_epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


class _Saved(Strict):
    """A `Progress` as it is in a file."""

    epoch: int = Field(ge=0)
    updates: int = Field(ge=0)
    best_epoch: int = Field(ge=0)
    history: list[dict[str, int | float]]

    @model_validator(mode="after")
    def _fits(self) -> "_Saved":
        if not self.history or any(row.get("epoch") != number for number, row in enumerate(self.history)):
            raise ValueError("its history has a row for each epoch from 0 on")
        if not self.best_epoch <= self.epoch == len(self.history) - 1:
            raise ValueError("its epochs are those of its history")
        return self


def save_state(directory: Path, progress: Progress, parts: dict[str, dict[str, Tensor]]) -> None:
    """Writes the progress and named groups of tensors.

    Raises:
        UserError: the folder cannot be written; what was there before stays.
    """
    tensors = {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}
    save_tensors(directory / FILE, tensors, vars(progress))


def load_state(directory: Path) -> tuple[Progress, dict[str, dict[str, Tensor]]] | None:
    """What `save_state` wrote, or None where there is nothing or a damaged file: then training starts over."""
    path = directory / FILE
    if not path.exists():
        return None
    try:
        tensors, description = load_tensors(path)
        checked(_Saved, description, f"{path}: not a state of training")
        broken = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
        if broken:
            raise UserError(f"{path}: {broken[0]} holds NaN or infinity")
    except UserError as error:
        sha256(path)  # an OSError where it cannot be read, which is another matter
        log.warning("%s; training starts over", error)
        return None
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = value
    return Progress(**description), parts


def take_over(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Loads a state into a module, in place.

    Raises:
        UserError: it is not of this module.
    """
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise UserError(f"{path}: of another detector; remove it to start over") from error


def check_wandb(project: str | None) -> None:
    """Raises:
    UserError: a project is named, and the package is not installed.
    """
    if project and not find_spec("wandb"):
        raise UserError(
            f"training.wandb: found {project!r}, but the package wandb is not installed; "
            "install it (pip install wandb) or leave the key out"
        )


@contextlib.contextmanager
def scalars(directory: Path, epoch: int, project: str | None) -> Iterator[Write]:
    """Gives a function that writes the values of an epoch.

    Args:
        directory: TensorBoard's events go to `tensorboard` in it; Weights & Biases knows the run by this path, so that
            interrupted training goes on in the same one.
        epoch: the last finished one; what was written after it, before an interruption, is dropped.
        project: of Weights & Biases, or None.

    Raises:
        UserError: Weights & Biases cannot be reached, or does not know who asks.
    """
    with contextlib.ExitStack() as stack:
        if not is_first():
            yield lambda epoch, values: None
            return
        online = None
        if project:  # first, since a failure must leave no events behind
            online = _online(project, directory)
            stack.callback(online.finish)
        stack.enter_context(_quiet_threads())
        board = stack.enter_context(SummaryWriter(str(directory / "tensorboard"), purge_step=epoch + 1))

        def write(epoch: int, values: Mapping[str, float]) -> None:
            for name, value in values.items():
                board.add_scalar(name, value, epoch)
            if online is not None:
                online.log(dict(values), step=epoch)

        yield write


@contextlib.contextmanager
def _quiet_threads() -> Iterator[None]:
    """TensorBoard's thread says nothing of a full disk or a removed folder: `add_scalar` raises it where it is told."""
    before = threading.excepthook

    def hook(found: threading.ExceptHookArgs) -> None:
        if not isinstance(found.exc_value, OSError):
            before(found)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def _online(project: str, directory: Path) -> Any:
    check_wandb(project)
    wandb = importlib.import_module("wandb")
    own = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:12]
    try:
        return wandb.init(project=project, name=directory.parent.name, id=own, resume="allow", dir=str(directory))
    except wandb.Error as error:
        raise UserError(
            f"training.wandb: {' '.join(str(error).split())}; run `wandb login`, set WANDB_MODE=offline, or leave the "
            "key out; what is finished is kept"
        ) from error
