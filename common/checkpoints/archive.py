"""Files of `torch.save`: the archive of today and the plain pickles of old versions, opened without torch.

Sizes are bounded by that of the file: nothing in it may be compressed, and no tensor may be larger than its storage.
"""

import io
import sys
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from common.checkpoints.unpickle import RefusedError, Unpickler
from common.runtime.errors import UserError
from common.runtime.files import open_ordinary

ENTRIES = 100_000
LONGEST_PICKLE = 1 << 30  # bytes
MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001  # the first two pickles of a file of before PyTorch 1.6
ZIP, PICKLE = b"PK\x03\x04", b"\x80"


def read_pickled(path: Path) -> Any:
    """What a file of `torch.save` holds: plain Python, tensors and, for objects, `Inert`s. Nothing in it is run.

    Checksums of the archive are compared; old files have none.

    Raises:
        UserError: missing, damaged, a program (TorchScript), or a pickle that asks for more than that.
    """
    if not path.is_file():
        raise UserError(f"weights: {path} does not exist; give the path of a float checkpoint")
    try:
        with open_ordinary(path) as stream:
            start = stream.read(4)
            stream.seek(0)
            if start == ZIP:
                return _Archive(stream, path.stat().st_size).load()
            if start[:1] == PICKLE:
                return _OldFile(stream, path.stat().st_size).load()
    except RefusedError as error:
        raise UserError(f"{path}: refused, its pickle {error}; only tensors and plain data are read") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except _NoArchiveError:
        pass
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # damaged files fail in many ways, none of which is the user's code
        raise UserError(f"{path}: damaged checkpoint ({one_line(error)}); fetch the file again") from error
    raise UserError(f"{path}: not a PyTorch checkpoint, or cut off; fetch the file again")


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


class _NoArchiveError(Exception):
    """A zip file's beginning, and nothing that fits it."""


class _Archive:
    """An uncompressed zip file: FOLDER/data.pkl, and the numbers of each storage as FOLDER/data/KEY."""

    def __init__(self, stream: IO[bytes], size: int) -> None:
        try:
            self._zip = zipfile.ZipFile(stream)
        except zipfile.BadZipFile as error:
            raise _NoArchiveError from error
        entries = self._zip.infolist()
        self._check(entries, size)
        pickles = [e.filename for e in entries if e.filename.endswith("/data.pkl") and e.filename.count("/") == 1]
        if len(pickles) != 1:
            raise UserError("no archive of torch.save (it holds no data.pkl); give the file of a float checkpoint")
        self._folder = pickles[0].removesuffix("data.pkl")
        self._read: dict[str, tuple[torch.dtype, Tensor]] = {}

    def load(self) -> Any:
        names = set(self._zip.namelist())
        order = f"{self._folder}byteorder"
        if order in names and self._zip.read(order) != sys.byteorder.encode():
            raise UserError("written by a machine with another byte order; load and save it on one of this kind")
        if self._zip.getinfo(f"{self._folder}data.pkl").file_size > LONGEST_PICKLE:
            raise RefusedError(f"is longer than {LONGEST_PICKLE} bytes")
        return Unpickler(io.BytesIO(self._zip.read(f"{self._folder}data.pkl")), self.storage).load()

    def storage(self, key: str, dtype: torch.dtype, count: int) -> Tensor:
        if key not in self._read:
            content = bytearray(self._zip.read(f"{self._folder}data/{key}"))  # compares the checksum
            self._read[key] = dtype, _numbers(content, dtype)
        known, numbers = self._read[key]
        if known != dtype or len(numbers) != count:
            raise ValueError(f"storage {key} has another size or kind than its tensors")
        return numbers

    @staticmethod
    def _check(entries: list[zipfile.ZipInfo], size: int) -> None:
        names = [entry.filename for entry in entries]
        parts = [name.split("/") for name in names]
        if any(p[-1] == "constants.pkl" or "code" in p[:-1] for p in parts):
            raise UserError("a TorchScript archive, which is a program; give the checkpoint that it was exported from")
        if len(names) > ENTRIES or len(set(names)) < len(names):
            raise UserError("refused, its archive holds too many entries or one of them twice")
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
            raise UserError("refused, its archive is compressed or encrypted, as torch.save never writes it")
        if sum(entry.file_size for entry in entries) > size:
            raise UserError("refused, its archive claims to hold more than the file")


class _OldFile:
    """Pickles one after another (a number, a version, facts of the machine, the content, the keys of its storages),
    then the storages: for each its number of elements and these."""

    def __init__(self, stream: IO[bytes], size: int) -> None:
        self._stream, self._left = stream, size
        self._made: dict[str, tuple[torch.dtype, Tensor]] = {}

    def load(self) -> Any:
        if self._next() != MAGIC or self._next() != VERSION:
            raise ValueError("not written by torch.save")
        machine = self._next()
        if not isinstance(machine, dict) or machine.get("little_endian") != (sys.byteorder == "little"):
            raise ValueError("written by a machine with another byte order")
        content, keys = self._next(), self._next()
        if not isinstance(keys, list) or set(keys) != self._made.keys() or len(set(keys)) < len(keys):
            raise ValueError("other storages than those of its tensors")
        for key in keys:
            self._fill(*self._made[key])
        if self._stream.read(1):
            raise ValueError("something follows its end")
        return content

    def storage(self, key: str, dtype: torch.dtype, count: int) -> Tensor:
        if key not in self._made:
            self._left -= count * dtype.itemsize
            if self._left < 0:
                raise ValueError("tensors that are larger than the file")
            self._made[key] = dtype, torch.zeros(count, dtype=dtype)
        known, numbers = self._made[key]
        if known != dtype or len(numbers) != count:
            raise ValueError(f"storage {key} has another size or kind than its tensors")
        return numbers

    def _next(self) -> Any:
        return Unpickler(self._stream, self.storage).load()

    def _fill(self, dtype: torch.dtype, numbers: Tensor) -> None:
        count, length = self._stream.read(8), numbers.numel() * dtype.itemsize
        content = bytearray(self._stream.read(length))
        if int.from_bytes(count, sys.byteorder) != numbers.numel() or len(content) != length:
            raise ValueError("cut off")
        numbers.copy_(_numbers(content, dtype))


def _numbers(content: bytearray, dtype: torch.dtype) -> Tensor:
    if not content:
        return torch.empty(0, dtype=dtype)
    if dtype == torch.bool:  # any other byte than 0 and 1 would be no truth value
        return torch.frombuffer(content, dtype=torch.uint8) != 0
    return torch.frombuffer(content, dtype=dtype)
