"""The command `zsqdet`, in a module of a name that nothing else has, so that a foreign `common` is noticed."""

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

OURS = Path(__file__).resolve().parent / "common"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line of common/cli.py. Returns its exit code, or 2 where another `common` hides ours."""
    spec = importlib.util.find_spec("common")
    places = [Path(place).resolve() for place in (spec and spec.submodule_search_locations) or []]
    if OURS not in places[:1]:
        sys.stderr.write(
            f"error: import name 'common': found {places[0] if places else 'nothing'} instead of {OURS}; "
            "uninstall the other one, or run `bash scripts/setup.sh` and use the .venv it makes\n"
        )
        return 2
    from common.runtime.signals import leave_at_once

    leave_at_once()
    # Before torch: threads that spin while they wait take ten times as long on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from common.cli import main as run

    return run(argv)


if __name__ == "__main__":
    sys.exit(main())
