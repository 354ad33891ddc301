"""The order of the stages; no other file knows it.

synthesize -> train (quantize, calibrate, save PTQ, distil, save QAT) -> evaluate full precision, PTQ and QAT.
A stage whose output is on disk is skipped; an interrupted stage resumes. Under torchrun all ranks work on a stage,
except calibration, which rank 0 does alone; only rank 0 writes.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.config.load import announcement, load_config
from common.config.schema import DataConfig, ExperimentConfig
from common.deployment.runtime import find_graph, in_size_of, load_exported
from common.detection.detector import TransformerDetector, load_detector
from common.distillation import trainer
from common.distillation.progress import check_wandb
from common.evaluation import coco
from common.evaluation.datasets import check_data
from common.pipeline.measure import (
    Experiment,
    checked_data,
    evaluation_set,
    fill_fidelity,
    float_detector,
    make_images,
    measure,
    record_files,
)
from common.pipeline.records import protocol
from common.pipeline.run_dir import (
    CHECKPOINT,
    STAGES,
    check_run,
    is_complete,
    is_done,
    mark_done,
    open_run,
    quantized_folder,
    results,
    stored_config,
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
    plan_layers,
    quantize,
    save_quantized,
    saved_plan,
    scan,
    with_tensors,
)
from common.quantization.convert import DESCRIPTION
from common.runtime.distributed import process_group, rank_zero
from common.runtime.environment import check_installation, choose_device, describe
from common.runtime.errors import UserError
from common.runtime.files import lock, read_json, sha256
from common.runtime.image_files import with_letterbox_padding
from common.synthesis.imageset import ImageSet

log = logging.getLogger("zsqdet")
SCANNED_BATCHES = 1  # calibration batches for the sensitivity of the layers


def synthesize(config: ExperimentConfig) -> Path:
    """Stage one. Returns the folder of the image set; runs with the same synthesis settings share it.

    Raises:
        UserError: a mistake in the configuration or the checkpoint.
    """
    with _loaded(config) as experiment:
        log.info(announcement(config))
        return make_images(experiment)


def train(config: ExperimentConfig) -> Path:
    """Stage two, preceded by stage one if its image set does not exist. Returns the run folder.

    Raises:
        UserError: a mistake in the configuration or the checkpoint, or a run folder of another experiment.
    """
    with _loaded(config) as experiment:
        imageset = _checked_images(experiment)
        with lock(config.run_dir):
            run = _train(experiment, imageset)
            rank_zero(lambda: _check_finished(run))
            return run


def run(config: ExperimentConfig) -> Path:
    """All stages. With labelled data AP is measured, else fidelity, on `data.images` or held-out synthetic images.

    Raises:
        UserError: a mistake in the configuration, the checkpoint or the data, or a run folder of another experiment.
    """
    labelled = _is_labelled(config.data)
    with _loaded(config) as experiment:
        data = checked_data(experiment, labelled)
        imageset = _checked_images(experiment)
        with lock(config.run_dir):
            run = _train(experiment, imageset)
            if labelled:
                measure(experiment, run, data)
            else:
                fill_fidelity(experiment, run, data)
            rank_zero(lambda: _check_finished(run))
            return run


def evaluate(config: ExperimentConfig) -> dict[str, Any]:
    """Evaluates `config.weights`, a float checkpoint or a quantized detector.

    With labels it touches no run folder. Without, `weights` is one, and its fidelity is recorded in it.

    Returns:
        AP, AP50, ... as `common.evaluation.coco.evaluate` gives them, with `weights`, `precision` and `protocol`, how
        the images were resized; without labels those of fidelity, with `fidelity` true.

    Raises:
        UserError: a mistake in the configuration, the checkpoint or the data.
    """
    labelled = _is_labelled(config.data)
    if not labelled and config.data.images is None:
        raise UserError(
            "data: found no data to evaluate on; give data=PATH (a data.yaml or a folder of Pascal VOC), "
            "data.images=DIR data.annotations=FILE (COCO), or, for a run folder, data.images=DIR alone (fidelity)"
        )
    if not labelled:
        return _evaluate_fidelity(config)
    check_installation()
    device, settings = choose_device(config.device), config.evaluation
    folder = quantized_folder(config.weights)
    exported = find_graph(config.weights)
    if exported:
        detector, module = load_exported(exported)
        settings = in_size_of(module, settings)
    else:
        detector, module = (
            load_quantized(folder)
            if folder
            else float_detector(load_detector(config.family, config.weights, config.detector.given))
        )
    with process_group(device):
        data = evaluation_set(config)
        metrics = coco.evaluate(detector, module.to(device), data, settings, device=device)
    about = {"weights": str(config.weights), "precision": "quantized" if folder or exported else "full"}
    return about | _bits_of(folder) | {"protocol": protocol(settings.model_dump(mode="json"))} | metrics


def _bits_of(quantized: Path | None) -> dict[str, str]:
    """The name of the bits of a quantized checkpoint, as `bits`."""
    if quantized is None:
        return {}
    about = read_json(quantized / DESCRIPTION)
    return {"bits": bits_label(about["quantization"], about["layers"])}


def _evaluate_fidelity(config: ExperimentConfig) -> dict[str, Any]:
    """Of a run on `data.images`, with the float checkpoint that the run names."""
    if not (config.weights / "config.yaml").is_file() or not quantized_folder(config.weights):
        raise UserError(
            f"data.annotations: not set, and without labels a run is compared with its full-precision detector; found "
            f"weights={config.weights}; give a run folder there, or data.annotations=FILE"
        )
    stored, written = stored_config(config.weights), load_config(config.weights / "config.yaml")
    changes = {"run_dir": config.weights} | {name: getattr(config, name) for name in ("data", "evaluation", "device")}
    with _loaded(stored.model_copy(update=changes)) as experiment, lock(config.weights):
        check_run(written.model_copy(update={"run_dir": config.weights}), experiment.weights_sha256)
        found = fill_fidelity(experiment, config.weights, checked_data(experiment, labelled=False))
    about: dict[str, Any] = {"weights": str(config.weights), "precision": "quantized", "fidelity": True}
    about |= {"protocol": protocol(found["measured_on"])}
    return about | {"images": found["images"]} | found["rows"][-1]


def sensitivity(config: ExperimentConfig) -> list[Sensitivity]:
    """Layer sensitivity: how much quantizing one layer alone changes the predictions on the synthetic images.

    Raises:
        UserError: a mistake in the configuration or the checkpoint.
    """
    with _loaded(config) as experiment:
        teacher, plan = _plan(experiment)  # before stage one, so that mistakes are found early
        batches = _calibration_batches(experiment, ImageSet(make_images(experiment)))
        scanned = list(islice(batches, SCANNED_BATCHES))
        _fold_norms(experiment, teacher, plan, scanned)
        return scan(experiment.detector, teacher, plan, scanned, config.quantization)


@contextlib.contextmanager
def _loaded(config: ExperimentConfig) -> Iterator[Experiment]:
    check_installation()
    check_wandb(config.training.wandb)
    device = choose_device(config.device)
    if config.weights.is_dir() or quantized_folder(config.weights):
        raise UserError(f"weights: found {config.weights}, a run folder; this command needs a float checkpoint")
    detector = with_tensors(load_detector(config.family, config.weights, config.detector.given))
    identity = sha256(config.weights)
    if given := config.detector.given:  # the same numbers in another network are another detector
        identity = hashlib.sha256(json.dumps([identity, given], sort_keys=True).encode()).hexdigest()
    with process_group(device):
        yield Experiment(config, device, detector, identity)


def _open(experiment: Experiment) -> Path:
    run = open_run(experiment.config, experiment.weights_sha256, describe(experiment.device))
    log.info("run folder: %s", run)
    return run


def _checked_images(experiment: Experiment) -> Path:
    """The set of stage one. All settings are checked before its hours and before a run folder is created."""
    config, detector = experiment.config, experiment.detector
    check_run(config, experiment.weights_sha256)
    log.info(announcement(config))
    module = detector.build()
    plan = plan_layers(detector, module, config.quantization)
    for line in idle_levels(plan, config.quantization):
        log.warning(line)
    if config.quantization.average_bits is not None:
        check_average_bits(plan, module, config.quantization.average_bits, config.quantization.mixed_precision_bits)
    if not is_complete(config.run_dir / "ptq"):
        find_placement(detector, module, plan, config.quantization.profile, config.quantization.concat_scales)
    if config.training.epochs:
        trainer.split(config.synthesis.num_images, config.training, config.seed)
    count = config.synthesis.num_images
    log.info("stage one, synthesis: %d images from the detector alone", count)
    return make_images(experiment)


def _train(experiment: Experiment, imageset: Path) -> Path:
    run = rank_zero(lambda: _open(experiment))
    rank_zero(lambda: _record_images(experiment, run, imageset))
    images = ImageSet(imageset)
    rank_zero(lambda: _calibrate(experiment, run, images))
    if rank_zero(lambda: is_done(run, "quantized")):
        log.info("stage two: already complete")
        return run
    with timed(run, "training"):
        _distil(experiment, run, images)
    return run


def _check_finished(run: Path) -> None:
    """What somebody removed or changed while the command worked is noticed before it says that it is done."""
    if not all(is_done(run, stage) for stage in STAGES):
        raise UserError(f"{run}: files in it were changed or removed meanwhile; rerun the same command")


def _record_images(experiment: Experiment, run: Path, imageset: Path) -> None:
    """Records the image set of this run, and the external files it was made from."""
    about = read_json(imageset / "set.json")
    read = about.get("data_read", [])
    if read:
        log.warning("not zero-shot: synthesis read external data: %s", ", ".join(read))
    record_files(run, "weights", [str(experiment.config.weights)])
    record_files(run, "synthesis", read)
    seconds = results(run)["seconds"] | {"synthesis": about.get("seconds", 0.0)}
    update_results(run, imageset=str(imageset), zero_shot=not read, seconds=seconds)


def _calibrate(experiment: Experiment, run: Path, imageset: ImageSet) -> None:
    if is_done(run, "ptq"):
        return
    log.info("stage two, calibration: activation ranges, then GPTQ rounding of weights")
    with timed(run, "calibration"):
        student, plan = _calibrated(experiment, run, imageset)
        _save(experiment, run, "ptq", student, plan)


def _calibrated(experiment: Experiment, run: Path, imageset: ImageSet) -> tuple[nn.Module, list[LayerPlan]]:
    config, detector = experiment.config.quantization, experiment.detector
    batches = list(_calibration_batches(experiment, imageset))
    teacher, plan = _plan(experiment)
    _fold_norms(experiment, teacher, plan, batches)
    if config.average_bits is not None:
        found = scan(detector, teacher, plan, batches[:SCANNED_BATCHES], config)
        plan = allocate_bits(plan, found, config.average_bits)
        update_results(run, sensitivity=[asdict(entry) for entry in found])
    placement = find_placement(detector, teacher, plan, config.profile, config.concat_scales)
    student = quantize(teacher, plan, config, placement)
    report = calibrate(detector, teacher, student, plan, batches, config)
    update_results(run, layers=report.layers)
    return student, plan


def _plan(experiment: Experiment) -> tuple[nn.Module, list[LayerPlan]]:
    """The float module, and the quantization plan of its layers."""
    teacher = experiment.detector.build().to(experiment.device)
    return teacher, plan_layers(experiment.detector, teacher, experiment.config.quantization)


def _fold_norms(experiment: Experiment, teacher: nn.Module, plan: list[LayerPlan], batches: list[Tensor]) -> None:
    """Folds the channels' ranges after LayerNorms into the next layers, in place, where the configuration says so."""
    detector = experiment.detector
    if experiment.config.quantization.fold_layernorm and isinstance(detector, TransformerDetector):
        fold_layernorm(detector, teacher, plan, feeds(detector, teacher, batches))


