"""Image files."""

import io
import os
import re
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from threading import Lock

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.runtime.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
PNG, OPAQUE = b"\x89PNG\r\n\x1a\n", 255
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")  # the same, as Pillow names them
GREY = 114  # of 255: around letterboxed images, as YOLO detectors are trained
COMPLAINTS = re.compile(rb"^Corrupt JPEG data(?!.*ICC)|^Premature end of JPEG|TIFF_Error")  # about pixels
NOISE = re.compile(rb"^\[ *(?:WARN|ERROR):\S+ global |^\n$")  # what OpenCV says besides
WIDTH, HEIGHT, ORIENTATION, TURNED = 256, 257, 274, (5, 6, 7, 8)  # of TIFF and Exif; the values that swap the sides
LONGEST = 200  # characters of a complaint
_STANDARD_ERROR = Lock()  # one at a time looks at what a decoder prints
DEEPEST_BORDER = 0.2  # of a side; a photograph of 16:9 in a square leaves .22


def read_image(path: Path) -> Tensor:
    """An image file as uint8 [3, H, W], RGB.

    Raises:
        UserError: missing, not an image, or one that the decoder calls corrupt.
    """
    try:
        pixels, complaint = decode_image(np.fromfile(path, np.uint8) if path.is_file() else np.empty(0, np.uint8))
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); change its permissions") from error
    except (OSError, cv2.error):
        pixels, complaint = None, ""
    if pixels is None or complaint:
        found = f" ({complaint})" if complaint else ""
        raise UserError(
            f"{path}: not a readable image{found}; replace or remove it (for synthesized images: synthesize again)"
        )
    return torch.from_numpy(pixels[..., ::-1].transpose(2, 0, 1).copy())


def find_images(folder: Path) -> Iterator[Path]:
    """The image files in a folder and in those below it, hidden ones left out; a folder linked twice counts once."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            files = (Path(place, n) for n in sorted(names) if n[0] != "." and Path(n).suffix.lower() in SUFFIXES)
            yield from (file for file in files if file.is_file() or file.is_symlink())
        seen.add(real)


def image_size(path: Path) -> tuple[int, int]:
    """Height and width in pixels as `read_image` gives them, from the head of the file.

    Raises:
        UserError: missing, or not an image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images and of odd metadata
            with Image.open(path, formats=FORMATS) as image:
                turned = image.getexif().get(ORIENTATION) in TURNED
                tags = getattr(image, "tag_v2", {})  # of TIFF, whose `size` Pillow may have turned already
                width, height = int(tags.get(WIDTH, image.width)), int(tags.get(HEIGHT, image.height))
                return (width, height) if turned else (height, width)
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); change its permissions") from error
    # SyntaxError: a broken PNG; ImportError: Ultralytics makes it of a file that is no image, for want of a decoder.
    except (OSError, ValueError, SyntaxError, ImportError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable image; replace or remove it") from error


def decode_image(content: np.ndarray) -> tuple[np.ndarray | None, str]:
    """The content of an image file, uint8, as pixels [H, W, 3], BGR, or None, and what the decoder says against it.

    libjpeg and libtiff go on after damage with pixels that they make up; only what they print on the standard error
    says so. In PNG files damage is noticed by the checksums, in BMP and WebP files a part that is missing. libtiff
    multiplies colours by alpha, which no other format does.
    """
    if content[:8].tobytes() == PNG and (damaged := _damaged_chunk(content.tobytes())):
        return None, f"the checksum of its {damaged} does not fit"
    if content[:2].tobytes() not in (b"\xff\xd8", b"II", b"MM"):
        return cv2.imdecode(content, cv2.IMREAD_COLOR), ""
    with _STANDARD_ERROR, os.fdopen(os.memfd_create("decoder"), "w+b") as caught:
        kept = os.dup(2)
        os.dup2(caught.fileno(), 2)
        try:
            pixels = cv2.imdecode(content, cv2.IMREAD_COLOR)
        finally:
            os.dup2(kept, 2)
            caught.seek(0)
            lines = caught.read().splitlines(keepends=True)
            complaints = [line for line in lines if COMPLAINTS.search(line)]
            os.write(kept, b"".join(x for x in lines if not COMPLAINTS.search(x) and not NOISE.search(x)))  # of others
            os.close(kept)
    found = [line[max(line.find(b"TIFF_Error"), 0) :].strip() for line in complaints]
    if not found and content[:2].tobytes() != b"\xff\xd8" and _is_transparent(content):
        return None, "a TIFF with transparent pixels; save it without alpha, or as PNG"
    return pixels, b"; ".join(found).decode(errors="replace")[:LONGEST]


def _damaged_chunk(content: bytes) -> str | None:
    """The first chunk of a PNG that decides on pixels and does not fit its checksum: libpng checks no animated one."""
    place = len(PNG)
    while place + 12 <= len(content):
        length, name = int.from_bytes(content[place : place + 4], "big"), content[place + 4 : place + 8]
        end = place + 8 + length
        if name in (b"IHDR", b"PLTE", b"tRNS", b"IDAT") and zlib.crc32(content[place + 4 : end]) != int.from_bytes(
            content[end : end + 4], "big"
        ):
            return name.decode()
        if name == b"IEND":
            return None
        place = end + 4
    return None


def _is_transparent(content: np.ndarray) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(content.tobytes()), formats=("TIFF",)) as image:
                return "A" in image.getbands() and bool((np.asarray(image.getchannel("A")) < OPAQUE).any())
        except (OSError, ValueError, SyntaxError, KeyError, Image.DecompressionBombError):
            return False


def with_letterbox_padding(images: Tensor, generator: torch.Generator) -> Tensor:
    """Greys bars of up to a fifth of the sides of square images [B, 3, S, S] in [0, 1], as letterboxing leaves them.

    Two thirds of the images get bars above and below, the others left and right; a copy is returned.
    """
    changed = images.clone()
    size = images.shape[-1]
    for image, (depth, side) in zip(changed, torch.rand(len(images), 2, generator=generator).tolist(), strict=True):
        bar = round(depth * size * DEEPEST_BORDER)
        across = image if side < 2 / 3 else image.transpose(1, 2)
        across[:, :bar] = GREY / 255
        across[:, size - bar :] = GREY / 255
    return changed
