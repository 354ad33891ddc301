"""Tools, and what they share: output and exit codes."""

import sys
from collections.abc import Iterable

from common.runtime.errors import UserError
from common.runtime.files import disk_problem
from common.runtime.signals import output_is_gone


def report(lines: Iterable[str]) -> int:
    """Prints each line as it comes. Exit code: 0, 2 after a user error, which is printed, 130 after Ctrl-C, 141 where
    nobody reads."""
    try:
        for line in lines:
            print(line, flush=True)
    except UserError as error:
        return _fail(str(error))
    except BrokenPipeError:
        return output_is_gone()
    except OSError as error:
        problem = disk_problem(error)
        if problem is None:
            raise
        return _fail(problem)
    except KeyboardInterrupt:
        print("interrupted; rerun the same command to resume", file=sys.stderr)
        return 130
    return 0


def _fail(message: str) -> int:
    print(*(f"error: {line}" for line in message.splitlines()), sep="\n", file=sys.stderr)
    return 2
