#!/usr/bin/env bash
# Installs everything into .venv beside this script's folder; returns at once when nothing changed since the last time.
# Usage: bash scripts/setup.sh      (PYTHON=python3.12 chooses the interpreter)
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=.venv/installed
wanted=$(cat pyproject.toml constraints.txt scripts/setup.sh | sha256sum | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then exit 0; fi

if [ ! -x .venv/bin/python ]; then
  chosen=""
  for candidate in ${PYTHON:-python3 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      chosen=$candidate
      break
    fi
  done
  if [ -z "$chosen" ]; then
    echo "error: Python 3.11 or 3.12 is needed; none was found (set PYTHON to one)" >&2
    exit 1
  fi
  echo "creating .venv with $("$chosen" --version)"
  "$chosen" -m venv .venv
fi

# uv takes the torch build that torchvision was made for; plain pip may prefer a local CPU build that does not fit.
.venv/bin/python -m pip install --quiet --disable-pip-version-check "uv>=0.5"
override=$(mktemp)
trap 'rm -f "$override"' EXIT
echo "opencv-python ; sys_platform == 'never'" >"$override" # the headless build is enough, and needs no display libraries
echo "installing packages into .venv (about 5 GB)"
VIRTUAL_ENV="$PWD/.venv" .venv/bin/uv pip install --quiet --constraint constraints.txt --override "$override" --editable ".[dev]"

.venv/bin/python - <<'P'
import sys
try:
    import torch, torchvision
    torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
except (ImportError, RuntimeError, AttributeError, OSError) as error:
    sys.exit(f"error: torch and torchvision do not fit together ({str(error).splitlines()[0]}); delete .venv and run "
             "bash scripts/setup.sh again, without installing torch by pip yourself")
P
echo "$wanted" >"$stamp"
echo "ready"
