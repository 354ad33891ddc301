"""Sets as people have them, converted once to COCO annotations: a data.yaml of Ultralytics, a folder of Pascal VOC."""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from common.config.schema import DataConfig
from common.evaluation.pascal_voc import check_voc, read_voc
from common.evaluation.yolo_labels import read_yolo, read_yolo_yaml
from common.runtime.errors import UserError
from common.runtime.files import atomic, lock

log = logging.getLogger("zsqdet")
YAML = (".yaml", ".yml")


def check_data(data: DataConfig) -> None:
    """Finds mistakes that show without reading a label or an image, so that they come before hours of work.

    Raises:
        UserError: a path that does not exist or is of another kind, a data.yaml with mistakes.
    """
    if data.dataset is not None:
        if _is_yaml(data.dataset):
            read_yolo_yaml(data.dataset, data.split)
        else:
            check_voc(data.dataset, data.split)
    given = {"data.images": data.images, "data.annotations": data.annotations}
    for key, path in given.items():
        if path is None:
            continue
        if not path.exists():
            raise UserError(f"{key}: found {path}, which does not exist; relative paths are relative to {Path.cwd()}")
        if path.is_dir() != (key == "data.images"):
            is_a, needed = ("a folder", "COCO JSON file") if path.is_dir() else ("a file", "folder of the images")
            raise UserError(f"{key}: found {path}, {is_a}; give the {needed}")


def as_coco(data: DataConfig, folder: Path) -> DataConfig:
    """`data` with `images` and `annotations`, what `dataset` names being written as a COCO file into `folder`.

    The name of that file holds the hash of its content: the same set makes the same file, changed labels another one.

    Raises:
        UserError: a line for each mistake of the labels.
    """
    if data.dataset is None:
        return data
    read = read_yolo if _is_yaml(data.dataset) else read_voc
    content = read(data.dataset, data.split)
    rows = content["images"]
    if not content["annotations"]:
        raise UserError(f"{data.dataset}: {data.split}: {len(rows)} images without any object; nothing to measure")
    root = Path(os.path.commonpath([os.path.dirname(row["file_name"]) for row in rows]))
    for row in rows:
        row["file_name"] = os.path.relpath(row["file_name"], root)
    file = _write(content, folder, data)
    return data.model_copy(update={"images": root, "annotations": file})


def _is_yaml(path: Path) -> bool:
    """Whether it is read as a data.yaml; otherwise as a folder of Pascal VOC.

    Raises:
        UserError: it does not exist, or is neither.
    """
    if not path.exists():
        raise UserError(f"data: found {path}, which does not exist; relative paths are relative to {Path.cwd()}")
    if not path.is_dir() and path.suffix.lower() not in YAML:
        raise UserError(
            f"data: found {path}; allowed are a data.yaml of Ultralytics and a folder of Pascal VOC; "
            "a COCO file goes with its images: data.images=DIR data.annotations=FILE"
        )
    return not path.is_dir()


def _write(content: dict[str, Any], folder: Path, data: DataConfig) -> Path:
    text = json.dumps(content)
    assert data.dataset is not None
    name = f"{data.dataset.resolve().stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    with lock(folder):
        file = folder / name
        if not file.is_file() or file.read_bytes() != text.encode():  # none, or a damaged one
            with atomic(file) as temporary:
                temporary.write_text(text, encoding="utf-8")
            counts = f"{len(content['images'])} images, {len(content['annotations'])} objects"
            log.info("%s: %s: %s, converted to %s", data.dataset, data.split, counts, file)
    return file
