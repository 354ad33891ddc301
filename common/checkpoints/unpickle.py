"""Pickles read as data: an interpreter of their instructions that imports nothing and calls nothing of theirs.

`pickletools` of the standard library splits a pickle into instructions. What an instruction names is kept as a name;
the few names that stand for tensors and containers are looked up in `_CALLS`, and objects of classes that describe a
network become `Inert`. Instructions set attributes of `Inert` objects only: nothing of this process can be changed.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

INSTRUCTIONS = 5_000_000  # of one pickle; a YOLO11x has about 200,000
LONGEST_INTEGER = 128  # bits
EXPANDED = 2**16  # numbers of a tensor that repeats fewer, as torch.ones(1).expand(64)
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_DTYPES = {str(dtype).removeprefix("torch.") for dtype in STORAGES.values()}
_NUMBERS = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}  # numpy's
# Classes of these packages describe networks and their training.
_STRUCTURE = (
    *("ultralytics.", "models.", "utils.", "torch.nn.modules.", "torch.nn.parallel."),
    *("torchvision.", "mmengine.", "mmcv.", "mmdet.", "pathlib."),
)
_DATA = {("pathlib", name) for name in ("Path", "PosixPath", "WindowsPath")} | {
    ("argparse", "Namespace"),
    ("numpy", "ndarray"),
    *((module, name) for module in ("builtins", "__builtin__") for name in ("object", "list", "dict", "int", "float")),
}

Storages = Callable[[str, torch.dtype, int], Tensor]  # key, dtype, number of elements -> tensor [elements]


class RefusedError(Exception):
    """A pickle that asks for more than tensors and plain data; the message says for what."""


class Name(NamedTuple):
    """A function or class that a pickle names."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Inert:
    """Stands for an object of a pickled class: it holds the object's state and does nothing."""

    pickled_class: str
    arguments: tuple[Any, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)


class Unpickler:
    """Reads one pickle from a stream, which stands behind its last instruction afterwards.

    Args:
        stream: seekable.
        storages: gives the numbers of a tensor's storage.
    """

    def __init__(self, stream: IO[bytes], storages: Storages) -> None:
        self._stream, self._storages = stream, storages
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """The content: plain Python, tensors, `Inert` objects and `Name`s.

        Raises:
            RefusedError: it names something else.
            Exception: of many kinds, where the pickle is damaged.
        """
        for count, (instruction, argument, _) in enumerate(pickletools.genops(self._stream)):
            if count > INSTRUCTIONS:
                raise RefusedError(f"has more than {INSTRUCTIONS} instructions")
            name = instruction.name
            if name == "STOP":
                return self._stack.pop()
            if name in _VALUES:
                self._stack.append(_plain(argument))
            elif name in _EMPTY:
                self._stack.append(_EMPTY[name]())
            elif name in _STEPS:
                _STEPS[name](self, argument)
            else:
                raise RefusedError(f"has the instruction {name}")
        raise EOFError("no end")

    def _pop_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def mark(self, _: Any) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def drop(self, _: Any) -> None:
        self._stack.pop()

    def drop_mark(self, _: Any) -> None:
        self._pop_mark()

    def put(self, index: int | None) -> None:
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]

    def get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def collect(self, kind: Callable[[list[Any]], Any]) -> None:
        made = kind(self._pop_mark())
        self._stack.append(made)

    def tuple_of(self, count: int) -> None:
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, set):
            target.update(_key(item) for item in items)
        elif not isinstance(target, Inert):  # items of a list of some class are of no use here
            raise ValueError("items for what holds none")

    def set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, dict):
            target.update(_pairs(items))
        elif not isinstance(target, Inert):
            raise ValueError("items for what holds none")

    def name(self, module: str, name: str) -> None:
        found = Name(module, name)
        known = found in _CALLS or found in _DATA or module.startswith(_STRUCTURE)
        if not known and not (module == "torch" and (name in STORAGES or name in _DTYPES)):
            raise RefusedError(f"asks for {found}")
        self._stack.append(found)

    def stack_name(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a name that is no text")
        self.name(module, name)

    def make(self, _: Any) -> None:
        """Calls what a name stands for here, or makes an `Inert` object."""
        arguments, called = self._stack.pop(), self._stack.pop()
        if not isinstance(called, Name) or not isinstance(arguments, tuple):
            raise RefusedError("calls what is no function")
        if called in _CALLS:
            made = _CALLS[called](*arguments)
        elif called.module == "torch" or called.module in ("builtins", "__builtin__"):
            raise RefusedError(f"calls {called}")
        else:
            made = Inert(str(called), arguments)
        self._stack.append(made)

    def build(self, _: Any) -> None:
        """Sets the state of an `Inert` object. That of a container or tensor is of no use here."""
        state, target = self._stack.pop(), self._stack[-1]
        if not isinstance(target, Inert):
            if isinstance(target, dict | set | Tensor):
                return
            raise RefusedError(f"sets attributes of {target if isinstance(target, Name) else type(target).__name__}")
        parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
        if all(part is None or isinstance(part, dict) for part in parts):
            for part in parts:
                target.attributes.update({k: v for k, v in (part or {}).items() if isinstance(k, str)})
        else:
            target.attributes["state"] = state

    def storage(self, _: Any) -> None:
        identity = self._stack.pop()
        if identity[:1] == ("module",) and isinstance(identity[1], Name):  # a class and its source, in old files
            self._stack.append(identity[1])
            return
        kind, cls, key, _, count, *view = identity
        if kind != "storage" or not isinstance(cls, Name) or cls.name not in STORAGES or not isinstance(key, str):
            raise RefusedError("has a persistent id that is no storage of numbers")
        if any(part is not None for part in view):
            raise RefusedError("has a view of a storage, as very old versions of PyTorch wrote them")
        self._stack.append(self._storages(key, STORAGES[cls.name], _whole(count)))


def _plain(value: Any) -> Any:
    if isinstance(value, int) and value.bit_length() > LONGEST_INTEGER:
        raise ValueError("an integer that is too long")
    return value


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError("a size that is no whole number")
    return value


def _key(value: Any) -> Any:
    """A key of a dictionary: hashing deeply nested tuples would exhaust the stack."""
    parts = value if isinstance(value, tuple) and not isinstance(value, Name) else (value,)
    if not all(part is None or isinstance(part, str | bytes | int | float | Name) for part in parts):
        raise ValueError("a key that is no plain value")
    return value


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return {_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)}


