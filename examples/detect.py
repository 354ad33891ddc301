"""What the quantized detector of a run sees in an image: python examples/detect.py RUN IMAGE"""

import sys
from pathlib import Path

import zsqdet
from common.evaluation.resize import place
from common.runtime.images import read_image

if len(sys.argv) != 3:
    sys.exit("usage: python examples/detect.py RUN IMAGE")
SIZE = 320  # pixels; evaluation.image_size of the run

detector = zsqdet.load(sys.argv[1]).detector
image, placement = place(read_image(Path(sys.argv[2])), SIZE, SIZE, SIZE)
(found,) = detector.detect(image[None])
for box, score, label in zip(placement.back(found.boxes), found.scores, found.labels, strict=True):
    print(f"{detector.class_names[label]} {score:.2f} at {[round(side) for side in box.tolist()]}")
