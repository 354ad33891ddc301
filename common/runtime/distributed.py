"""Several processes that do one experiment together.

Those of `zsqdet run CONFIG --gpus N`, see `common.runtime.launch`, run the same program on one machine. Each makes some
batches of stage one, has some images of every step of the training and some batches of the evaluation; the first one
writes. Without a launcher there is one, and nothing that waits for the others does anything.

On a CPU `in_workers` has a process on each core for work that falls into parts.
"""

import contextlib
import logging
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from common.runtime.environment import count, freed_memory_kept, index, is_first
from common.runtime.errors import UserError
from common.runtime.signals import interruptible

T = TypeVar("T")
# It ends with its parent before anything takes time, and has read everything before it imports torch.
WORKER = """
import sys
place, threads, parent, *sys.path[:] = sys.argv[1:]
from common.runtime.signals import die_with
die_with(int(parent))
pickled = sys.stdin.buffer.read()
from common.runtime.distributed import do_part
do_part(pickled, int(place), int(threads))
"""
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
    started: list[tuple[subprocess.Popen[bytes], Any]] = []
    try:
        for _ in parts:
            here, there = Pipe(duplex=False)
            given = (str(there.fileno()), str(threads or 0), str(os.getpid()), *(path for path in sys.path if path))
            # Without the current directory on its path (-P), and in a group of its own, which Ctrl-C does not reach.
            command, fds = [sys.executable, "-P", "-c", WORKER, *given], (there.fileno(),)
            process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=fds, process_group=0)
            started.append((process, here))
            there.close()
        for (process, _), part in zip(started, parts, strict=True):
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin:  # one that is gone is noticed below
                process.stdin.write(pickle.dumps((work, part)))
        running: dict[Any, subprocess.Popen[bytes]] = {here: process for process, here in started}
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
            process.kill()  # files are complete or absent at any time
            process.wait()
            here.close()


def do_part(pickled: bytes, place: int, threads: int) -> None:
    """What a worker does with what it was sent; tells it through the pipe with the number `place`."""
    there: Any = Connection(place, readable=False)
    torch.set_num_threads(threads or torch.get_num_threads())
    work, part = pickle.loads(pickled)
    try:
        with freed_memory_kept():
            work(part, there.send)
    except (UserError, OSError) as error:
        with contextlib.suppress(BrokenPipeError):  # nobody is there any more
            there.send(error)


def _check_end(process: "subprocess.Popen[bytes]") -> None:
    code = process.wait()
    if code < 0:
        name = signal.Signals(-code).name
        often = ", often for lack of memory; OMP_NUM_THREADS=1 has one process" if name == "SIGKILL" else ""
        raise UserError(f"a worker was ended by {name}{often}; rerun the same command to resume")
    if code:
        raise RuntimeError(f"a worker ended with exit code {code}; its traceback is above")
