"""How a run is measured: by AP where there are labels, else by fidelity, on images given or held-out synthetic ones."""

import logging
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.config.schema import DataConfig, ExperimentConfig, QuantizationConfig
from common.detection.detector import Detector, has_masks
from common.evaluation import coco
from common.evaluation.cache import measure_once, measurement_key, set_hashes
from common.evaluation.datasets import as_coco, read_set
from common.evaluation.fidelity import OBJECT, SYNTHETIC_OBJECT, measure_fidelity, unlabelled
from common.pipeline.export import write_cards
from common.pipeline.run_dir import (
    FULL,
    PTQ,
    TRAINED,
    fidelity_file,
    predictions_file,
    results,
    timed,
    update_results,
)
from common.quantization import bits_label, load_quantized, mean_weight_bits
from common.quantization.convert import TENSORS
from common.runtime.distributed import rank_zero
from common.runtime.files import is_same, sha256, write_json
from common.synthesis import synthesize as synthesize_images
from common.synthesis.imageset import IMAGES

log = logging.getLogger("zsqdet")
FOLDERS = {PTQ: "ptq", TRAINED: "quantized"}  # row -> folder of its detector
HELD_OUT_SHARE, HELD_OUT_LEAST, HELD_OUT_MOST = 8, 8, 32  # images for fidelity: an eighth of the set, within these
HELD_OUT_SEED = 2**31  # far from the seeds that people take


@dataclass(frozen=True)
class Experiment:
    """The configuration, and what every stage needs of it."""

    config: ExperimentConfig
    device: torch.device
    detector: Detector
    weights_sha256: str


@dataclass(frozen=True)
class CheckedData:
    """What detectors are measured on, checked before any expensive work; the set itself is read again for it."""

    data: DataConfig  # with images and annotations; without labels at most with images
    files: dict[str, str]  # SHA-256 of the annotations and of the images


def checked_data(experiment: Experiment, labelled: bool) -> CheckedData:
    """Finds every mistake of an evaluation set.

    Raises:
        UserError: annotations with mistakes, other classes, or images that are missing or unreadable.
    """
    config, detector = experiment.config, experiment.detector
    data = evaluation_set(config) if labelled else config.data
    return rank_zero(lambda: CheckedData(data, _hashes(data, detector)))


def _hashes(data: DataConfig, detector: Detector) -> dict[str, str]:
    if data.images is None:
        return {}
    labelled = data.annotations is not None
    coco = (
        read_set(data, detector.class_names, has_masks(detector))
        if labelled
        else unlabelled(data.images, detector.class_names)
    )
    return set_hashes(coco, data.annotations)


def measure(experiment: Experiment, run: Path, checked: CheckedData) -> None:
    """Fills the rows of results.json: full precision, PTQ and QAT, with the same evaluator and image size.

    A row whose detector or detections are not those of the row any more is measured again.
    """
    config, data = experiment.config, checked.data
    settings = _settings(config) | {"images": str(data.images), "annotations": str(data.annotations)}
    stored = rank_zero(lambda: results(run))
    # Runs of older versions have no hashes of the set.
    same = stored.get("measured_on") == settings and stored.get("measured_files", checked.files) == checked.files
    rows = rank_zero(lambda: {row["name"]: row for row in stored["rows"] if same and _is_current(run, row)})
    names = _detectors(experiment)
    for name in names:
        if name not in rows:
            with timed(run, "evaluation"):
                rows[name] = _measure_row(experiment, run, name, checked)
            done = [rows[name] for name in names if name in rows]
            update_results(run, rows=done, measured_on=settings, measured_files=checked.files)
    named = (config.data.dataset, config.data.images, config.data.annotations)
    record_files(run, "evaluation", [str(path) for path in named if path])
    rank_zero(lambda: write_cards(run))


def _is_current(run: Path, row: dict[str, Any]) -> bool:
    """Whether the files that a row tells of are those that it was measured on."""
    name = row["name"]
    detector = name not in FOLDERS or is_same(run / FOLDERS[name] / TENSORS, row.get("detector_sha256"))
    return detector and is_same(predictions_file(run, name), row.get("predictions_sha256"))


def _settings(config: ExperimentConfig) -> dict[str, Any]:
    """What a measurement depends on, apart from the detector."""
    named = config.data.model_dump(mode="json", include={"dataset", "split"}) if config.data.dataset else {}
    return config.evaluation.model_dump(mode="json", exclude={"directory"}) | named


def evaluation_set(config: ExperimentConfig) -> DataConfig:
    """`data` with images and annotations, converted where it names another kind of set.

    Raises:
        UserError: a line for each mistake of the labels.
    """
    return rank_zero(lambda: as_coco(config.data, config.evaluation.directory / "datasets"))


