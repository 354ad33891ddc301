"""What the training scripts of the micro Mask R-CNNs share: the command line and the progress of a training run."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from common.runtime.errors import UserError

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
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=description)
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
