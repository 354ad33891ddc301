"""Drawn shapes and the micro detectors; here what the training scripts share: command line, progress, checkpoint."""

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoints.read import save_tensors
from common.runtime.errors import Parser, UserError

TRAIN_SEED = 1  # of the training images; the default of `generate`, 2, gives a disjoint test set
Train = Callable[[Path, int, float | None, Path | None], Path]  # file, steps, minutes, start -> the file


class Progress:
    """Fraction of a training run that is done: of `steps`, or of `minutes` where these are given."""

    def __init__(self, steps: int, minutes: float | None) -> None:
        self.step, self._steps, self._minutes, self._start = 0, steps, minutes, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.perf_counter() - self._start

    @property
    def done(self) -> float:
        """In [0, 1) while training."""
        return self.seconds / (60 * self._minutes) if self._minutes else self.step / self._steps


def main(program: str, description: str, train: Train) -> None:
    """The command line: python -m PROGRAM OUT [--steps N] [--minutes M] [--start FILE]."""
    parser = Parser(prog=f"python -m {program}", description=description)
    parser.add_argument("out", type=Path, help="a new .safetensors file")
    parser.add_argument("--steps", type=int, default=1600, help="batches of 8 (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="train for this time instead of --steps")
    parser.add_argument("--start", type=Path, help="checkpoint of this script to continue from, on new images")
    arguments = parser.parse_args()
    if arguments.out.exists():
        sys.exit(f"error: {arguments.out}: exists; name a new file, or remove it first")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    try:
        path = train(arguments.out, arguments.steps, arguments.minutes, arguments.start)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(path, f"({path.stat().st_size / 1e6:.2f} MB)")


def write_weights(
    path: Path, state: Mapping[str, Tensor], family: str, architecture: Mapping[str, Any], made: Mapping[str, Any]
) -> None:
    """Writes the weights in half precision, with the architecture and the training settings as metadata."""
    half = {name: t.half() if t.is_floating_point() else t for name, t in state.items()}
    training = {"drawn_with_seed": TRAIN_SEED, **made}
    save_tensors(path, half, {"family": family, "architecture": dict(architecture), "training": training})
