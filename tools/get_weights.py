"""Downloads and verifies the official float checkpoints.

python -m tools.get_weights                             # all of them into weights/
python -m tools.get_weights yolo11s.pt yolov5s.pt --folder weights
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from torchvision.models import detection

from common.runtime.errors import Parser, UserError
from common.runtime.files import sha256
from tools import report
from tools.get_data import Source, fetch
from vit.models import OFFICIAL as VIT_OFFICIAL
from vit.models import RELEASE as VIT_RELEASE
from yolov5.adapter import RELEASE as YOLOV5_RELEASE
from yolov5.adapter import SHA256 as YOLOV5_SHA256

YOLO11_RELEASE = "https://github.com/ultralytics/assets/releases/download/v8.3.0"
YOLO11_SHA256 = {
    "yolo11n.pt": "0ebbc80d4a7680d14987a577cd21342b65ecfd94632bd9a8da63ae6417644ee1",
    "yolo11s.pt": "85a76fe86dd8afe384648546b56a7a78580c7cb7b404fc595f97969322d502d5",
    "yolo11m.pt": "d5ffc1a674953a08e11a8d21e022781b1b23a19b730afc309290bd9fb5305b95",
    "yolo11l.pt": "9ebd0e09d59811db4b1d61e2bc6730649608b1ac47f8dd01e2da6bca7c20023f",
}
# The file names of torchvision and OpenMMLab end in the first digits of their SHA-256.
NAMED = (
    detection.MaskRCNN_ResNet50_FPN_Weights.COCO_V1.url,
    *(f"{VIT_RELEASE}/{name.rsplit('_', 2)[0]}/{name}" for name in VIT_OFFICIAL),
)
CHECKPOINTS = {
    source.name: source
    for source in (
        *(Source(f"{YOLOV5_RELEASE}/yolov5{s}.pt", YOLOV5_SHA256[f"yolov5{s}.pt"], "sha256") for s in "nsml"),
        *(Source(f"{YOLO11_RELEASE}/{name}", digest, "sha256") for name, digest in YOLO11_SHA256.items()),
        *(Source(url, url.rpartition("-")[2].removesuffix(".pth"), "sha256") for url in NAMED),
    )
}


def main(argv: list[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    known = "\n  ".join(["checkpoints:", *CHECKPOINTS])
    parser = Parser(prog="python -m tools.get_weights", description=__doc__, epilog=known, formatter_class=form)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these, see below (default: all)")
    parser.add_argument("--folder", type=Path, default=Path("weights"), help="target folder (default: weights)")
    parser.add_argument("--mirror", metavar="URL", help="folder on another server with the same files")
    arguments = parser.parse_args(argv)
    return report(_get_all(arguments))


def _get_all(arguments: argparse.Namespace) -> Iterator[str]:
    for name in arguments.names or CHECKPOINTS:
        if name not in CHECKPOINTS:
            raise UserError(f"found {name!r}; known checkpoints are {', '.join(CHECKPOINTS)}")
        source = CHECKPOINTS[name]
        if arguments.mirror:
            source = Source(f"{arguments.mirror.rstrip('/')}/{name}", source.digest, source.algorithm)
        path = fetch(source, arguments.folder / name)
        unchecked = "" if source.digest else f" (no published checksum; SHA-256 {sha256(path)})"
        yield f"{path}{unchecked}"


if __name__ == "__main__":
    sys.exit(main())
