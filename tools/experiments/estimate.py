"""What the lines of a table cost: seconds and gigabytes, from rates.json.

A rough figure: rates are from one small model, and a shared machine; take it as right within a factor of two or three.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config.schema import ExperimentConfig
from common.runtime.files import read_json
from tools.experiments import data
from tools.experiments.table import Line

RATES = Path(__file__).with_name("rates.json")
MACHINES = tuple(read_json(RATES)["machines"])
MODULES_KEPT = 7  # float32 copies of the parameters in a run folder: three and Adam's two to go on, two results
BYTES_OF_DETECTIONS = 30_000  # of an image, in each of the files of predictions


@dataclass(frozen=True)
class Cost:
    """Of one line, or of several together."""

    seconds: float = 0.0
    gigabytes: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.seconds + other.seconds, self.gigabytes + other.gigabytes)

    def __str__(self) -> str:
        hours, minutes = divmod(round(self.seconds / 60), 60)
        return f"about {hours} h {minutes:02d} min, {self.gigabytes:.1f} GB"


def costs(lines: Sequence[Line], machine: str, gpus: int = 1) -> list[Cost | None]:
    """The cost of each line, None where the size of its model is not known. Lines that share a set of images pay for it
    once, the first of them.

    Args:
        lines: of a table.
        machine: one of MACHINES.
        gpus: processes that share a line's work.
    """
    content = read_json(RATES)
    made: set[str] = set()
    found: list[Cost | None] = []
    for line in lines:
        config, known = line.load(), content["models"]
        model = known.get(line.model, known.get(Path(config.weights).stem))
        if model is None:
            found.append(None)
            continue
        key = f"{line.config} {line.model} {config.seed} {config.synthesis.model_dump_json()}"
        cost = _stage_two(line, config, model, content["machines"][machine], gpus)
        if key not in made:
            cost += _stage_one(config, model, content, machine, gpus)
        made.add(key)
        found.append(cost)
    return found


def described(lines: Sequence[Line], machine: str, gpus: int = 1) -> Iterator[str]:
    """A text for each line, and their sum at the end."""
    total, unknown = Cost(), 0
    for cost in costs(lines, machine, gpus):
        total, unknown = (total, unknown + 1) if cost is None else (total + cost, unknown)
        yield "cost not known: the model is not in rates.json" if cost is None else str(cost)
    about = read_json(RATES)["machines"][machine]["is"]
    yield f"all {len(lines)} lines: {total}{f', {unknown} lines not counted' if unknown else ''}; {gpus} x {about}"


def _gigaflops(model: Sequence[float], side: float) -> float:
    return model[0] * (side / model[2]) ** 2


def _stage_one(config: ExperimentConfig, model: Sequence[float], content: Any, machine: str, gpus: int) -> Cost:
    one, rate = config.synthesis, content["machines"][machine]
    if one.source == "real":  # one look at each file; nothing is copied
        return Cost(one.num_images * rate["evaluation"] * 4, one.num_images * 1e-6)
    batches = -(-one.num_images // one.batch_size) / gpus
    passes = [(one.iterations, one.image_size), (one.low_resolution_iterations, one.low_resolution_size)]
    seconds = 0.0
    for iterations, side in passes if one.source != "noise" else []:
        work = rate["stage_one"] * one.batch_size * _gigaflops(model, side)
        seconds += batches * iterations * max(work, rate["least_iteration"])
    return Cost(seconds, one.num_images * one.image_size**2 * content["png_bytes_per_pixel"] / 1e9)


def _stage_two(line: Line, config: ExperimentConfig, model: Sequence[float], rate: dict[str, Any], gpus: int) -> Cost:
    training, side = config.training, config.synthesis.image_size
    images = config.synthesis.num_images * (1 - training.holdout * (training.selection == "holdout"))
    steps = training.epochs * -(-images // training.batch_size)
    work = rate["training"] * training.batch_size / gpus * _gigaflops(model, side)
    seconds = steps * max(work, rate["least_step"])
    count = min(config.quantization.calibration_images, config.synthesis.num_images)
    seconds += count * rate["calibration"] * _gigaflops(model, side)
    evaluated, detectors = data.SETS[line.data].count, 2 + bool(training.epochs)
    per_image = rate["evaluation"] * max(_gigaflops(model, config.evaluation.image_size), 10)
    seconds += evaluated * detectors * per_image / gpus
    return Cost(seconds, (MODULES_KEPT * 4e6 * model[1] + evaluated * detectors * BYTES_OF_DETECTIONS) / 1e9)
