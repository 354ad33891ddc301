"""`zsqdet predict`: draws the detections of a quantized detector or a float checkpoint into images."""

import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.config.from_checkpoint import is_checkpoint, recognise
from common.config.load import load_config
from common.config.schema import EvaluationConfig
from common.detection.detector import Detector, load_detector
from common.detection.masks import paste
from common.detection.types import Detections
from common.evaluation.resize import as_floats, plan_batches, view
from common.pipeline.run_dir import quantized_folder
from common.quantization import bits_label, load_quantized
from common.quantization.convert import DESCRIPTION
from common.reporting.pictures import draw_detections
from common.runtime.environment import check_installation, choose_device
from common.runtime.errors import UserError
from common.runtime.files import read_json
from common.runtime.image_files import SUFFIXES, read_image
from common.synthesis.imageset import write_image

log = logging.getLogger("zsqdet")


def predict(
    weights: Path,
    images: Sequence[Path],
    out: Path,
    *,
    confidence: float = 0.25,
    family: str | None = None,
    device: str = "auto",
) -> list[Path]:
    """Draws the detections into copies of images.

    Args:
        weights: a run folder (its quantized detector), a quantized checkpoint, or a float checkpoint.
        images: image files, or folders (not recursive).
        out: folder for the PNG files, named like the images.
        confidence: score threshold.
        family: detector family of a float checkpoint; None finds it out.
        device: auto, cpu, cuda or cuda:N.

    Returns:
        The written files, in the order of the images.

    Raises:
        UserError: no detector, no such device, no image, one that cannot be read (nothing is drawn then), two images
            in one place, or an original's folder as `out`.
    """
    check_installation()
    chosen = choose_device(device)
    files = _files(images)
    targets = _targets(files, out)
    folder = quantized_folder(weights)
    if folder:
        detector, module = load_quantized(folder)
        about = read_json(folder / DESCRIPTION)
        log.info("%s: %s", folder, bits_label(about["quantization"], about["layers"]))
    else:
        detector = load_detector(family or recognise(weights)[0], weights)
        module = detector.build()
    module.to(chosen)
    settings = _settings(weights, folder)
    for file in files:  # before the first is drawn: an image that cannot be read leaves nothing half done
        read_image(file)
    for file, target in zip(tqdm(files, desc="images", disable=None), targets, strict=True):
        image = read_image(file)
        found = detect(detector, module, image, settings, confidence, chosen)
        write_image(target, draw_detections(image, found, detector.class_names))
    return targets


def detect(
    detector: Detector,
    module: nn.Module,
    image: Tensor,
    config: EvaluationConfig,
    confidence: float,
    device: torch.device,
) -> Detections:
    """Detections in one image uint8 [3, H, W], preprocessed as in evaluation, on the CPU.

    Returns:
        boxes in pixels of the image, masks [n, H, W] bool.
    """
    height, width = image.shape[1:]
    batch = plan_batches([(height, width)], config, detector.stride)[0]
    shown, placement = view(image, config, batch)
    found = detector.detect(module, as_floats(shown[None].to(device)), confidence, config.iou, config.max_detections)[0]
    found = placement.detections(found)
    masks = None if found.masks is None else paste(found.masks.cpu(), found.boxes.cpu(), height, width)
    return Detections(found.boxes.cpu(), found.scores.cpu(), found.labels.cpu(), masks)


def _settings(weights: Path, quantized: Path | None) -> EvaluationConfig:
    """Evaluation settings of the run that a quantized checkpoint belongs to, else the defaults.

    Beside a float checkpoint a config.yaml is somebody else's.
    """
    own = quantized.resolve() if quantized else None
    for folder in (own, *own.parents[:2]) if own else ():
        if (folder / "config.yaml").is_file():
            return load_config(folder / "config.yaml").evaluation
    if not quantized and is_checkpoint(weights):
        with contextlib.suppress(UserError):  # a file whose family was named need not be recognised
            return EvaluationConfig(**recognise(weights)[1].get("evaluation", {}))
    return EvaluationConfig()


def _files(images: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in images:
        if path.is_dir():
            own = sorted(f for f in path.iterdir() if f.suffix.lower() in SUFFIXES)
            if not own:
                raise UserError(f"{path}: no image in this folder; allowed are {', '.join(sorted(SUFFIXES))}")
            files += own
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"{path}: does not exist; give image files or folders of them")
    return files


def _targets(files: Sequence[Path], out: Path) -> list[Path]:
    # Whatever stands beside an image is the user's, too: a PNG of that name may be the original of a JPEG.
    beside = {place.resolve(): file for file in files for place in (file.parent, file.resolve().parent)}
    if file := beside.get(Path(os.path.realpath(out))):  # Path.resolve() raises where links go round
        raise UserError(f"{out}: is the folder of {file}, one of the images; give another folder with --out")
    taken: dict[Path, Path] = {}
    for file in files:
        target = out / f"{file.stem}.png"
        if target in taken:
            raise UserError(f"{target}: found both {taken[target]} and {file}; use separate calls with different --out")
        taken[target] = file
    return list(taken)
