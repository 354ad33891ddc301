"""Benchmarks fake quantization, stage one and stage two, as ratios to what they cannot do without.

python -m tools.benchmark CONFIG [KEY=VALUE ...] [--json FILE]

Each part's cost is what the loop takes with it less what it takes without it. All are measured in turns in one process,
so that they hold on a shared machine, by processor time, or by the clock on a GPU. The parts need not add up.
"""

import copy
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.config.load import load_config
from common.config.schema import ExperimentConfig, TrainingConfig
from common.detection.detector import Detector, load_detector
from common.detection.types import Targets
from common.distillation import trainer
from common.distillation.optimizer import Optimizer
from common.distillation.progress import Progress
from common.quantization import calibrate, plan_layers, quantize
from common.quantization.fake_quant import fake_quantize
from common.quantization.layers import quantized_layers
from common.runtime.environment import choose_device, describe, freed_memory_kept, give_back_freed_memory, temporarily
from common.runtime.errors import Parser, UserError
from common.runtime.files import atomic, sha256
from common.synthesis import optimize, synthesize
from common.synthesis.imageset import ImageSet
from common.synthesis.optimize import FrozenDetector, freeze, optimize_images

ITERATIONS = 6  # of stage one in one measurement
STEPS = 4  # of stage two in one measurement
ALONE = "only: "  # before the name of what is measured by itself
Work = Callable[[], object]


