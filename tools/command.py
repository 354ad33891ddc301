"""How a tool ends: a line for each thing it did, or one for what is wrong."""

import sys
from collections.abc import Iterable

from common.runtime.errors import UserError
from common.runtime.files import disk_problem


def report(lines: Iterable[str]) -> int:
    """Prints each line when it comes; returns 0, 2 after a mistake, which is told in one line, or 130 after Ctrl-C."""
    try:
        for line in lines:
            print(line, flush=True)
    except UserError as error:
        return _fail(str(error))
    except OSError as error:
        problem = disk_problem(error)
        if problem is None:
            raise
        return _fail(problem)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _fail(message: str) -> int:
    print(*(f"error: {line}" for line in message.splitlines()), sep="\n", file=sys.stderr)
    return 2
