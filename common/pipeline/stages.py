"""The order of the stages; no other file knows it.

synthesize -> train (quantize, calibrate, save PTQ, distil, save QAT) -> evaluate full precision, PTQ and QAT.
A stage whose output is on disk is skipped; an interrupted stage resumes. Under torchrun all ranks work on a stage,
except calibration, which rank 0 does alone; only rank 0 writes.
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.config.schema import DataConfig, ExperimentConfig, QuantizationConfig
from common.deployment.runtime import find_graph, load_exported
from common.detection.detector import Detector, TransformerDetector, load_detector
from common.distillation import trainer
from common.distillation.scalars import check_wandb
from common.evaluation import coco
from common.evaluation.cache import measure_once, measurement_key
from common.pipeline.run_dir import (
    check_run,
    is_complete,
    open_run,
    predictions_file,
    quantized_folder,
    results,
    timed,
    update_results,
)
from common.quantization import (
    LayerPlan,
    Sensitivity,
    allocate_bits,
    bits_label,
    calibrate,
    check_average_bits,
    feeds,
    find_placement,
    fold_layernorm,
    idle_levels,
    load_quantized,
    mean_weight_bits,
    plan_layers,
    quantize,
    save_quantized,
    saved_plan,
    scan,
    with_tensors,
)
from common.runtime.distributed import process_group, rank_zero
from common.runtime.environment import check_installation, choose_device, describe
from common.runtime.errors import UserError
from common.runtime.files import lock, read_json, sha256
from common.runtime.images import with_letterbox_padding
from common.synthesis import synthesize as synthesize_images
from common.synthesis.imageset import ImageSet

log = logging.getLogger("zsqdet")
SCANNED_BATCHES = 1  # calibration batches for the sensitivity of the layers


@dataclass(frozen=True)
class _Experiment:
    """The configuration, and what every stage needs of it."""

    config: ExperimentConfig
    device: torch.device
    detector: Detector
    weights_sha256: str


def synthesize(config: ExperimentConfig) -> Path:
    """Stage one. Returns the folder of the image set; runs with the same synthesis settings share it.

    Raises:
        UserError: a mistake in the configuration or the checkpoint.
    """
    with _loaded(config) as experiment:
        return _synthesize(experiment)


def train(config: ExperimentConfig) -> Path:
    """Stage two, preceded by stage one if its image set does not exist. Returns the run folder.

    Raises:
        UserError: a mistake in the configuration or the checkpoint, or a run folder of another experiment.
    """
    with _loaded(config) as experiment:
        imageset = _checked_images(experiment)
        with lock(config.run_dir):
            return _train(experiment, imageset)


def run(config: ExperimentConfig) -> Path:
    """All stages; evaluation only if `data` is set. Returns the run folder.

    Raises:
        UserError: a mistake in the configuration, the checkpoint or the data, or a run folder of another experiment.
    """
    measured = _has_data(config.data)
    with _loaded(config) as experiment:
        imageset = _checked_images(experiment)
        with lock(config.run_dir):
            run = _train(experiment, imageset)
            if measured:
                _measure(experiment, run)
            else:
                log.info(
                    "not evaluated: give data.images=DIR data.annotations=FILE (COCO format) to the same command to "
                    "see the AP before and after"
                )
            return run


def evaluate(config: ExperimentConfig) -> dict[str, Any]:
    """Evaluates `config.weights`, a float checkpoint or a quantized detector; touches no run folder.

    Returns:
        AP, AP50, ... as `common.evaluation.coco.evaluate` gives them, with `weights` and `precision`.

    Raises:
        UserError: a mistake in the configuration, the checkpoint or the data.
    """
    if not _has_data(config.data):
        raise UserError(
            "data: found no data.images and data.annotations; give a folder of images and its COCO JSON file"
        )
    check_installation()
    device = choose_device(config.device)
    folder = quantized_folder(config.weights)
    exported = find_graph(config.weights)
    if exported:
        detector, module = load_exported(exported)
    else:
        detector, module = load_quantized(folder) if folder else _float(load_detector(config.family, config.weights))
    with process_group(device):
        metrics = coco.evaluate(detector, module.to(device), config.data, config.evaluation, device=device)
    return {"weights": str(config.weights), "precision": "quantized" if folder or exported else "full"} | metrics


def sensitivity(config: ExperimentConfig) -> list[Sensitivity]:
    """Layer sensitivity: how much quantizing one layer alone changes the predictions on the synthetic images.

    Raises:
        UserError: a mistake in the configuration or the checkpoint.
    """
    with _loaded(config) as experiment:
        teacher, plan = _plan(experiment)  # before stage one, so that mistakes are found early
        batches = _calibration_batches(experiment, ImageSet(_synthesize(experiment)))
        scanned = list(islice(batches, SCANNED_BATCHES))
        _fold_norms(experiment, teacher, plan, scanned)
        return scan(experiment.detector, teacher, plan, scanned, config.quantization)


@contextlib.contextmanager
def _loaded(config: ExperimentConfig) -> Iterator[_Experiment]:
    check_installation()
    check_wandb(config.training.wandb)
    device = choose_device(config.device)
    if config.weights.is_dir() or quantized_folder(config.weights):
        raise UserError(f"weights: found {config.weights}, a run folder; this command needs a float checkpoint")
    detector = with_tensors(load_detector(config.family, config.weights))
    with process_group(device):
        yield _Experiment(config, device, detector, sha256(config.weights))


def _open(experiment: _Experiment) -> Path:
    run = open_run(experiment.config, experiment.weights_sha256, describe(experiment.device))
    log.info("run folder: %s", run)
    return run


def _synthesize(experiment: _Experiment) -> Path:
    config = experiment.config
    log.info(
        "stage one: %d images are made of the detector alone, to take the place of data", config.synthesis.num_images
    )
    return synthesize_images(
        experiment.detector,
        config.synthesis,
        seed=config.seed,
        device=experiment.device,
        weights_sha256=experiment.weights_sha256,
    )


def _checked_images(experiment: _Experiment) -> Path:
    """The set of stage one. All settings are checked before its hours and before a run folder is created."""
    config, detector = experiment.config, experiment.detector
    check_run(config, experiment.weights_sha256)
    module = detector.build()
    plan = plan_layers(detector, module, config.quantization)
    for line in idle_levels(plan, config.quantization):
        log.warning(line)
    if config.quantization.average_bits is not None:
        check_average_bits(plan, module, config.quantization.average_bits, config.quantization.mixed_precision_bits)
    if not is_complete(config.run_dir / "ptq"):
        find_placement(detector, module, plan, config.quantization.profile)
    if config.training.epochs:
        trainer.split(config.synthesis.num_images, config.training, config.seed)
    return _synthesize(experiment)


def _train(experiment: _Experiment, imageset: Path) -> Path:
    run = rank_zero(lambda: _open(experiment))
    rank_zero(lambda: _record_images(experiment, run, imageset))
    if rank_zero(lambda: is_complete(run / "quantized")):
        log.info("training: already complete")
        return run
    images = ImageSet(imageset)
    rank_zero(lambda: _calibrate(experiment, run, images))
    with timed(run, "training"):
        _distil(experiment, run, images)
    return run


def _record_images(experiment: _Experiment, run: Path, imageset: Path) -> None:
    """Records the image set of this run, and the external files it was made from."""
    about = read_json(imageset / "set.json")
    read = about.get("data_read", [])
    if read:
        log.warning("not zero-shot: stage one read data that is not ours: %s", ", ".join(read))
    _record_files(run, "weights", [str(experiment.config.weights)])
    _record_files(run, "synthesis", read)
    seconds = results(run)["seconds"] | {"synthesis": about.get("seconds", 0.0)}
    update_results(run, imageset=str(imageset), zero_shot=not read, seconds=seconds)


def _record_files(run: Path, stage: str, files: list[str]) -> None:
    read = {entry["stage"]: entry for entry in results(run)["data_read"]} | {stage: {"stage": stage, "files": files}}
    update_results(run, data_read=list(read.values()))


def _calibrate(experiment: _Experiment, run: Path, imageset: ImageSet) -> None:
    if is_complete(run / "ptq"):
        log.info("calibration: already complete")
        return
    log.info("stage two, calibration: ranges and rounded weights that change the predictions least")
    with timed(run, "calibration"):
        student, plan = _calibrated(experiment, run, imageset)
        _save(experiment, run / "ptq", student, plan)


def _calibrated(experiment: _Experiment, run: Path, imageset: ImageSet) -> tuple[nn.Module, list[LayerPlan]]:
    config, detector = experiment.config.quantization, experiment.detector
    batches = list(_calibration_batches(experiment, imageset))
    teacher, plan = _plan(experiment)
    _fold_norms(experiment, teacher, plan, batches)
    if config.average_bits is not None:
        found = scan(detector, teacher, plan, batches[:SCANNED_BATCHES], config)
        plan = allocate_bits(plan, found, config.average_bits)
        update_results(run, sensitivity=[asdict(entry) for entry in found])
    student = quantize(teacher, plan, config, find_placement(detector, teacher, plan, config.profile))
    report = calibrate(detector, teacher, student, plan, batches, config)
    update_results(run, layers=report.layers)
    return student, plan


def _plan(experiment: _Experiment) -> tuple[nn.Module, list[LayerPlan]]:
    """The float module, and the quantization plan of its layers."""
    teacher = experiment.detector.build().to(experiment.device)
    return teacher, plan_layers(experiment.detector, teacher, experiment.config.quantization)


def _fold_norms(experiment: _Experiment, teacher: nn.Module, plan: list[LayerPlan], batches: list[Tensor]) -> None:
    """Folds the channels' ranges after LayerNorms into the next layers, in place, where the configuration says so."""
    detector = experiment.detector
    if experiment.config.quantization.fold_layernorm and isinstance(detector, TransformerDetector):
        fold_layernorm(detector, teacher, plan, feeds(detector, teacher, batches))


