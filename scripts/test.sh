#!/usr/bin/env bash
# Installs what is missing, then checks style and types and runs the tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh all dev
source scripts/environment.sh
ruff check .
ruff format --check .
mypy
pytest "$@"
