"""`zsqdet ... --gpus N`: a process for each GPU, by torchrun, and one line when one of them is ended."""

import logging
import os
import signal
import sys
from collections.abc import Sequence

from torch import cuda
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args, run

from common.runtime.environment import ROOT
from common.runtime.errors import UserError
from common.runtime.signals import LAUNCHER, MESSAGE

MONITOR = 0.1  # seconds between two looks at the processes
ASKED_TO_END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def check_gpus(wanted: int, device: str) -> None:
    """Whether so many GPUs can be taken.

    Raises:
        UserError: they are not there, or the device is another one.
    """
    if device not in ("auto", "cuda"):
        raise UserError(f"--gpus: found {wanted}, but device is {device}; leave out one of them")
    found = cuda.device_count() if cuda.is_available() else 0
    if not found:
        raise UserError(f"--gpus: found {wanted}, but there is no CUDA device here; leave it out to use the CPU")
    if not 1 <= wanted <= found:
        raise UserError(f"--gpus: found {wanted}, but {found} are visible here; allowed are 1 to {found}")


def launch(processes: int, module: str, arguments: Sequence[str]) -> int:
    """Runs `python -m MODULE ARGUMENTS` in several processes that find one another, see `common.runtime.distributed`.

    Returns:
        The exit code, as `main` does.
    """
    return main(["--standalone", "--nproc_per_node", str(processes), "-m", module, *arguments])


def main(argv: Sequence[str] | None = None) -> int:
    """torchrun's command line: `python -P -m common.runtime.launch --nproc_per_node N ... -m MODULE ARGUMENT...`.

    Returns:
        0, the exit code of the first process that failed, or 128 and the number of the signal that ended one.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    options = parse_args(argv)
    options.monitor_interval = MONITOR
    os.environ[LAUNCHER] = str(os.getpid())
    os.environ["PYTHONSAFEPATH"] = "1"  # a file of the current directory is no module of the processes
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if options.nproc_per_node.isdigit():  # torchrun would give each process one thread
        threads = (os.cpu_count() or 1) // int(options.nproc_per_node)
        os.environ.setdefault("OMP_NUM_THREADS", str(max(threads, 1)))
    try:
        run(options)
    except ChildFailedError as error:
        return _failed(list(error.failures.values()))
    except SignalException as error:
        return _ended(error.sigval.value)
    return 0


def _failed(failures: list[ProcessFailure]) -> int:
    """One that the system ended comes first, then those that failed and said why, then those that torchrun ended."""

    def order(failure: ProcessFailure) -> tuple[int, int]:
        return 2 if -failure.exitcode in ASKED_TO_END else int(failure.exitcode > 0), failure.timestamp

    first = min(failures, key=order)
    number = -first.exitcode
    if number < 0:
        return first.exitcode
    if number in ASKED_TO_END:
        return _ended(number)
    sys.stderr.write(
        f"error: rank {first.local_rank} was ended by {signal.Signals(number).name}"
        f"{', often for lack of memory' if number == signal.SIGKILL else ''}; the others were ended as well; "
        "rerun the same command to resume\n"
    )
    return 128 + number


def _ended(number: int) -> int:
    sys.stderr.write(f"{MESSAGE}\n")
    return 128 + number


if __name__ == "__main__":
    sys.exit(main())