def _calibration_batches(experiment: _Experiment, imageset: ImageSet) -> Iterator[Tensor]:
    """Batches [B, 3, S, S] in [0, 1], read lazily."""
    config = experiment.config.quantization
    count, size = min(config.calibration_images, len(imageset)), config.calibration_batch_size
    generator = torch.Generator().manual_seed(experiment.config.seed)
    for start in range(0, count, size):
        images, _ = imageset.batch(range(start, min(start + size, count)), experiment.device)
        yield with_letterbox_padding(images, generator) if config.letterbox_padding else images


def _distil(experiment: _Experiment, run: Path, images: ImageSet) -> None:
    config, device = experiment.config, experiment.device
    teacher = experiment.detector.build().to(device)
    # Always reloaded from disk, so that a resumed run computes exactly the same.
    student = load_quantized(run / "ptq")[1].to(device)
    if config.training.epochs:
        log.info("stage two, training: the quantized copy learns to predict what the original does")
        trainer.train(
            experiment.detector,
            teacher,
            student,
            images,
            config.training,
            seed=config.seed,
            device=device,
            directory=run / "training",
        )
    rank_zero(lambda: _save(experiment, run / "quantized", student, saved_plan(run / "ptq")))


def _save(experiment: _Experiment, directory: Path, student: nn.Module, plan: list[LayerPlan]) -> None:
    config = experiment.config
    save_quantized(directory, student, plan, config.family, experiment.detector.architecture, config.quantization)


