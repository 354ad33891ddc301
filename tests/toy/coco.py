"""A COCO file without images, detections of its objects, and their AP by pycocotools and by ours."""

import contextlib
import copy
import io
import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from common.detection.average_precision import score
from common.detection.coco_json import read_coco
from common.evaluation.datasets import as_coco
from common.runtime.errors import UserError
from common.runtime.files import read_json

SIDE = 40


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
