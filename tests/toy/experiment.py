"""Whole experiments with the toy detector: their files, several commands in one process, and their page.

COCO files without images are here too, with detections of their objects, and their AP by pycocotools and by ours.

`python -m toy.experiment FILE` imports torch once for several commands. FILE is a JSON list of lists of words; a
command whose first word is a number is interrupted in that epoch of training.
"""

import base64
import contextlib
import copy
import io
import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import patch
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import distributed

from common.cli import main
from common.detection.average_precision import score
from common.detection.coco_json import read_coco
from common.distillation import trainer
from common.evaluation import coco
from common.evaluation.datasets import as_coco
from common.runtime.errors import UserError
from common.runtime.files import read_checked_json, read_json, sha256, write_checked_json

_choose, _join, _leave = trainer.choose, distributed.init_process_group, distributed.destroy_process_group
VOID = {"meta", "img", "br", "image", "rect"}  # elements without an end
CONFIG = """
family: toy
weights: {folder}/toy.txt
run_dir: {folder}/run
device: cpu
data: {{images: {folder}/images, annotations: {folder}/annotations.json}}
synthesis:
  directory: {folder}/synthetic
  num_images: 6
  image_size: 64
  batch_size: 3
  iterations: 2
  low_resolution_size: 32
  low_resolution_iterations: 4
  label_sampling: {{every: 2}}
quantization: {{weight_bits: 4, activation_bits: 4, calibration_images: 4, calibration_batch_size: 2}}
training: {{epochs: 2, batch_size: 2, holdout: 0.34, learning_rate: 0.001}}
evaluation: {{image_size: 64, batch_size: 2, directory: {folder}/measured}}
"""

SIDE = 40


def write_experiment(folder: Path) -> Path:
    """Returns the configuration's path."""
    (folder / "toy.txt").write_text("3")
    write_coco(folder, boxes=2)
    (folder / "experiment.yaml").write_text(CONFIG.format(folder=folder))
    return folder / "experiment.yaml"


def write_coco(folder: Path, boxes: int, classes: tuple[str, ...] = ("circle", "square")) -> None:
    """Four noisy images of 64 by 48 pixels with `boxes` bright boxes in each."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(exist_ok=True)
    images, annotations = [], []
    for i in range(1, 5):
        pixels = rng.integers(0, 120, (48, 64, 3), dtype=np.uint8)
        for n in range(boxes):
            x, y = int(rng.integers(0, 40)), int(rng.integers(0, 24))
            pixels[y : y + 20, x : x + 20] = 255
            annotation = {"bbox": [x, y, 20, 20], "area": 400, "iscrowd": 0, "category_id": 1 + n % len(classes)}
            annotations.append(annotation | {"id": len(annotations) + 1, "image_id": i})
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 48})
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))


def rename_classes(imageset: Path, name: str) -> None:
    """Calls the classes of a finished set `name` with a number behind."""
    path = imageset / "annotations.json"
    head, start, classes = path.read_text().partition('"categories": ')
    rows = [row | {"name": f"{name}{row['id']}"} for row in json.loads(classes[:-2])]
    path.write_text(head + start + "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]}\n")
    description = read_checked_json(imageset / "set.json")
    write_checked_json(imageset / "set.json", description | {"annotations_sha256": sha256(path)})


class Page(HTMLParser):
    """A page as tests read it: all elements, and for each section its text and the texts of its tables' cells."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.places, self.text, self.rows = [], [], {}, {}
        self.section, self.cell, self.open = "header", None, []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.places.append(self.section)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "h2":
            self.section = attributes["id"]
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.cell = []

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, self.getpos()
        if tag in ("td", "th"):
            self.rows[self.section][-1].append(" ".join(" ".join(self.cell).split()))
            self.cell = None

    def handle_data(self, data):
        self.text[self.section] = " ".join((self.text.get(self.section, "") + " " + data).split())
        if self.cell is not None:
            self.cell.append(data)

    def attributes(self, tag, section=None):
        found = zip(self.tags, self.places, strict=True)
        return [attributes for (name, attributes), place in found if name == tag and section in (None, place)]

    def check_alone(self):
        """Nothing is loaded from outside, nothing runs, and every image can be decoded."""
        assert self.open == []
        assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in self.tags}
        assert "http://" not in self.source
        assert "https://" not in self.source
        targets = {f"#{attributes['id']}" for _, attributes in self.tags if "id" in attributes}
        assert {attributes["href"] for attributes in self.attributes("a")} <= targets
        for attributes in self.attributes("img") + self.attributes("image"):
            header, _, content = (attributes.get("src") or attributes["href"]).partition(",")
            assert header in ("data:image/svg+xml;base64", "data:image/jpeg;base64")
            content = base64.b64decode(content, validate=True)
            if "svg" in header:
                ElementTree.fromstring(content)
            else:
                Image.open(io.BytesIO(content)).load()


