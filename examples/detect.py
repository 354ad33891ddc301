"""What the quantized detector of a run sees in an image: python examples/detect.py RUN IMAGE"""

import sys
from pathlib import Path

import zsqdet
from common.evaluation.resize import place
from common.pipeline.run_dir import stored_settings
from common.runtime.image_files import read_image

if len(sys.argv) != 3:
    sys.exit("usage: python examples/detect.py RUN IMAGE")

detector, size = zsqdet.load(sys.argv[1]).detector, stored_settings(Path(sys.argv[1]))["evaluation.image_size"]
image, placement = place(read_image(Path(sys.argv[2])), size, size, size)
(found,) = detector.detect(image[None])
for box, score, label in zip(placement.back(found.boxes), found.scores, found.labels, strict=True):
    print(f"{detector.class_names[label]} {score:.2f} at {[round(side) for side in box.tolist()]}")
