"""The numbers of training, epoch by epoch, for TensorBoard and, where asked for, for Weights & Biases."""

import contextlib
import hashlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from common.runtime.environment import is_first
from common.runtime.errors import UserError

Write = Callable[[int, Mapping[str, float]], None]  # epoch, values by name


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
        board = stack.enter_context(SummaryWriter(str(directory / "tensorboard"), purge_step=epoch + 1))

        def write(epoch: int, values: Mapping[str, float]) -> None:
            for name, value in values.items():
                board.add_scalar(name, value, epoch)
            if online is not None:
                online.log(dict(values), step=epoch)

        yield write


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
