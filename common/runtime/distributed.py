"""Several processes that do one experiment together.

Those of `zsqdet run CONFIG --gpus N`, see `common.runtime.launch`, run the same program on one machine. Each makes some
batches of stage one, has some images of every step of the training and some batches of the evaluation; the first one
writes. Without a launcher there is one, and nothing that waits for the others does anything.

On a CPU `in_workers` has a process on each core for work that falls into parts.
"""

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from common.runtime.environment import count, freed_memory_kept, index, is_first
from common.runtime.errors import UserError
from common.runtime.signals import die_with, interruptible

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


def in_workers(
    work: Callable[[Any, Callable[[Any], None]], None], parts: Sequence[Any], threads: int | None
) -> Iterator[Any]:
    """Does each part of some work in a process of its own, all at the same time; gives what they tell, as it comes.

    Two processes of one thread do twice as much as one of two: the layers of a small network are done before a second
    thread is awake, and threads of Python wait for one another between them.

    Args:
        work: of a module; called with a part and a function that tells something.
        parts: what pickle can take.
        threads: of torch, in each process; None for as many as torch takes.

    Raises:
        UserError: the first mistake that one of them meets, or the system ended it. The others are ended.
    """
    context, started = multiprocessing.get_context("spawn"), []
    try:
        for part in parts:
            here, there = context.Pipe(duplex=False)
            # As bytes, since torch would pass tensors through shared memory, of which containers have little.
            arguments = (pickle.dumps((work, part)), threads, os.getpid(), there)
            started.append((context.Process(target=_begin, args=arguments, daemon=True), here))
            with _starting():
                started[-1][0].start()
            there.close()
        running: dict[Any, Any] = {here: process for process, here in started}
        while running:
            ready: list[Any] = wait(list(running))
            for here in ready:
                try:
                    told = here.recv()
                except EOFError:
                    _check_end(running.pop(here))
                    continue
                if isinstance(told, Exception):
                    raise told
                yield told
    finally:
        for process, here in started:
            if process.pid is not None:
                process.kill()  # files are complete or absent at any time
                process.join()
            here.close()


def _begin(pickled: bytes, threads: int | None, parent: int, there: Connection) -> None:
    """The whole life of a worker."""
    die_with(parent)
    torch.set_num_threads(threads or torch.get_num_threads())
    work, part = pickle.loads(pickled)
    try:
        with freed_memory_kept():
            work(part, there.send)
    except (UserError, OSError) as error:
        there.send(error)


def _check_end(process: Any) -> None:
    process.join()
    if process.exitcode < 0:
        name = signal.Signals(-process.exitcode).name
        often = ", often for lack of memory; OMP_NUM_THREADS=1 has one process" if name == "SIGKILL" else ""
        raise UserError(f"a worker was ended by {name}{often}; rerun the same command to resume")
    if process.exitcode:
        raise RuntimeError(f"a worker ended with exit code {process.exitcode}; its traceback is above")


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    """Inside, new processes do not import the script that runs, which might start everything once more, and they do not
    see Ctrl-C, which reaches all of them: the first process ends the others."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    script, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
