"""Fetching official checkpoints, whole and with the right sum or not at all."""

import logging
import urllib.error
from collections.abc import Mapping
from pathlib import Path

from torch.hub import download_url_to_file

from common.runtime.errors import UserError
from common.runtime.files import sha256

log = logging.getLogger("zsqdet")


def fetch(weights: Path, release: str, sums: Mapping[str, str | None]) -> None:
    """Downloads the file of that name from `release` (an address) to `weights`.

    Args:
        weights: where it goes; its name is that of an official file.
        release: address of the folder that holds the files.
        sums: SHA-256 of each official file; None where none is on record.

    Raises:
        UserError: not the name of an official file, no connection, or another file than the official one.
    """
    if weights.name not in sums:
        raise UserError(
            f"weights: {weights.absolute()} does not exist; give the path of a checkpoint, or one of the official "
            f"names {', '.join(sums)}"
        )
    url, wanted = f"{release}/{weights.name}", sums[weights.name]
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
        log.warning("%s: no SHA-256 is on record for this file; this one has %s", weights, sha256(weights))