def measure(works: Mapping[str, Work], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each piece of work in each turn; in turns, so that other load affects all of them alike."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            start = clock()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:  # the first turn is the warm-up
                times[name].append(clock() - start)
    return times


def peak_mib(work: Work, device: torch.device) -> float | None:
    """Most memory that the work takes besides what is held before it; None where the system does not say."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        gc.collect()  # what is freed within the work, or kept after it, would hide as much of what it takes
        give_back_freed_memory()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
        before = _kib("VmRSS")
        work()
        return (_kib("VmHWM") - before) / 2**10
    except OSError:
        return None


def _kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def fake_quantization(device: torch.device) -> dict[str, Work]:
    """Forward and backward on [8, 64, 80, 80], unsigned 4 bits; the floor is a ReLU."""
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
        return lambda: torch.autograd.grad(forward(), (x, step) if forward != x.relu else x, gradient)

    return {
        "floor": both(x.relu),
        "whole": both(lambda: fake_quantize(x, step, 0, 15)),
        ALONE + "composed of torch operators": both(plain),
        ALONE + "torch's learnable kernel": both(builtin),
    }


class _NoStatistics:
    """In the place of the statistics loss."""

    def __init__(self, terms: tuple[str, ...], device: torch.device) -> None:
        self.terms, self.device = terms, device

    def losses(self, kind: str) -> tuple[Tensor, ...]:
        return tuple(torch.zeros((), device=self.device) for _ in self.terms)


def stage_one(detector: Detector, config: ExperimentConfig, device: torch.device) -> dict[str, Work]:
    """Six iterations at full resolution. The floor: forward and backward to the image, BatchNorm folded, no hooks."""
    settings = config.synthesis
    frozen, bare = freeze(detector, device), freeze(detector, device)
    for part in bare.module.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    without: Any = _NoStatistics(frozen.statistics_loss.terms, device)
    bare = FrozenDetector(detector, bare.module, without, device)
    size, count = settings.image_size, settings.batch_size
    box = torch.tensor([[0.25, 0.25, 0.75, 0.75]]) * size
    targets = [Targets(box, torch.tensor([i % len(detector.class_names)])) for i in range(count)]
    images = torch.rand(count, 3, size, size, device=device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    edits = settings.label_sampling.model_copy(update={"every": 3, "start": 0.1, "stop": 0.9})
    update: dict[str, Any] = {"iterations": ITERATIONS, "low_resolution_iterations": 0}
    short = settings.model_copy(update=update | {"label_sampling": edits})

    def floor() -> None:
        for _ in range(ITERATIONS):
            leaf = images.clone().requires_grad_()
            with optimize.autocast(short, device):
                output = detector.head_output(bare.module, leaf)
            torch.stack([m.float().square().mean() for m in output.maps]).sum().backward()

    def ours(used: FrozenDetector = frozen, patch: dict[str, Any] | None = None, **changes: Any) -> Work:
        changed = short.model_copy(update=changes)

        def work() -> None:
            with temporarily(optimize, **(patch or {})):
                optimize_images(used, changed, targets, torch.Generator().manual_seed(0), lambda *_: None)

        return work

    def flat(images: Tensor, kind: str) -> Tensor:
        return images.new_zeros(())

    return {
        "floor": floor,
        "whole": ours(),
        "statistics": ours(bare),
        "the detector's loss": ours(weights=settings.weights.model_copy(update={"task": 0.0})),
        "total variation": ours(patch={"total_variation": flat}),
        "label edits, every third iteration": ours(label_sampling=edits.model_copy(update={"start": 1.0})),
        "best-image bookkeeping": ours(patch={"CANDIDATES": ()}),
        "augmentation": ours(flip=False, jitter=0, erase=False),
        "pyramid": ours(image="pixels"),
    }


def stage_two(detector: Detector, config: ExperimentConfig, device: torch.device, folder: Path) -> dict[str, Work]:
    """An epoch of four steps without the choice of an epoch, which is measured apart. The floor: float steps."""
    count = config.training.batch_size
    images = _noise(detector, config, device, folder, count * STEPS)
    batch, targets = images.batch(range(count), device)
    teacher, plain = detector.build().to(device), detector.build().to(device)
    plan = plan_layers(detector, teacher, config.quantization)
    student = quantize(teacher, plan, config.quantization)
    calibrate(detector, teacher, student, plan, [batch], config.quantization)
    settings = config.training.model_copy(update={"epochs": 1, "accumulate": 1, "selection": "holdout"})
    layers = quantized_layers(student).values()
    average, best, optimizer = copy.deepcopy(student), copy.deepcopy(student), Optimizer(student, settings)
    trainer.prepare(teacher, student, settings)

    def floor() -> None:
        for _ in range(STEPS):
            output = detector.head_output(plain, batch)
            torch.stack([m.square().mean() for m in output.maps]).sum().backward()

    def epoch(unstarted: Sequence[Any] = (), patch: tuple[Any, dict[str, Any]] | None = None, **changes: Any) -> Work:
        job = _job(detector, teacher, images, settings.model_copy(update=changes), device, folder)

        def work() -> None:
            with ExitStack() as stack:
                for quantizer in unstarted:
                    stack.enter_context(temporarily(quantizer, initialised=False))
                if patch:
                    stack.enter_context(temporarily(patch[0], **patch[1]))
                trainer.train_epoch(job, student, average, optimizer, Progress(), tqdm(disable=True))

        return work

    def choice() -> None:
        job = _job(detector, teacher, images, settings, device, folder)
        vars(job)["seen"] = seen
        trainer.choose(job, Progress(), average, best, {"epoch": 1})

    def forward() -> None:
        with torch.no_grad():
            for _ in range(STEPS):
                detector.head_output(teacher, batch)

    seen = _job(detector, teacher, images, settings, device, folder).seen
    return {
        "floor": floor,
        "whole": epoch(),
        "fake quantization of weights": epoch([q for layer in layers if (q := layer.weight_quantizer)]),
        "fake quantization of inputs": epoch([q for layer in layers if (q := layer.input_quantizer)]),
        "features": epoch(feature_weight=0.0),
        "augmentation": epoch(flip=False, zoom=(1.0, 1.0)),
        "decoding": epoch(patch=(images, {"batch": lambda *_, **__: (batch.clone(), targets)})),
        "optimizer": epoch(patch=(Optimizer, {"update": lambda *_: None})),
        "average": epoch(patch=(trainer, {"update_average": lambda *_: None})),
        ALONE + "teacher": forward,
        ALONE + "choosing an epoch on as many images": choice,
    }


def _noise(detector: Detector, config: ExperimentConfig, device: torch.device, folder: Path, count: int) -> ImageSet:
    update: dict[str, Any] = {"num_images": count, "source": "noise", "directory": folder}
    settings = config.synthesis.model_copy(update=update)
    return ImageSet(synthesize(detector, settings, seed=0, device=device, weights_sha256=sha256(config.weights)))


def _job(
    detector: Detector, teacher: nn.Module, images: ImageSet, config: TrainingConfig, device: torch.device, folder: Path
) -> trainer.Job:
    """Of an epoch on all images, all of which `trainer.choose` looks at as well."""
    everything = list(range(len(images)))
    features = trainer.features_of(detector, teacher, images.batch([0], device)[0], config)
    return trainer.Job(detector, teacher, images, config, 0, device, folder, features, everything, everything)


def compared(works: dict[str, Work], repeats: int, device: torch.device) -> dict[str, Any]:
    """Ratios to the floor of the whole, of each part (what the whole takes less what it takes without the part), and of
    what is measured alone, whose names begin with `only: `."""
    seconds = measure(works, repeats, device)
    floor, whole = seconds.pop("floor"), seconds.pop("whole")

    def median(values: Iterable[float]) -> float:
        return statistics.median(value / own for value, own in zip(values, floor, strict=True))  # of the same turn

    return {
        "floor_seconds": statistics.median(floor),
        "whole": median(whole),
        "parts": {
            name: median(all_ - value for all_, value in zip(whole, values, strict=True))
            for name, values in seconds.items()
            if not name.startswith(ALONE)
        },
        "alone": {n.removeprefix(ALONE): median(values) for n, values in seconds.items() if n.startswith(ALONE)},
        "peak_mib": {name: peak_mib(works[name], device) for name in ("floor", "whole")},
    }


def show(title: str, found: Mapping[str, Any]) -> None:
    """Prints what `compared` returned."""
    memory = ", ".join(f"{name} {value:.0f} MiB" for name, value in found["peak_mib"].items() if value is not None)
    print(f"{title}: {found['whole']:.2f} of the floor, {found['floor_seconds'] * 1000:.0f} ms; memory: {memory}")
    for name, value in found["parts"].items():
        print(f"  {value:6.2f}  {name}")
    for name, value in found["alone"].items():
        print(f"  {value:6.2f}  {name}, measured alone", flush=True)


def main(argv: list[str] | None = None) -> int:
    summary = (__doc__ or "").splitlines()[0]
    parser = Parser(prog="python -m tools.benchmark", description=summary)
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file of the experiment, e.g. from configs/")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that replace those of the file")
    parser.add_argument("--repeats", type=int, default=7, help="turns of the median (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures, and the machine, to FILE")
    arguments = parser.parse_args(argv)
    try:
        config = load_config(arguments.config, arguments.overrides)
        with freed_memory_kept():  # as in the commands
            found = benchmark(config, arguments.repeats)
        if arguments.json:
            with atomic(arguments.json) as temporary:
                temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def benchmark(config: ExperimentConfig, repeats: int) -> dict[str, Any]:
    """All figures, printed as they come."""
    device = choose_device(config.device)
    detector = load_detector(config.family, config.weights, config.detector.given)
    found: dict[str, Any] = {"weights": config.weights.name, "machine": describe(device)}
    with TemporaryDirectory() as folder:
        for title, works in (
            ("fake quantization", lambda: fake_quantization(device)),
            ("stage one", lambda: stage_one(detector, config, device)),
            ("stage two", lambda: stage_two(detector, config, device, Path(folder))),
        ):
            found[title] = compared(works(), repeats, device)
            show(title, found[title])
    return found


if __name__ == "__main__":
    sys.exit(main())
