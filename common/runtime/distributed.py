"""Several processes that do one experiment together: `zsqdet run CONFIG --gpus N`, see `common.runtime.launch`.

All of them run the same program on one machine. Each makes some batches of stage one, has some images of every step of
the training and some batches of the evaluation; the first one writes. Without a launcher there is one, and nothing here
does anything.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from common.runtime.environment import count, index, is_first
from common.runtime.signals import interruptible

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # for one another; torchrun ends all of them when one fails, so this is no guard
SHORT_PATIENCE = timedelta(seconds=5)  # for torchrun's own table, which is there as long as torchrun is


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the other processes, and leaves them at the end. After an error the launcher ends them all."""
    if count() == 1:
        with interruptible():
            yield
        return
    if not is_first():
        logging.getLogger("zsqdet").setLevel(logging.ERROR)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    yield
    barrier()
    dist.destroy_process_group()


def shard(items: Sequence[T]) -> list[T]:
    """The part of the items that this process has: every n-th of them."""
    return list(items[index() :: count()])


def rank_zero(make: Callable[[], T]) -> T:
    """What `make` gives in the first process; the others wait for it and call nothing."""
    if count() == 1:
        return make()
    box: list[Any] = [make() if is_first() else None]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


def is_first_to_fail() -> bool:
    """Whether no other process has asked this before; works also before they have joined and when some are gone."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return dist.TCPStore(address, port, is_master=False, timeout=SHORT_PATIENCE).add("zsqdet/failed", 1) == 1
    except RuntimeError:  # nobody to ask: better twice than never
        return True


def is_lost_peer(error: BaseException) -> bool:
    """Whether it is what a collective raises when another process is gone; the launcher says why that is."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def barrier() -> None:
    """Goes on when all processes are here."""
    if count() > 1:
        dist.all_reduce(torch.zeros(1))


def gather(items: list[T]) -> list[T]:
    """The items of all processes, one process after the other."""
    if count() == 1:
        return items
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, items)
    return [item for part in found for item in part]


def gather_to_rank_zero(items: list[T]) -> list[T]:
    """The items of all processes, one process after the other, on rank zero; the others get none."""
    if count() == 1:
        return items
    found: list[Any] | None = [None] * count() if is_first() else None
    dist.gather_object(items, found)
    return [item for part in found or [] for item in part]


def all_reduce(tensors: Sequence[Tensor]) -> None:
    """Replaces each tensor, in place, by its sum over all processes. All are of one type, on one device."""
    if count() == 1 or not tensors:
        return
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.detach().copy_(part.view(tensor.shape))