def fill_fidelity(experiment: Experiment, run: Path, checked: CheckedData) -> dict[str, Any]:
    """Fills `fidelity` of results.json, on `data.images` or else on synthetic images that the run has not used."""
    config, given = experiment.config, experiment.config.data.images
    if given is None and config.synthesis.source == "real":
        log.info("not measured: no data is given, and real images are all used")
        return {}
    start = time.perf_counter()
    folder = given or _held_out(experiment) / IMAGES
    lowest = SYNTHETIC_OBJECT if given is None else OBJECT
    settings = _settings(config) | {"images": str(folder), "objects_from": lowest}
    stored = rank_zero(lambda: results(run).get("fidelity", {}))
    files = stored.get("files", {})
    same = stored.get("measured_on") == settings and stored.get("measured_files", checked.files) == checked.files
    if same and rank_zero(lambda: all(is_same(run / name, digest) for name, digest in files.items())):
        return dict(stored)
    images = rank_zero(lambda: unlabelled(folder, experiment.detector.class_names))
    loads = {name: partial(_load, experiment, run, name) for name in _detectors(experiment)}
    rows = measure_fidelity(images, loads, config.evaluation, experiment.device, partial(fidelity_file, run), lowest)
    layers = results(run)["layers"]
    rows = [{**row, **_bits(config.quantization, layers)} for row in rows]
    rank_zero(lambda: write_json(fidelity_file(run, "images"), images.coco.content))
    about: dict[str, Any] = {"measured_on": settings, "measured_files": checked.files}
    about |= {"synthetic": given is None, "images": len(images.files), "rows": rows}
    about["files"] = rank_zero(lambda: _fidelity_hashes(run, [*loads]))
    about["seconds"] = round(time.perf_counter() - start, 2)
    update_results(run, fidelity=about)
    if given is not None:
        record_files(run, "evaluation", [str(given)])
    rank_zero(lambda: write_cards(run))
    return about


def _fidelity_hashes(run: Path, names: list[str]) -> dict[str, str]:
    """Of the detectors that fidelity was measured of, of their detections and of the list of images."""
    files = [fidelity_file(run, name) for name in [*names, "images"]]
    files += [run / FOLDERS[name] / TENSORS for name in names if name in FOLDERS]
    return {str(file.relative_to(run)): sha256(file) for file in files}


def _held_out(experiment: Experiment) -> Path:
    """A small set made as the run's own from another seed: neither calibrated nor trained on, nor chosen by.

    It is made only where nothing else can be measured, and shared by all bit-widths.
    """
    config = experiment.config
    count = min(max(config.synthesis.num_images // HELD_OUT_SHARE, HELD_OUT_LEAST), HELD_OUT_MOST)
    count = min(count, config.synthesis.num_images)
    synthesis = config.synthesis.model_copy(
        update={"num_images": count, "batch_size": min(config.synthesis.batch_size, count)}
    )
    seed = (config.seed + HELD_OUT_SEED) % 2**32
    log.info("fidelity is measured on %d further synthetic images, not used for calibration", count)
    return make_images(replace(experiment, config=config.model_copy(update={"synthesis": synthesis, "seed": seed})))


def _detectors(experiment: Experiment) -> list[str]:
    return [FULL, PTQ] + [TRAINED] * bool(experiment.config.training.epochs)


def _load(experiment: Experiment, run: Path, name: str) -> tuple[Detector, nn.Module]:
    return load_quantized(run / FOLDERS[name]) if name in FOLDERS else float_detector(experiment.detector)


def _measure_row(experiment: Experiment, run: Path, name: str, checked: CheckedData) -> dict[str, Any]:
    config, data = experiment.config, checked.data
    detector, module = _load(experiment, run, name)
    predictions = predictions_file(run, name)
    device = experiment.device

    def measure(file: Path) -> dict[str, Any]:
        return coco.evaluate(detector, module.to(device), data, config.evaluation, device=device, predictions=file)

    log.info("evaluation: AP of %s on `data`, which no earlier stage has used", name)
    if name != FULL:
        metrics = measure(predictions)
    else:
        key = measurement_key(detector, experiment.weights_sha256, checked.files, config.evaluation, device)
        metrics = measure_once(config.evaluation.directory / key, predictions, measure)
    return rank_zero(lambda: _row(experiment, run, name)) | metrics


def _row(experiment: Experiment, run: Path, name: str) -> dict[str, Any]:
    layers = results(run)["layers"] if name in FOLDERS else None
    row = {"name": name, **_bits(experiment.config.quantization, layers)}
    row["predictions_sha256"] = sha256(predictions_file(run, name))
    return row | ({"detector_sha256": sha256(run / FOLDERS[name] / TENSORS)} if name in FOLDERS else {})


def _bits(config: QuantizationConfig, layers: list[dict[str, Any]] | None) -> dict[str, Any]:
    """What a row says of its bits; `layers` are those of results.json, None for full precision."""
    if layers is None:
        return {"weight_bits": 32, "activation_bits": 32, "label": "float"}
    label, mean = bits_label(config.model_dump(mode="json"), layers), mean_weight_bits(layers)
    bits = {"weight_bits": config.weight_bits, "activation_bits": config.activation_bits}
    return bits | {"label": label, "mean_weight_bits": None if mean is None else round(mean, 3)}


def float_detector(detector: Detector) -> tuple[Detector, nn.Module]:
    """A full-precision detector as `load_quantized` gives a quantized one."""
    return detector, detector.build()


def make_images(experiment: Experiment) -> Path:
    """Stage one; returns the folder of the set.

    Raises:
        UserError: a mistake in the settings of synthesis.
    """
    config = experiment.config
    return synthesize_images(
        experiment.detector,
        config.synthesis,
        seed=config.seed,
        device=experiment.device,
        weights_sha256=experiment.weights_sha256,
    )


def record_files(run: Path, stage: str, files: list[str]) -> None:
    """Notes in results.json which files of the user a stage has read."""
    read = {entry["stage"]: entry for entry in results(run)["data_read"]} | {stage: {"stage": stage, "files": files}}
    update_results(run, data_read=list(read.values()))
