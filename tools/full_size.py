"""Time and peak memory of both stages for a full-size two-stage detector, with random weights and a few steps.

python -m tools.full_size maskrcnn_resnet50_fpn --size 320 --steps 3 --json results/resnet_full_size.json
python -m tools.full_size swin_t
"""

import argparse
import contextlib
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from common.checkpoints.rcnn_architecture import CONFIGURATIONS, MODELS
from common.config.schema import QuantizationConfig, SynthesisConfig, TrainingConfig
from common.detection.detector import build_detector
from common.distillation import trainer
from common.quantization import calibrate, plan_layers, quantize
from common.runtime.environment import describe
from common.runtime.errors import Parser
from common.runtime.files import write_json
from common.synthesis import synthesize
from common.synthesis.imageset import ImageSet

SWINS = {f"swin_{size}": name for size, name in CONFIGURATIONS.items()}  # mmdet's configurations


def exercise(model: str, size: int, steps: int, rounding: str) -> dict[str, float]:
    """Seconds per iteration of stage one, of calibration and per training step, and peak memory in GB.

    Wall time and, for shared machines, CPU time.

    Args:
        model: a torchvision detection model with 91 outputs, or one of SWINS with 80 classes.
        size: image side in pixels, a multiple of 32.
        steps: batches of two images in stage one, and training steps of two images.
        rounding: `nearest`, `gptq` or `coordinate_descent`; a Hessian of the box head takes minutes on a CPU.
    """
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if model in SWINS:
        detector = build_detector("vit", {"config": SWINS[model], "overrides": {}})
    else:
        detector = build_detector("resnet", {"model": model, "outputs": 91, "frozen_batch_norm": True})
    detector.state = detector.build().state_dict()  # type: ignore[attr-defined]
    seconds: dict[str, float] = {}
    with TemporaryDirectory() as scratch:
        making = SynthesisConfig(
            num_images=2 * steps, image_size=size, batch_size=2, low_resolution_iterations=0, iterations=1,
            directory=Path(scratch),
        )  # fmt: skip
        with _timed(seconds, "stage one, per iteration with its image files", steps):
            images = ImageSet(synthesize(detector, making, seed=0, device=device, weights_sha256="0" * 64))
        teacher = detector.build().to(device)
        config = QuantizationConfig(weight_bits=4, activation_bits=4, rounding=rounding)  # type: ignore[arg-type]
        plan = plan_layers(detector, teacher, config)
        student = quantize(teacher, plan, config)
        with _timed(seconds, "calibration"):
            calibrate(detector, teacher, student, plan, [images.batch(range(2), device)[0]], config)
        training = TrainingConfig(epochs=1, batch_size=2, task_weight=0.1, holdout=0.0, selection="last")
        place = Path(scratch) / "training"
        with _timed(seconds, "stage two, per step", steps):
            trainer.train(detector, teacher, student, images, training, seed=0, device=device, directory=place)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return seconds | {"peak memory of the process, GB": resident, "peak memory of the GPU, GB": peak}


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str, count: int = 1) -> Iterator[None]:
    """Records wall and CPU time of the block, divided by `count`."""
    wall, processors = time.perf_counter(), time.process_time()
    yield
    seconds[f"{name}, s"] = (time.perf_counter() - wall) / count
    seconds[f"{name}, CPU s"] = (time.process_time() - processors) / count


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m tools.full_size", description=__doc__, formatter_class=form)
    parser.add_argument("model", choices=(*MODELS, *SWINS))
    parser.add_argument("--size", type=int, default=320, help="pixels (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="default: %(default)s")
    parser.add_argument(
        "--rounding", choices=("coordinate_descent", "gptq", "nearest"), default="nearest", help="default: %(default)s"
    )
    parser.add_argument("--json", type=Path, help="also write the measurements and the environment into this file")
    arguments = parser.parse_args()
    measured = exercise(arguments.model, arguments.size, arguments.steps, arguments.rounding)
    for name, value in measured.items():
        print(f"{name:<62} {value:.2f}")
    if arguments.json:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        asked: dict[str, Any] = {name: getattr(arguments, name) for name in ("model", "size", "steps", "rounding")}
        rounded = {name: round(value, 2) for name, value in measured.items()}
        write_json(arguments.json, asked | {"measured": rounded, "environment": describe(device)})


if __name__ == "__main__":
    main()
