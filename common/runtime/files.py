"""Files that are either complete or absent."""

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.runtime.errors import UserError

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; on success it replaces `path`, on any error it is removed.

    Raises:
        UserError: the folder cannot be written, the disk is full, or something else than a file has that name.
    """
    temporary = None
    check_replaceable(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); nothing was changed there") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def check_replaceable(path: Path) -> None:
    """Refuses a folder or a device: a rename would put an ordinary file in the place of, say, /dev/full.

    Raises:
        UserError: something else than a file has that name.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is no ordinary file; nothing was changed there")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Reads JSON.

    Raises:
        UserError: missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error


def disk_problem(error: OSError) -> str | None:
    """One line for a disk that is full or may not be written, or a file in the way; None for any other error."""
    if error.errno not in DISK_ERRORS:
        return None
    return f"{error.filename or 'disk'}: {error.strerror}; free space or choose another folder, then repeat"


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
