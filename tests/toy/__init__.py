"""A detector small enough to run every stage in seconds, and what workers do in tests.

Each worker imports this, so that it imports little.
"""

import os
import signal
import time

import torch

from common.runtime.distributed import in_workers
from common.runtime.errors import UserError


def work(part, tell):
    kind, folder = part
    (folder / f"{os.getpid()}.pid").touch()
    if kind == "mistake":
        raise UserError("a mistake")
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "forever":
        tell("here")
        time.sleep(1000)
    tell(torch.get_num_threads())


def told_by(folder):
    """What two workers tell."""
    return list(in_workers(work, [("plain", folder), ("plain", folder)], 1))
