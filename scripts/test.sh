#!/usr/bin/env bash
# Installs what is missing, then checks style and types and runs the tests, one process a core. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh all dev
source scripts/environment.sh
ruff check .
ruff format --check .
mypy
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} pytest --numprocesses auto --dist worksteal "$@"
