#!/usr/bin/env bash
# Installs into .venv; returns at once when nothing changed since the last time.
# Usage: bash scripts/setup.sh [yolo|resnet|vit|export|all|dev]...      (all; PYTHON=python3.12 chooses the interpreter)
#
# Downloads about 3 GB, most of it torch with CUDA, and unpacks about 5 GB. uv keeps what it downloaded in its cache
# (UV_CACHE_DIR, else ~/.cache/uv) for the next .venv; where both are on one disk the files are shared.
set -euo pipefail
cd "$(dirname "$0")/.."

[ $# -gt 0 ] || set -- all
for name in "$@"; do
  case $name in
    yolo | resnet | vit | export | all | dev) ;;
    -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" && exit ;;
    *) echo "error: nothing is called '$name'; there are yolo, resnet, vit, export, all and dev" >&2 && exit 2 ;;
  esac
done

# The first line of the stamp is what was installed from, the others are the names.
stamp=.venv/installed
wanted=$(cat pyproject.toml constraints.txt scripts/setup.sh | sha256sum | cut -d' ' -f1)
before=$(tail -n +2 "$stamp" 2>/dev/null || true)
has() { grep -qxE "$1" <<<"$before"; }
if [ "$(head -n 1 "$stamp" 2>/dev/null)" = "$wanted" ]; then
  missing=0
  for name in "$@"; do has "$name" || { [ "$name" != dev ] && has all; } || missing=1; done
  [ $missing -eq 1 ] || exit 0
fi
names=$(printf '%s\n' $before "$@" | sort -u)

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

# Not plain pip: it prefers a CPU build of torch where one is on offer, under which torchvision's operators do not load.
.venv/bin/python -m pip install --quiet --no-cache-dir --disable-pip-version-check "uv>=0.5"
cache=$(.venv/bin/uv cache dir)
override=$(mktemp)
trap 'rm -f "$override"' EXIT
echo "opencv-python ; sys_platform == 'never'" >"$override" # the headless build is enough, and needs no display libraries
echo "installing $(paste -sd' ' <<<"$names") into .venv: up to 3 GB to download (kept in $cache) and 5 GB on disk"
# editable_mode: this folder on the path, so that `import zsqdet` is not hidden by a folder of that name beside a script.
# Where Python may not keep bytecode, as in many containers, each start would compile 2500 files anew: 8 s.
compile=${PYTHONDONTWRITEBYTECODE:+--compile-bytecode}
VIRTUAL_ENV="$PWD/.venv" .venv/bin/uv pip install --quiet $compile --constraint constraints.txt --override "$override" \
  --config-settings editable_mode=compat --editable ".[$(paste -sd, <<<"$names")]"
[[ -z $compile ]] || .venv/bin/python -m compileall -q common yolo11 yolov5 resnet onestage vit tools zsqdet.py

.venv/bin/python - <<'P2'
import sys
try:
    import torch, torchvision
    torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
except (ImportError, RuntimeError, AttributeError, OSError) as error:
    sys.exit(f"error: torch and torchvision do not fit together ({str(error).splitlines()[0]}); delete .venv and run "
             "bash scripts/setup.sh again, without installing torch by pip yourself")
P2
printf '%s\n' "$wanted" $names >"$stamp"
echo "ready; checkpoints will be in weights/, runs in runs/, settings of Ultralytics and matplotlib in .venv"
