"""Ctrl-C and a request to end: one line, whenever they come. Imports nothing that takes time."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

LAUNCHER = "ZSQDET_LAUNCHER"  # variable with the number of the process that started this one
PR_SET_PDEATHSIG = 1  # of Linux' prctl
MESSAGE = "interrupted; rerun the same command to resume"


class Terminated(KeyboardInterrupt):
    """SIGTERM, as job schedulers send it; treated as Ctrl-C."""


def open_standard_streams() -> None:
    """Opens those of standard input, output and error that were closed (`2>&-`), to nowhere.

    Else the next file that is opened gets their number, and what a library writes to standard error goes into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)  # has the lowest free number, which is this one
            setattr(sys, name, os.fdopen(nowhere, "w" if number else "r", encoding="utf-8"))


def output_is_gone() -> int:
    """What is to be done where nobody reads standard output any more (`| head`): the exit code of programs that the
    system ends for it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left in the buffer
    return 128 + signal.SIGPIPE


def leave_at_once() -> None:
    """Outside `interruptible`, both signals end the program where it stands: an import may swallow an exception that
    comes in its middle, or turn it into another one, and files are complete or absent at any time."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt and SIGTERM raises Terminated; in other threads nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGTERM: signal.signal(signal.SIGTERM, _terminate),
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def die_with_launcher() -> None:
    """For one of several processes: ended by the system when the launcher is, and at once by a signal.

    The launcher says what happened. A process that waits for another one inside a collective cannot raise anything.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    die_with(int(os.environ.get(LAUNCHER, os.getppid())))


def die_with(parent: int) -> None:
    """From now on this process is ended when its parent is, on Linux by the system."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was ended before that
        os.kill(os.getpid(), signal.SIGKILL)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, f"{MESSAGE}\n".encode())
    os._exit(128 + number)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated
