"""What YOLOv5's val.py does (v7.0: utils/dataloaders.py, models/yolo.py, utils/general.py, utils/metrics.py, val.py).

Written from those files with Ultralytics' blocks for the network, and without anything of zsqdet.
"""

import math

import cv2
import numpy as np
import torch
from torch.nn.functional import conv2d
from torchvision.ops import box_iou, nms

ANCHORS = [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119], [116, 90, 156, 198, 373, 326]]
STRIDES = (8, 16, 32)
THRESHOLDS = torch.linspace(0.5, 0.95, 10)


def network(state):
    """The function from images to raw maps: Ultralytics' parser for blocks 0 to 23, 1x1 convolutions for the head."""
    from ultralytics.nn.tasks import DetectionModel

    upstream = DetectionModel("yolov5n.yaml", nc=80, verbose=False).float().eval()
    own = {name: tensor for name, tensor in state.items() if not name.startswith("model.24.")}
    missing = upstream.load_state_dict(own, strict=False)
    assert not missing.unexpected_keys
    assert all(name.startswith("model.24.") for name in missing.missing_keys)
    features = []
    upstream.model[-1] = torch.nn.Identity()  # in place of Ultralytics' own head
    upstream.model[-1].f, upstream.model[-1].i = [17, 20, 23], 24
    upstream.model[-1].register_forward_pre_hook(lambda _, inputs: features.extend(inputs[0]))

    def forward(images):
        features.clear()
        upstream(images)
        head = [(state[f"model.24.m.{i}.weight"], state[f"model.24.m.{i}.bias"]) for i in range(3)]
        return [conv2d(x, *parameters) for x, parameters in zip(features, head, strict=True)]

    return forward


def decoded(maps):
    """Rows [B, N, 5 + nc]: centre and size in pixels, objectness, classes."""
    rows = []
    for raw, anchors, stride in zip(maps, ANCHORS, STRIDES, strict=True):
        batch, _, height, width = raw.shape
        y = raw.view(batch, 3, -1, height, width).permute(0, 1, 3, 4, 2).sigmoid()
        ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        grid = torch.stack((xs, ys), 2).view(1, 1, height, width, 2) - 0.5
        xy = (y[..., :2] * 2 + grid) * stride
        wh = (y[..., 2:4] * 2) ** 2 * torch.tensor(anchors).view(1, 3, 1, 1, 2)
        rows.append(torch.cat((xy, wh, y[..., 4:]), 4).view(batch, -1, y.shape[-1]))
    return torch.cat(rows, 1)


def suppressed(rows, confidence=0.001, iou=0.6, max_detections=300):
    """Rows of one image [N, 5 + nc] to detections xyxy, score, class; several labels to a box, classes apart."""
    rows = rows[rows[:, 4] > confidence]
    scores = rows[:, 5:] * rows[:, 4:5]
    corners = torch.cat((rows[:, :2] - rows[:, 2:4] / 2, rows[:, :2] + rows[:, 2:4] / 2), 1)
    i, j = (scores > confidence).nonzero().T
    found = torch.cat((corners[i], scores[i, j, None], j[:, None].float()), 1)
    found = found[found[:, 4].argsort(descending=True)[:30000]]
    return found[nms(found[:, :4] + found[:, 5:6] * 7680, found[:, 4], iou)[:max_detections]]


def batches(sizes, image_size, batch_size):
    """(indices, height, width) of rectangular batches of images of these (height, width)."""
    ratios = np.array([height / width for height, width in sizes])
    order = ratios.argsort()
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        low, high = ratios[part].min(), ratios[part].max()
        shape = [high, 1] if high < 1 else [1, 1 / low] if low > 1 else [1, 1]
        yield part.tolist(), *(np.ceil(np.array(shape) * image_size / 32 + 0.5).astype(int) * 32).tolist()


