"""Fetching the official YOLOv5 files."""

import hashlib
import logging
import urllib.error
from pathlib import Path

from torch.hub import download_url_to_file

from common.errors import UserError

log = logging.getLogger("zsqdet")

RELEASE = "https://github.com/ultralytics/yolov5/releases/download/v7.0"
SHA256 = {
    "yolov5n.pt": "4f180cf23ba0717ada0badd6c685026d73d48f184d00fc159c2641284b2ac0a3",
    "yolov5s.pt": "8b3b748c1e592ddd8868022e8732fde20025197328490623cc16c6f24d0782ee",
    "yolov5m.pt": None,  # no record that could be confirmed
    "yolov5l.pt": "c2323a42865bdc3d8e41795548d695b18593b3c99e9a1a8ee59b37fb46041af2",
    "yolov5x.pt": None,
}


def fetch(weights: Path, release: str = RELEASE) -> None:
    """Downloads an official file, named as YOLOv5 names it, to `weights`; whole and with the right sum, or not at all.

    Raises:
        UserError: not the name of an official file, no connection, or another file than the official one.
    """
    if weights.name not in SHA256:
        raise UserError(
            f"weights: {weights.absolute()} does not exist; give the path of a YOLOv5 .pt or .safetensors file"
        )
    url, wanted = f"{release}/{weights.name}", SHA256[weights.name]
    weights.parent.mkdir(parents=True, exist_ok=True)
    try:
        download_url_to_file(url, str(weights), hash_prefix=wanted)
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"weights: {weights.absolute()} does not exist and {url} cannot be fetched ({reason}); it can be "
            "downloaded when online"
        ) from error
    except RuntimeError as error:  # what torch.hub raises for a wrong sum, after removing the file
        raise UserError(f"weights: {url} is not the official file or was damaged on the way ({error})") from error
    if wanted is None:
        found = hashlib.sha256(weights.read_bytes()).hexdigest()
        log.warning("%s: no SHA-256 is on record for this file; this one has %s", weights, found)
