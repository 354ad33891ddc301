# Sourced by the other scripts: the project's own Python, two threads, and an Ultralytics that neither installs nor calls home.
export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" # threads that spin while they wait take ten times as long on a busy machine
export YOLO_AUTOINSTALL="${YOLO_AUTOINSTALL:-false}"
export YOLO_CONFIG_DIR="${YOLO_CONFIG_DIR:-$PWD/.venv/ultralytics}"
mkdir -p "$YOLO_CONFIG_DIR"