def letterboxed(path, image_size, height, width):
    """The image [3, height, width] in [0, 1], and the two ways to bring boxes xyxy back into its own pixels."""
    pixels = cv2.imread(str(path))
    h0, w0 = pixels.shape[:2]
    ratio = image_size / max(h0, w0)
    if ratio != 1:
        how = cv2.INTER_LINEAR if ratio > 1 else cv2.INTER_AREA
        pixels = cv2.resize(pixels, (math.ceil(w0 * ratio), math.ceil(h0 * ratio)), interpolation=how)
    h, w = pixels.shape[:2]
    dw, dh = (width - w) / 2, (height - h) / 2
    top, bottom, left, right = round(dh - 0.1), round(dh + 0.1), round(dw - 0.1), round(dw + 0.1)
    pixels = cv2.copyMakeBorder(pixels, top, bottom, left, right, cv2.BORDER_CONSTANT, value=(114, 114, 114))
    image = torch.from_numpy(pixels.transpose(2, 0, 1)[::-1].copy()).float() / 255

    def from_place(boxes):
        """From where the image really lies."""
        return _scaled(boxes, (left, top), (w / w0, h / h0), (w0, h0))

    def as_val_py(boxes):
        """Half of an odd gap is half a pixel off, and the height's scale serves for both directions."""
        return _scaled(boxes, (dw, dh), (h / h0, h / h0), (w0, h0))

    return image, from_place, as_val_py


def _scaled(boxes, shift, scale, limit):
    return torch.minimum(
        ((boxes - torch.tensor(shift * 2)) / torch.tensor(scale * 2)).clamp(min=0), torch.tensor(limit * 2)
    )


@torch.no_grad()
def detections(state, paths, image_size, batch_size):
    """Rows xyxy in its own pixels, score, class of each image: from its real place, and as val.py computes them."""
    forward = network(state)
    found, scaled = [None] * len(paths), [None] * len(paths)
    sizes = [cv2.imread(str(path)).shape[:2] for path in paths]
    for part, height, width in batches(sizes, image_size, batch_size):
        images, *back = zip(*(letterboxed(paths[i], image_size, height, width) for i in part), strict=True)
        for i, from_place, as_val_py, rows in zip(part, *back, decoded(forward(torch.stack(images))), strict=True):
            rows = suppressed(rows)
            found[i], scaled[i] = (torch.cat((f(rows[:, :4]), rows[:, 4:]), 1) for f in (from_place, as_val_py))
    return found, scaled


def average_precision(found, labels):
    """val.py's mAP50-95: of detections (rows xyxy, score, class) and labels (rows class, xyxy) of each image."""
    correct = np.concatenate([_correct(rows, wanted) for rows, wanted in zip(found, labels, strict=True)])
    rows, truth = torch.cat(found).numpy(), torch.cat(labels)[:, 0].numpy()
    order = np.argsort(-rows[:, 4])
    correct, classes = correct[order], rows[order, 5]
    averages = []
    for label in np.unique(truth):
        hits = correct[classes == label].cumsum(0)  # [n, 10]
        recall, precision = hits / (truth == label).sum(), hits / np.arange(1, len(hits) + 1)[:, None]
        averages += [_area(recall[:, k], precision[:, k]) if len(hits) else 0.0 for k in range(10)]
    return float(np.mean(averages))


def _correct(rows, wanted):
    """Which detections are right at each of the ten thresholds [n, 10]."""
    correct = np.zeros((len(rows), 10), bool)
    overlap = box_iou(wanted[:, 1:], rows[:, :4]) * (wanted[:, :1] == rows[:, 5])
    for k, threshold in enumerate(THRESHOLDS):
        pairs = (overlap >= threshold).nonzero()
        pairs = pairs[overlap[pairs[:, 0], pairs[:, 1]].argsort(descending=True)].numpy()
        pairs = pairs[np.unique(pairs[:, 1], return_index=True)[1]]  # the best label of each detection
        pairs = pairs[np.unique(pairs[:, 0], return_index=True)[1]]  # the first detection of each label
        correct[pairs[:, 1], k] = True
    return correct


def _area(recall, precision):
    """101-point interpolation; unlike COCO's, precision falls in a straight line behind the last detection."""
    recall, precision = np.concatenate(([0.0], recall, [1.0])), np.concatenate(([1.0], precision, [0.0]))
    envelope = np.flip(np.maximum.accumulate(np.flip(precision)))
    points = np.linspace(0, 1, 101)
    return np.trapezoid(np.interp(points, recall, envelope), points)
