"""torchrun without its own report of a failure: `python -m common.runtime.launch --nproc_per_node N -m MODULE ...`.

The processes have said what is wrong, in one line or with a traceback; torchrun adds forty that say less, and ends with
1 whatever their exit code was.
"""

import logging
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs torchrun's command line; returns 0, the exit code of the first process that failed, or 130 after Ctrl-C."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(parse_args(argv))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code  # as shells write the signal that ended a process
    except SignalException as error:
        return 128 + error.sigval.value
    return 0


if __name__ == "__main__":
    sys.exit(main())
