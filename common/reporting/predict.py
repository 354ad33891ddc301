"""Pictures of what a detector finds: the quantized one of a run, or a float checkpoint."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from common.config import EvaluationConfig
from common.detector import Detector, load_detector
from common.environment import check_installation, choose_device
from common.errors import UserError
from common.evaluation.letterbox import Placement, make_batches, place
from common.images import read_image
from common.load_config import load_config
from common.quantization import load_quantized
from common.reporting.drawing import draw
from common.run_dir import quantized_folder
from common.synthesis.imageset import write_image
from common.synthesis.sources import SUFFIXES
from common.types import Detections


def predict(
    weights: Path, images: Sequence[Path], out: Path, *, confidence: float = 0.25, family: str = "yolo11"
) -> list[Path]:
    """Draws the detections into copies of images.

    Args:
        weights: a run folder or a folder in it, for its quantized detector; or a float checkpoint.
        images: files, or folders for the image files directly in them.
        out: folder for the PNG files, each called like its image.
        confidence: lowest score that is drawn.
        family: of a float checkpoint.

    Returns:
        The files that were written, in the order of the images.

    Raises:
        UserError: no detector, no image, or two images or an original in one place.
    """
    check_installation()
    files = _files(images)
    targets = _targets(files, out)
    folder = quantized_folder(weights)
    if folder:
        detector, module = load_quantized(folder)
    else:
        detector = load_detector(family, weights)
        module = detector.build()
    device = choose_device("auto")
    module.to(device)
    settings = _settings(weights)
    for file, target in zip(tqdm(files, desc="images", disable=None), targets, strict=True):
        image = read_image(file)
        found = detect(detector, module, image, settings, confidence, device)
        write_image(target, draw(image, found, detector.class_names))
    return targets


def detect(
    detector: Detector,
    module: nn.Module,
    image: Tensor,
    config: EvaluationConfig,
    confidence: float,
    device: torch.device,
) -> Detections:
    """The detections in one image uint8 [3, H, W], in its own pixels and on the CPU, as evaluation would find them."""
    height, width = image.shape[1:]
    batch = make_batches([(height, width)], config.image_size, detector.stride, 1, config.rectangular)[0]
    placed, placement = place(image, config.image_size, batch.height, batch.width, config.shrink)
    found = detector.detect(module, placed[None].to(device), confidence, config.iou, config.max_detections)[0]
    masks = None if found.masks is None else _masks_back(found.masks.cpu(), placement)
    return Detections(placement.back(found.boxes.cpu()), found.scores.cpu(), found.labels.cpu(), masks)


def _masks_back(masks: Tensor, placement: Placement) -> Tensor:
    """Masks [n, H, W] of the batch -> those of the original."""
    height, width = placement.height, placement.width
    rows, columns = round(height * placement.scale_y), round(width * placement.scale_x)
    inside = masks[:, placement.top : placement.top + rows, placement.left : placement.left + columns].float()
    if not len(masks):
        return torch.zeros(0, height, width, dtype=torch.bool)
    return F.interpolate(inside[None], (height, width), mode="bilinear", align_corners=False)[0] > 0.5


def _settings(weights: Path) -> EvaluationConfig:
    """Those of the run that the weights belong to, else the defaults."""
    for folder in (weights, *weights.parents[:2]):
        if (folder / "config.yaml").is_file():
            return load_config(folder / "config.yaml").evaluation
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
    originals = {file.resolve() for file in files}
    taken: dict[Path, Path] = {}
    for file in files:
        target = out / f"{file.stem}.png"
        if target.resolve() in originals:
            raise UserError(f"{target}: is one of the images; give another folder with --out")
        if target in taken:
            raise UserError(f"{target}: would be the picture of {taken[target]} and of {file}; draw them one by one")
        taken[target] = file
    return list(taken)
