# Sourced by the other scripts: the project's own Python, two threads, and an Ultralytics that neither installs nor calls home.
export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" # threads that spin while they wait take ten times as long on a busy machine
export YOLO_AUTOINSTALL="${YOLO_AUTOINSTALL:-false}"
export YOLO_CONFIG_DIR="${YOLO_CONFIG_DIR:-$PWD/.venv/ultralytics}"
mkdir -p "$YOLO_CONFIG_DIR"

# zsqdet on all GPUs that are visible, by torchrun where there are several; GPUS=1 takes one. With device=NAME it is one process.
zsqdet() {
  local visible=${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null)}
  local gpus=${GPUS:-$(wc -w <<<"${visible//,/ }")}
  case "${1:-} $*" in
    *" device="*) [ -n "${GPUS:-}" ] || gpus=1 ;;
    synthesize\ * | train\ * | run\ * | evaluate\ *) ;;
    *) gpus=1 ;;
  esac
  if [ "$gpus" -gt 1 ]; then
    python -m common.runtime.launch --standalone --nproc_per_node "$gpus" -m common.cli "$@"
  else
    command zsqdet "$@"
  fi
}
