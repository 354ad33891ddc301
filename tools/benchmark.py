"""Benchmarks the three hot paths: fake quantization, an iteration of stage one, a training step of stage two.

python -m tools.benchmark CONFIG [KEY=VALUE ...]

Times are ratios to a baseline that is measured alternately in the same process, so that they hold on a shared machine.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from common.config.load import load_config
from common.config.schema import ExperimentConfig, SynthesisConfig
from common.detection.detector import Detector, load_detector
from common.detection.types import Targets
from common.distillation import trainer
from common.quantization import calibrate, plan_layers, quantize
from common.quantization.fake_quant import fake_quantize
from common.runtime.environment import choose_device
from common.runtime.errors import UserError
from common.runtime.files import sha256
from common.synthesis import synthesize
from common.synthesis.imageset import ImageSet
from common.synthesis.optimize import freeze, optimize_images

ITERATIONS = 10  # of stage one in one measurement
STEPS = 6  # of stage two in one measurement
Work = Callable[[], object]


def measure(works: dict[str, Work], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each piece of work, measured in turns, so that other load affects all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:  # the first turn is the warm-up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def fake_quantization(device: torch.device) -> dict[str, Work]:
    """Forward and backward on [8, 64, 80, 80], unsigned 4 bits; the baseline is a ReLU."""
    x = torch.randn(8, 64, 80, 80, device=device, requires_grad=True)
    step = torch.full((1,), 0.2, device=device, requires_grad=True)
    gradient = torch.randn_like(x)

    def plain() -> Tensor:
        scaled = x / step
        clamped = scaled.clamp(0, 15)
        return (clamped + (clamped.round() - clamped).detach()) * step

    def builtin() -> Tensor:
        zero = torch.zeros(1, device=device)
        return torch._fake_quantize_learnable_per_tensor_affine(x, step, zero, 0, 15, 1.0)

    def both(forward: Callable[[], Tensor]) -> Work:
        return lambda: torch.autograd.grad(forward(), x, gradient)

    return {
        "baseline: ReLU": both(x.relu),
        "ours": both(lambda: fake_quantize(x, step, 0, 15)),
        "ours, composed of torch operators": both(plain),
        "torch's learnable kernel": both(builtin),
    }


def stage_one(detector: Detector, config: SynthesisConfig, device: torch.device) -> dict[str, Work]:
    """Ten full-resolution iterations; the baseline is forward and backward to the image, with BatchNorm folded."""
    frozen = freeze(detector, device)
    size, count = config.image_size, config.batch_size
    box = torch.tensor([[0.25, 0.25, 0.75, 0.75]]) * size
    targets = [Targets(box, torch.tensor([i % len(detector.class_names)])) for i in range(count)]
    images = torch.rand(count, 3, size, size, device=device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    short = config.model_copy(update={"iterations": ITERATIONS, "low_resolution_iterations": 0})

    def baseline() -> None:
        for _ in range(ITERATIONS):
            leaf = images.clone().requires_grad_()
            output = detector.head_output(frozen.module, leaf)
            torch.stack([m.float().square().mean() for m in output.maps]).sum().backward()

    def ours() -> None:
        optimize_images(frozen, short, targets, torch.Generator().manual_seed(0), lambda *_: None)

    return {"baseline: forward and backward to the image": baseline, "ours": ours}


def stage_two(detector: Detector, config: ExperimentConfig, device: torch.device, folder: Path) -> dict[str, Work]:
    """Six steps of distillation; the baseline is forward and backward of the float detector."""
    count = config.training.batch_size
    update: dict[str, Any] = {"num_images": count * STEPS, "source": "noise", "directory": folder}
    noise = config.synthesis.model_copy(update=update)
    directory = synthesize(detector, noise, seed=0, device=device, weights_sha256=sha256(config.weights))
    images = ImageSet(directory)
    batch, _ = images.batch(range(count), device)
    teacher, plain = detector.build().to(device), detector.build().to(device)
    plan = plan_layers(detector, teacher, config.quantization)
    student = quantize(teacher, plan, config.quantization)
    calibrate(detector, teacher, student, plan, [batch], config.quantization)
    settings = config.training.model_copy(update={"epochs": 1, "holdout": 0.0, "selection": "last"})

    def baseline() -> None:
        for _ in range(STEPS):
            output = detector.head_output(plain, batch)
            torch.stack([m.square().mean() for m in output.maps]).sum().backward()

    def ours() -> None:
        with TemporaryDirectory() as scratch:
            trainer.train(detector, teacher, student, images, settings, seed=0, device=device, directory=Path(scratch))

    return {"baseline: float forward and backward": baseline, "ours, a whole epoch with selection": ours}


def show(title: str, seconds: dict[str, float]) -> None:
    """Prints the times as ratios to the first entry."""
    baseline = next(iter(seconds.values()))
    print(title)
    for name, value in seconds.items():
        print(f"  {value / baseline:6.2f}  {name} ({value * 1000:.1f} ms)")


def main(argv: list[str] | None = None) -> int:
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m tools.benchmark", description=summary)
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file of the experiment, e.g. from configs/")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that replace those of the file")
    parser.add_argument("--repeats", type=int, default=7, help="turns of the median (%(default)s)")
    arguments = parser.parse_args(argv)
    try:
        config = load_config(arguments.config, arguments.overrides)
        device = choose_device(config.device)
        detector = load_detector(config.family, config.weights)
        with TemporaryDirectory() as folder:
            show("fake quantization", measure(fake_quantization(device), arguments.repeats, device))
            show("stage one", measure(stage_one(detector, config.synthesis, device), arguments.repeats, device))
            works = stage_two(detector, config, device, Path(folder))
            show("stage two", measure(works, arguments.repeats, device))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
