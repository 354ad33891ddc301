"""Downloads and verifies COCO 2017 and Pascal VOC. Resumable; existing files are kept.

python -m tools.get_data coco data/coco                 # images/val2017, images/train2017, annotations: 21 GB
python -m tools.get_data coco data/coco --only val2017 annotations
python -m tools.get_data voc2007 data/voc               # VOCdevkit/VOC2007, trainval and test
python -m tools.get_data voc2012 data/voc               # VOCdevkit/VOC2012, trainval
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets.voc import DATASET_YEAR_DICT

from common.runtime.errors import UserError
from tools import report
from tools.archives import Source, check_space, fetch, is_unpacked, unpack


@dataclass(frozen=True)
class Part:
    """One archive of a dataset."""

    source: Source
    into: str  # subfolder to unpack into
    images: int  # .jpg files in it
    unpacked: int  # bytes, approximate


_COCO = "http://images.cocodataset.org"


def _coco(path: str, digest: str, size: int, into: str, images: int, unpacked: float) -> Part:
    return Part(Source(f"{_COCO}/{path}", digest, size=size), into, images, round(unpacked))


def _voc(year: str, size: int, images: int, unpacked: float) -> Part:
    about = DATASET_YEAR_DICT[year]
    return Part(Source(about["url"], about["md5"], size=size), ".", images, round(unpacked))


# MD5 and sizes: COCO as in public download scripts, VOC from torchvision.
SETS: dict[str, dict[str, Part]] = {
    "coco": {
        "annotations": _coco(
            "annotations/annotations_trainval2017.zip", "f4bbac642086de4f52a3fdda2de5fa2c", 252907541, ".", 0, 0.9e9
        ),
        "val2017": _coco("zips/val2017.zip", "442b8da7639aecaf257c1dceb8ba8c80", 815585330, "images", 5000, 0.9e9),
        "train2017": _coco(
            "zips/train2017.zip", "cced6f7f71b7629ddf16f17bbcfab6b2", 19336861798, "images", 118287, 20e9
        ),
    },
    "voc2007": {
        "trainval": _voc("2007", 460032000, 5011, 0.5e9),
        "test": _voc("2007-test", 451020800, 4952, 0.5e9),
    },
    "voc2012": {"trainval": _voc("2012", 1999639040, 17125, 2.1e9)},
}


def get(part: Part, folder: Path, mirror: str | None = None, keep: bool = False) -> str:
    """Downloads and unpacks one archive; returns a line for the log.

    Args:
        part: the archive.
        folder: of the dataset.
        mirror: URL of a folder with the same archive.
        keep: keep the archive.

    Raises:
        UserError: as `tools.archives.fetch` and `unpack`.
    """
    source, into = part.source, folder / part.into
    if is_unpacked(into, source.name):
        return f"{source.name}: complete in {into}"
    if mirror:
        source = Source(f"{mirror.rstrip('/')}/{source.name}", source.digest, source.algorithm, source.size)
    archive = folder / source.name
    begun = [p.stat().st_size for p in (archive, archive.with_name(f"{archive.name}.part")) if p.exists()]
    check_space(folder, (source.size or 0) - sum(begun) + part.unpacked)
    fetch(source, archive)
    count = unpack(archive, into, part.images)
    if not keep:
        archive.unlink()
    return f"{source.name}: {count} files in {into}"


def main(argv: list[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tools.get_data", description=__doc__, formatter_class=form)
    parser.add_argument("set", choices=SETS, help="dataset")
    parser.add_argument("folder", type=Path, help="target folder")
    parser.add_argument("--only", nargs="+", metavar="PART", help="only these parts")
    parser.add_argument("--mirror", metavar="URL", help="folder on another server with the same archives")
    parser.add_argument("--keep", action="store_true", help="keep the archives after unpacking")
    arguments = parser.parse_args(argv)
    return report(_get_all(arguments))


def _get_all(arguments: argparse.Namespace) -> Iterator[str]:
    parts = SETS[arguments.set]
    for name in arguments.only or parts:
        if name not in parts:
            raise UserError(f"--only: found {name!r}; {arguments.set} has {', '.join(parts)}")
        yield get(parts[name], arguments.folder, arguments.mirror, arguments.keep)


if __name__ == "__main__":
    sys.exit(main())
