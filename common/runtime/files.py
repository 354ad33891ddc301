"""Files that are either complete or absent, and folders that one program at a time changes."""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path
from typing import Any

from common.runtime.environment import is_first
from common.runtime.errors import UserError

log = logging.getLogger("zsqdet")
LOCK = ".lock"
READERS = 8  # files that are hashed at the same time
TEMPORARY = re.compile(r"\..+\.(?:(\d+)-)?(\d+)-(\d+)\.\w+(\..*)?")  # .NAME.NAMESPACE-PID-START.RANDOM.SUFFIX
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # file systems that have none
READ_ONLY = (errno.EACCES, errno.EROFS, errno.EPERM)
PROBLEMS = {  # what an error of the operating system means to a user
    errno.ENOSPC: "the disk is full; free space or choose another folder, then repeat",
    errno.EDQUOT: "the disk quota is used up; free space or choose another folder, then repeat",
    errno.EROFS: "cannot be written (Read-only file system); choose another folder",
    errno.ENOTDIR: "cannot be made, a file stands where a folder should be; choose another folder",
    errno.EEXIST: "cannot be made, a file of that name is there; choose another folder",
    errno.EISDIR: "is a folder; a file is needed",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.ENOENT: "does not exist, or was removed meanwhile; repeat the command",
    errno.ELOOP: "is a symbolic link that leads to itself; name another file",
    errno.EIO: "the disk reports an error (Input/output error); check it, or choose another folder",
    errno.EMFILE: "too many open files; raise the limit (ulimit -n)",
}


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; on success it replaces `path`, on any error it is removed.

    Both the content and the new name are on the disk afterwards, also when the power fails. The temporary name holds
    this process (see `lock`), so that what a killed one leaves behind can be told from what is being written.

    Raises:
        UserError: the folder cannot be written, the disk is full, or something else than a file has that name.
    """
    temporary = None
    try:
        check_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=own_prefix(path), suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o644)
        _sync(temporary)
        temporary.replace(path)
        with contextlib.suppress(OSError):  # some network file systems cannot
            _sync(path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); nothing was changed there") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def open_ordinary(path: Path) -> BufferedReader:
    """Opens a file for reading; of a folder that came from elsewhere, where a pipe would be waited for without end.

    Raises:
        OSError: it cannot be read, or is a pipe, device or socket.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "is no ordinary file")
    return path.open("rb")


def read_ordinary(path: Path) -> bytes:
    """The content of such a file.

    Raises:
        OSError: it cannot be read, or is a pipe, device or socket.
    """
    with open_ordinary(path) as stream:
        return stream.read()


def read_plainly(path: Path) -> str:
    """The text of such a file, UTF-8 with or without a mark.

    Raises:
        OSError, ValueError: it cannot be read, or is no such text.
    """
    return read_ordinary(path).decode("utf-8-sig")


def check_replaceable(path: Path) -> None:
    """Refuses a folder or a device: a rename would put an ordinary file in the place of, say, /dev/full.

    Raises:
        UserError: something else than a file has that name.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is no ordinary file; nothing was changed there")


def check_output(path: Path | None, inputs: Iterable[Path | None], suffix: str = "") -> None:
    """Refuses, before the work, a file for its result that something else would be lost by.

    Args:
        path: the file; None is none.
        inputs: files and folders that the work reads.
        suffix: that the name must have.

    Raises:
        UserError: one of the inputs, another suffix, or something else than a file has that name.
    """
    if path is None:
        return
    check_replaceable(path)
    given = {os.path.realpath(one) for one in inputs if one is not None}
    if os.path.realpath(path) in given or (_is_record(path) and os.path.realpath(path.parent) in given):
        raise UserError(f"{path}: is one of the inputs and would be lost; give another file")
    if suffix and path.suffix.lower() != suffix:
        raise UserError(f"{path}: found a name that does not end in {suffix}; give one that does")


def _is_record(path: Path) -> bool:
    """Whether it is JSON that a run, set or export is known by: with a hash of itself, or of the files beside it."""
    try:
        value = json.loads(read_ordinary(path))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and not value.keys().isdisjoint(("sha256", "files"))


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Only one program at a time is inside with this folder, which is made; another one says so once and waits.

    Of several processes of one program the first one holds it: what comes first inside must be something that all of
    them wait for, and so must be the end of what they write. Temporary files that killed processes left in the folder
    are removed. A folder that may not be written, and one on a file system without locks, is not locked.

    Raises:
        UserError: the folder cannot be made.
    """
    if not is_first():
        yield
        return
    with _locked(folder):
        yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / LOCK).open("a")
    except OSError as error:
        if error.errno in READ_ONLY and folder.is_dir():
            yield
            return
        reason = "a symbolic link that leads nowhere" if _leads_nowhere(folder) else error.strerror or error
        raise UserError(f"{folder}: cannot be written ({reason}); choose another folder") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another run holds %s; waiting", folder)
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        remove_leftovers(_hidden(folder))
        yield


