"""Downloads and verifies COCO 2017 and Pascal VOC. Resumable; existing files are kept.

python -m tools.get_data coco data/coco                 # images/val2017, images/train2017, annotations: 21 GB
python -m tools.get_data coco data/coco --only val2017 annotations
python -m tools.get_data voc2007 data/voc               # VOCdevkit/VOC2007, trainval and test
python -m tools.get_data voc2012 data/voc               # VOCdevkit/VOC2012, trainval
"""

import argparse
import hashlib
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO

from torchvision.datasets.voc import DATASET_YEAR_DICT
from tqdm import tqdm

from common.runtime.errors import Parser, UserError
from common.runtime.files import atomic, disk_problem, read_json, write_json
from tools import report

CHUNK = 1 << 20  # bytes
RETRIES = 5  # consecutive attempts without new data
PAUSE = 2.0  # seconds between them
TIMEOUT = 60.0
SCHEMES = ("https://", "http://", "file://")
RANGE_NOT_SATISFIABLE = 416  # HTTP status: the requested range starts at the end of the file, so it is complete
RECEIPTS = ".archives"  # folder with the file list of each unpacked archive


@dataclass(frozen=True)
class Source:
    """A file on a server. `digest` is hexadecimal, possibly only its first digits; None if unknown."""

    url: str
    digest: str | None
    algorithm: str = "md5"
    size: int | None = None  # bytes

    @property
    def name(self) -> str:
        """File name, without the path."""
        return self.url.rpartition("/")[2]


def fetch(source: Source, path: Path) -> Path:
    """Downloads a file, resuming a partial download; returns at once if the file exists and its checksum is right.

    Raises:
        UserError: not a URL, no connection, no disk space, a wrong checksum, or another file of that name.
        OSError: the disk is read-only, or became full.
    """
    if path.exists():
        if not _is_right(source, path):
            raise UserError(
                f"{path}: exists, but its size or checksum differs from the published file; remove it and rerun"
            )
        return path
    if not source.url.startswith(SCHEMES):
        raise UserError(f"{source.url}: not a URL; allowed are {', '.join(SCHEMES)}")
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    begun = part.stat().st_size if part.exists() else 0
    if source.size is not None:
        check_space(path.parent, source.size - begun)
    _complete(source, part)
    if not _is_right(source, part):
        part.unlink()
        raise UserError(
            f"{source.url}: size or checksum differs from the published file; the download was deleted, rerun it"
        )
    part.replace(path)
    return path


def unpack(archive: Path, folder: Path, images: int | None = None) -> int:
    """Unpacks a .zip or .tar into a folder and records its files; existing files are kept.

    Args:
        archive: the file.
        folder: the paths in the archive are relative to it.
        images: expected number of .jpg files; None: any number.

    Returns:
        The number of files in the archive.

    Raises:
        UserError: a damaged archive, another number of images, or a different existing file.
    """
    sizes: dict[str, int] = {}
    try:
        for name, size, stream in tqdm(_members(archive), desc=f"unpacking {archive.name}", unit="", disable=None):
            target = folder / name
            sizes[name] = size
            if not target.exists():
                with atomic(target) as temporary, temporary.open("wb") as out:
                    shutil.copyfileobj(stream, out)
            elif target.stat().st_size != size:
                raise UserError(
                    f"{target}: exists, but its size differs from the one in {archive.name}; remove it and rerun"
                )
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise UserError(f"{archive}: damaged archive ({error}); remove it and rerun") from error
    found = sum(name.endswith(".jpg") for name in sizes)
    if images is not None and found != images:
        raise UserError(f"{archive}: holds {found} images instead of {images}; remove it and rerun")
    write_json(_receipt(folder, archive.name), sizes)
    return len(sizes)


def is_unpacked(folder: Path, archive: str) -> bool:
    """Whether every file of an archive exists with the right size."""
    receipt = _receipt(folder, archive)
    if not receipt.exists():
        return False
    return all((p := folder / name).is_file() and p.stat().st_size == size for name, size in read_json(receipt).items())


def check_space(folder: Path, needed: int) -> None:
    """Checks that `needed` bytes are free where `folder` is or will be.

    Raises:
        UserError: fewer are free.
    """
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{folder}: {free / 1e9:.1f} GB are free, {needed / 1e9:.1f} GB are needed; free space or choose another "
            "folder"
        )


def _complete(source: Source, part: Path) -> None:
    """Requests the rest of the file until it is complete."""
    tries, problem = 0, "the connection was cut"
    with tqdm(total=source.size, desc=source.name, unit="B", unit_scale=True, disable=None) as bar:
        while tries < RETRIES:
            before = part.stat().st_size if part.exists() else 0
            bar.n = before
            bar.refresh()
            try:
                if _receive(source, part, bar):
                    return
            except urllib.error.HTTPError as error:
                if error.code == RANGE_NOT_SATISFIABLE and before:
                    return
                if error.code < 500:
                    raise UserError(f"{source.url}: the server answers {error.code} {error.reason}") from error
                problem = f"{error.code} {error.reason}"
            except (OSError, HTTPException) as error:
                if isinstance(error, OSError) and disk_problem(error):
                    raise
                problem = str(getattr(error, "reason", error))
            progressed = part.exists() and part.stat().st_size > before
            tries = 0 if progressed else tries + 1
            if tries:
                time.sleep(PAUSE)
    raise UserError(f"{source.url}: cannot be downloaded ({problem}); rerun when online to resume")


def _receive(source: Source, part: Path, bar: tqdm) -> bool:
    """One HTTP range request for the rest of a file; True if the file is complete."""
    begun = part.stat().st_size if part.exists() else 0
    if source.size is not None and begun >= source.size:
        return True
    request = urllib.request.Request(source.url, headers={"Range": f"bytes={begun}-"} if begun else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        begun = begun if answer.status == 206 else 0  # without range support the server sends the whole file
        length = answer.headers.get("Content-Length")
        total = begun + int(length) if length is not None else None
        if source.size is not None and total is not None and total != source.size:
            raise UserError(f"{source.url}: found {total} bytes instead of {source.size}; not the published file")
        if total is not None:
            check_space(part.parent, total - begun)
        bar.total, bar.n = total, begun
        with part.open("ab" if begun else "wb") as out:
            while chunk := answer.read(CHUNK):
                out.write(chunk)
                bar.update(len(chunk))
    return total is None or part.stat().st_size == total


def _is_right(source: Source, path: Path) -> bool:
    if source.size is not None and path.stat().st_size != source.size:
        return False
    if source.digest is None:
        return True
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, source.algorithm).hexdigest().startswith(source.digest)


def _members(archive: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Path, size and content of each regular file."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as content:
            for info in content.infolist():
                if not info.is_dir():
                    with content.open(info) as stream:
                        yield _safe(info.filename, archive), info.file_size, stream
    else:
        with tarfile.open(archive) as content:
            for member in content:
                if member.isfile() and (extracted := content.extractfile(member)) is not None:
                    yield _safe(member.name, archive), member.size, extracted


def _safe(name: str, archive: Path) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{archive}: holds {name!r}, a path outside the folder; refused")
    return str(path)


def _receipt(folder: Path, archive: str) -> Path:
    return folder / RECEIPTS / f"{archive}.json"


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
        UserError: as `fetch` and `unpack`.
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
    parser = Parser(prog="python -m tools.get_data", description=__doc__, formatter_class=form)
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