def interrupted_in(epoch):
    def choose(job, progress, *arguments):
        if progress.epoch == epoch:
            raise KeyboardInterrupt
        _choose(job, progress, *arguments)

    return choose


def join_once(*arguments, **options):
    if not distributed.is_initialized():
        _join(*arguments, **options)


def gather_and_tell(rows):
    gathered = gather(rows)
    sys.stdout.write(f"process {distributed.get_rank()}: {len(gathered)} detections\n")
    return gathered


if __name__ == "__main__":
    gather, coco.gather_to_rank_zero = coco.gather_to_rank_zero, gather_and_tell
    distributed.init_process_group, distributed.destroy_process_group = join_once, lambda: None
    for words in json.loads(Path(sys.argv[1]).read_text()):
        epoch = words.pop(0) if isinstance(words[0], int) else None
        with patch.object(trainer, "choose", interrupted_in(epoch)):
            status = main(words)
    if distributed.is_initialized():
        _leave()
    sys.exit(status)


def correct(seed=0, masks=False):
    """Six images with three objects each, one of them a crowd."""
    rng = np.random.default_rng(seed)
    images = [{"id": 10 + i, "file_name": f"{i}.png", "width": SIDE, "height": SIDE} for i in range(6)]
    annotations = []
    for i in range(18):
        x, y, w, h = rng.uniform(1, SIDE / 2, 4).round(2).tolist()
        row = {"id": i + 1, "image_id": 10 + i // 3, "category_id": 3 + i % 2, "bbox": [x, y, w, h]}
        row |= {"area": w * h, "iscrowd": int(i == 17)}
        outline = [x, y, x + w, y, x + w, y + h, x, y + h]
        if masks and i % 2:
            row["segmentation"] = coco_mask.frPyObjects([outline], SIDE, SIDE)[0]
            row["segmentation"]["counts"] = row["segmentation"]["counts"].decode()
        elif masks:
            row["segmentation"] = [outline]
        annotations.append(row)
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 3, "name": "a"}, {"id": 4, "name": "b"}],
    }


def detections(content, masks=False):
    """The objects moved a little, with scores."""
    rng = np.random.default_rng(1)
    rows = []
    for row in content["annotations"]:
        box = (np.array(row["bbox"]) + rng.normal(0, 1.2, 4)).clip(0.5).round(3).tolist()
        found = {"image_id": row["image_id"], "category_id": row["category_id"], "bbox": box}
        found["score"] = round(float(rng.uniform(0.1, 1)), 5)
        if masks:
            x, y, w, h = box
            found["segmentation"] = coco_mask.frPyObjects([[x, y, x + w, y, x + w, y + h, x, y + h]], SIDE, SIDE)[0]
        rows.append(found)
    return rows


def reference(content, found, kind="bbox"):
    """pycocotools itself."""
    coco = COCO()
    coco.dataset = {"info": {}} | copy.deepcopy(content)
    found = [{k: v for k, v in row.items() if kind == "bbox" or k != "bbox"} for row in copy.deepcopy(found)]
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[:6].tolist()


def ours(content, found, kind="bbox"):
    metrics = score(content, copy.deepcopy(found), kind)
    return [metrics[name] for name in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")]


def read(folder, content, **options):
    path = folder / "set.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_coco(path, **{"files": True, "to_score": True} | options)


def converted(data, folder):
    """The content of the COCO file that a set of another format becomes."""
    return read_json(as_coco(data, folder / "converted").annotations)


def refused(data, folder):
    """The lines of the refusal; nothing is left behind."""
    with pytest.raises(UserError) as error:
        as_coco(data, folder / "converted")
    assert not list((folder / "converted").glob("*.json"))
    return str(error.value).splitlines()