def _leads_nowhere(folder: Path) -> bool:
    return any(one.is_symlink() and not one.exists() for one in (folder, *folder.parents))


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically.

    Raises:
        TypeError: it holds something that JSON does not know, NaN and infinity included; says where.
        UserError: the file cannot be written.
    """
    try:
        text = json.dumps(value, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{path.name}{_unknown(value) or ''}: {error}") from error
    with atomic(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Reads JSON.

    Raises:
        UserError: missing, unreadable or not JSON.
    """
    try:
        return json.loads(read_ordinary(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except RecursionError as error:
        raise UserError(f"{path}: not valid JSON (nested too deeply)") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error


def write_checked_json(path: Path, value: dict[str, Any]) -> None:
    """Writes `value`, JSON-able, with the SHA-256 of its content as `sha256`, atomically."""
    write_json(path, value | {"sha256": _digest(value)})


def read_checked_json(path: Path) -> dict[str, Any]:
    """Reads what `write_checked_json` wrote.

    Raises:
        UserError: missing, unreadable, or changed since.
    """
    value = read_json(path)
    if isinstance(value, dict) and "sha256" in value and is_unchanged(value):
        del value["sha256"]
        return value
    raise UserError(f"{path}: damaged, its content is not what was written")


def is_unchanged(value: dict[str, Any]) -> bool:
    """Whether JSON is what `write_checked_json` wrote, as far as can be told: older files have no `sha256`."""
    try:
        return "sha256" not in value or _digest({k: v for k, v in value.items() if k != "sha256"}) == value["sha256"]
    except (RecursionError, ValueError):  # lists in lists, half a letter
        return False


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def disk_problem(error: OSError) -> str | None:
    """One line for what a user can mend: a full disk, a file in the way, no permission; None for any other error."""
    name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else str(error.filename or "disk")
    if error.errno not in (errno.EACCES, errno.EPERM):
        return f"{name}: {PROBLEMS[error.errno]}" if error.errno in PROBLEMS else None
    if (os.path.lexists(name) and not os.access(name, os.R_OK)) or not os.access(Path(name).parent, os.X_OK):
        return f"{name}: cannot be read ({error.strerror}); change its permissions"
    return f"{name}: cannot be written ({error.strerror}); change its permissions or choose another folder"


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open_ordinary(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_same(path: Path, digest: str | None) -> bool:
    """Whether a file is there and, where one is known, has this SHA-256."""
    try:
        return path.is_file() and digest in (None, sha256(path))
    except OSError:
        return False


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _started(process: int) -> int | None:
    """When a process began, in ticks since the machine did, since numbers of processes are used again; None: none."""
    try:
        return int(Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[19])
    except OSError:
        return None


def own_prefix(path: Path) -> str:
    """What the temporary names of this process for `path` begin with."""
    return f".{path.name}.{_namespace()}-{os.getpid()}-{_started(os.getpid())}."


def _namespace() -> int:
    """Which processes this one can see: those of another container have numbers of their own; 0 where unknown."""
    try:
        return int(re.sub(r"\D", "", os.readlink("/proc/self/ns/pid")) or 0)
    except OSError:
        return 0


def _hidden(folder: Path) -> Iterator[Path]:
    """What is in a folder, at any depth, with a dot first; what another process removes meanwhile is left out."""
    for place, folders, names in os.walk(folder):
        yield from (Path(place, name) for name in (*folders, *names) if name.startswith("."))


def remove_leftovers(candidates: Iterable[Path]) -> None:
    """Removes those files and folders with a temporary name whose process is gone.

    Whether one of another container lives cannot be told, so its files stay; names of older versions have no such part.
    """
    own = _namespace()
    for path in list(candidates):
        found = TEMPORARY.fullmatch(path.name)
        if found and int(found[1] or own) == own and _started(int(found[2])) != int(found[3]):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):
                path.unlink()


def _unknown(value: Any, place: str = "") -> str | None:
    """Where the first part of `value` is that JSON does not know; None where there is none."""
    children: Iterator[tuple[str, Any]] = iter(())
    if isinstance(value, dict):
        if not all(isinstance(key, str | int | float | bool | None) for key in value):
            return place
        children = ((f"{place}.{key}", child) for key, child in value.items())
    elif isinstance(value, list | tuple):
        children = ((f"{place}[{i}]", child) for i, child in enumerate(value))
    else:
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            return place
    return next((found for name, child in children if (found := _unknown(child, name)) is not None), None)


def sha256_of_files(paths: Sequence[Path]) -> str:
    """The SHA-256 of the SHA-256 of files in their order, in hexadecimal; names and places do not count."""
    with ThreadPoolExecutor(READERS) as pool:
        return hashlib.sha256("".join(pool.map(sha256, paths)).encode()).hexdigest()