def _calibration_batches(experiment: Experiment, imageset: ImageSet) -> Iterator[Tensor]:
    """Batches [B, 3, S, S] in [0, 1], read lazily."""
    config = experiment.config.quantization
    count, size = min(config.calibration_images, len(imageset)), config.calibration_batch_size
    generator = torch.Generator().manual_seed(experiment.config.seed)
    for start in range(0, count, size):
        images, _ = imageset.batch(range(start, min(start + size, count)), experiment.device, labels=False)
        yield with_letterbox_padding(images, generator) if config.letterbox_padding else images


def _distil(experiment: Experiment, run: Path, images: ImageSet) -> None:
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
    history = [path] if (path := run / "training" / "history.jsonl").exists() else []
    rank_zero(lambda: _save(experiment, run, "quantized", student, saved_plan(run / "ptq"), history))


def _save(
    experiment: Experiment, run: Path, stage: str, student: nn.Module, plan: list[LayerPlan], more: Sequence[Path] = ()
) -> None:
    """Writes a quantized detector into the folder of the run, which marks the stage as done."""
    config, folder = experiment.config, run / stage
    save_quantized(folder, student, plan, config.family, experiment.detector.architecture, config.quantization)
    mark_done(run, stage, [*(folder / name for name in CHECKPOINT), *more])


def _is_labelled(data: DataConfig) -> bool:
    """Whether a set with labels is configured; checked before any work.

    Raises:
        UserError: annotations without images, or a path that does not exist or is not of the right kind.
    """
    check_data(data)
    if data.annotations is not None and data.images is None:
        raise UserError("data.images: not set; data.annotations go with the folder of their images")
    return data.dataset is not None or data.annotations is not None