def _dictionary(pairs: Any = ()) -> dict[Any, Any]:
    rows = list(pairs.items()) if isinstance(pairs, dict) else pairs
    return {_key(key): value for key, value in rows}


def _default_dictionary(factory: Any = None, pairs: Any = ()) -> dict[Any, Any]:
    return _dictionary(pairs)


def _set(items: Any = ()) -> set[Any]:
    return {_key(item) for item in items}


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *others: Any) -> Tensor:
    """A view of a storage, never much larger than it, whatever the strides.

    Of `others`, the last one may say that the numbers have the other sign, as torch's own views can.
    """
    if not isinstance(storage, Tensor):
        raise ValueError("a tensor without a storage")
    size, stride = tuple(map(_whole, size)), tuple(map(_whole, stride))
    elements, last = 1, _whole(offset)
    for length, step in zip(size, stride, strict=True):
        elements, last = elements * length, last + (length - 1) * step
    if elements and (last >= storage.numel() or elements > max(storage.numel(), EXPANDED)):
        raise ValueError("a tensor that is larger than its storage")
    view = torch.as_strided(storage, size, stride, offset) if elements else storage.new_empty(size)
    marks = others[2] if len(others) > 2 and isinstance(others[2], dict) else {}
    if unknown := {key for key, value in marks.items() if value} - {"neg"}:
        raise ValueError(f"a tensor of an unexpected kind ({', '.join(sorted(map(str, unknown)))})")
    return -view if marks.get("neg") else view


def _parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise ValueError("a parameter without a tensor")
    return data


def _bytes(text: str, encoding: str = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes in an unexpected encoding")
    return text.encode("latin1")


def _number(kind: Any, value: Any) -> Any:
    """A number of numpy as one of Python."""
    code = kind.arguments[0] if isinstance(kind, Inert) and kind.arguments else None
    if code not in _NUMBERS or not isinstance(value, bytes | str):
        raise ValueError("a number of an unexpected kind")
    raw = value.encode("latin1") if isinstance(value, str) else value
    return np.frombuffer(raw, np.dtype(code).newbyteorder("<"), 1)[0].item()


def _kind(*arguments: Any) -> Inert:
    return Inert("numpy.dtype", arguments)


def _array(*_: Any) -> Inert:
    return Inert("numpy.ndarray")


def _bound(owner: Any, name: Any) -> Inert:
    """A method that stands in for another, as in fused models."""
    return Inert("builtins.getattr", (name,))


def _reconstructed(cls: Any, *_: Any) -> Inert:
    if not isinstance(cls, Name):
        raise RefusedError("makes an object without a class")
    return Inert(str(cls))


def _shape(sizes: Any = ()) -> tuple[int, ...]:
    return tuple(map(_whole, sizes))


def _device(*arguments: Any) -> str:
    return ":".join(str(part) for part in arguments if isinstance(part, str | int))


_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _dictionary,
    ("collections", "Counter"): _dictionary,
    ("collections", "defaultdict"): _default_dictionary,
    ("torch", "Size"): _shape,
    ("torch", "device"): _device,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("_codecs", "encode"): _bytes,
    ("numpy", "dtype"): _kind,
    **{(f"numpy.{core}.multiarray", "scalar"): _number for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _array for core in ("core", "_core")},
    **{(module, "_reconstructor"): _reconstructed for module in ("copyreg", "copy_reg")},
    **{(module, name): _set for module in ("builtins", "__builtin__") for name in ("set", "frozenset")},
    **{(module, "getattr"): _bound for module in ("builtins", "__builtin__")},
}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_EMPTY: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
    "EMPTY_TUPLE": tuple,
}
_STEPS: dict[str, Callable[[Unpickler, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "MARK": Unpickler.mark,
    "POP": Unpickler.drop,
    "POP_MARK": Unpickler.drop_mark,
    "LIST": lambda machine, _: machine.collect(list),
    "TUPLE": lambda machine, _: machine.collect(tuple),
    "DICT": lambda machine, _: machine.collect(_pairs),
    "FROZENSET": lambda machine, _: machine.collect(_set),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": lambda machine, _: machine.extend([machine._stack.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine._pop_mark()),
    "ADDITEMS": lambda machine, _: machine.extend(machine._pop_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine._stack.pop(), machine._stack.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.set_items(machine._pop_mark()),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), Unpickler.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), Unpickler.get),
    "GLOBAL": lambda machine, text: machine.name(*text.split(" ", 1)),
    "STACK_GLOBAL": Unpickler.stack_name,
    "REDUCE": Unpickler.make,
    "NEWOBJ": Unpickler.make,
    "BUILD": Unpickler.build,
    "BINPERSID": Unpickler.storage,
}