def _measure(experiment: _Experiment, run: Path) -> None:
    """Fills the rows of results.json: full precision, PTQ and QAT, with the same evaluator and image size."""
    config = experiment.config
    settings = config.evaluation.model_dump(mode="json", exclude={"directory"}) | config.data.model_dump(mode="json")
    stored = rank_zero(lambda: results(run))
    rows = stored["rows"] if stored.get("measured_on") == settings else []
    names = ["full precision", "ptq"] + ["trained"] * bool(config.training.epochs)
    for name in names[len(rows) :]:
        with timed(run, "evaluation"):
            row = _measure_row(experiment, run, name)
        rows = [*rows, row]
        update_results(run, rows=rows, measured_on=settings)
    _record_files(run, "evaluation", [str(config.data.images), str(config.data.annotations)])


def _measure_row(experiment: _Experiment, run: Path, name: str) -> dict[str, Any]:
    config = experiment.config
    folder = {"ptq": run / "ptq", "trained": run / "quantized"}.get(name)
    detector, module = load_quantized(folder) if folder else _float(experiment.detector)
    predictions = predictions_file(run, name)
    device = experiment.device

    def measure(file: Path) -> dict[str, Any]:
        return coco.evaluate(
            detector, module.to(device), config.data, config.evaluation, device=device, predictions=file
        )

    log.info("evaluation: AP of %s on the images of `data`, which nothing before has read", name)
    if folder:
        metrics = measure(predictions)
    else:
        key = measurement_key(detector, experiment.weights_sha256, config.data, config.evaluation, device)
        metrics = measure_once(config.evaluation.directory / key, predictions, measure)
    return {"name": name, **_bits(config.quantization, results(run)["layers"] if folder else None)} | metrics


def _bits(config: QuantizationConfig, layers: list[dict[str, Any]] | None) -> dict[str, Any]:
    """What a row says of its bits; `layers` are those of results.json, None for full precision."""
    if layers is None:
        return {"weight_bits": 32, "activation_bits": 32, "label": "float"}
    label, mean = bits_label(config.model_dump(mode="json"), layers), mean_weight_bits(layers)
    bits = {"weight_bits": config.weight_bits, "activation_bits": config.activation_bits}
    return bits | {"label": label, "mean_weight_bits": None if mean is None else round(mean, 3)}


def _float(detector: Detector) -> tuple[Detector, nn.Module]:
    return detector, detector.build()


def _has_data(data: DataConfig) -> bool:
    """Whether an evaluation set is configured; checked before any work.

    Raises:
        UserError: only one of the two keys is set, or a path does not exist or is not of the right kind.
    """
    given = {"data.images": data.images, "data.annotations": data.annotations}
    if not any(given.values()):
        return False
    for key, path in given.items():
        if path is None:
            raise UserError(f"{key}: not set; evaluation needs both data.images and data.annotations")
        if not path.exists():
            raise UserError(f"{key}: found {path}, which does not exist; relative paths are relative to {Path.cwd()}")
        if path.is_dir() != (key == "data.images"):
            is_a, needed = ("a folder", "COCO JSON file") if path.is_dir() else ("a file", "folder of the images")
            raise UserError(f"{key}: found {path}, {is_a}; give the {needed}")
    return True
