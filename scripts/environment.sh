# Sourced by the other scripts: the project's own Python, and packages that keep their files in .venv and call nobody.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PATH="$root/.venv/bin:$PATH"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" # threads that spin while they wait take ten times as long on a busy machine
export YOLO_AUTOINSTALL="${YOLO_AUTOINSTALL:-false}"
export YOLO_CONFIG_DIR="${YOLO_CONFIG_DIR:-$root/.venv/ultralytics}"
export MPLCONFIGDIR="${MPLCONFIGDIR:-$root/.venv/matplotlib}"
mkdir -p "$YOLO_CONFIG_DIR" "$MPLCONFIGDIR"
