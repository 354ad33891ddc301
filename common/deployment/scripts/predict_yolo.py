"""Detects objects in images with model.onnx: python predict.py IMAGE... Needs onnxruntime, numpy and pillow."""

import ast
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps

CONFIDENCE, IOU = 0.25, 0.7


def letterbox(image: Image.Image, height: int, width: int) -> tuple[np.ndarray, float, int, int]:
    """The image in the middle of a grey one, [1, 3, height, width] in [0, 1]; its scale and its left and top edge."""
    scale = min(width / image.width, height / image.height)
    size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    left, top, grey = (width - size[0]) // 2, (height - size[1]) // 2, (114, 114, 114)
    data = (x := image.width / size[0]), 0, -x * left, 0, (y := image.height / size[1]), -y * top  # as cv2.resize
    padded = image.transform((width, height), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR, fillcolor=grey)
    return np.asarray(padded, np.float32).transpose(2, 0, 1)[None] / 255, scale, left, top


def suppress(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> list[int]:
    """Indices of the boxes [n, 4] xyxy that stay, best score first; classes do not suppress each other."""
    apart = boxes + labels[:, None] * 1e5
    area, order, kept = (apart[:, 2] - apart[:, 0]) * (apart[:, 3] - apart[:, 1]), scores.argsort()[::-1], []
    while len(order):
        best, order = int(order[0]), order[1:]
        kept.append(best)
        corner = np.maximum(apart[best, :2], apart[order, :2]), np.minimum(apart[best, 2:], apart[order, 2:])
        inner = np.clip(corner[1] - corner[0], 0, None).prod(1)
        order = order[inner / (area[best] + area[order] - inner) <= IOU]
    return kept


if not sys.argv[1:] or sys.argv[1].startswith("-"):
    sys.exit("usage: python predict.py IMAGE...")
options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.x64quantprecision", "1")  # exact on processors without VNNI as well
session = onnxruntime.InferenceSession(str(Path(__file__).with_name("model.onnx")), options)
about = session.get_modelmeta().custom_metadata_map
names, (height, width), one_to_one = (ast.literal_eval(about.get(k, "False")) for k in ("names", "imgsz", "end2end"))
for path in sys.argv[1:]:
    image = ImageOps.exif_transpose(Image.open(path))
    image = (image.point(lambda x: x / 256) if image.mode[0] == "I" else image).convert("RGB")  # of 16 bits the upper 8
    pixels, scale, left, top = letterbox(image, height, width)
    rows = session.run(None, {session.get_inputs()[0].name: pixels})[0][0]
    if one_to_one:  # [300, 6]: xyxy, score, class
        boxes, scores, labels = rows[:, :4], rows[:, 4], rows[:, 5]
    else:  # [4 + classes, N]: xywh, scores
        boxes, scores, labels = rows[:4].T, rows[4:].max(0), rows[4:].argmax(0)
        boxes = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
    boxes, scores, labels = (x[scores > CONFIDENCE] for x in (boxes, scores, labels))
    boxes = (boxes - [left, top, left, top]) / scale
    for i in range(len(boxes)) if one_to_one else suppress(boxes, scores, labels):
        print(f"{path}: {names[int(labels[i])]} {scores[i]:.2f} at {boxes[i].round().astype(int).tolist()}")
        ImageDraw.Draw(image).rectangle(boxes[i].tolist(), outline="red", width=2)
    image.save(f"{Path(path).stem}_detected.png")
