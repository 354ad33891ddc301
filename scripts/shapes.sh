# Sourced by demo.sh and results_micro.sh: installs, and draws the 200 images that the micro detectors are measured on.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
source scripts/environment.sh

if [ ! -f runs/shapes/annotations.json ]; then
  rm -rf runs/shapes
  python -m tools.shapes.generate runs/shapes --images 200
fi
