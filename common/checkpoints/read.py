"""Checkpoints: reading pickled ones without running them, and safetensors with a JSON description."""

import json
import pickle
import re
import types
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.runtime.errors import UserError
from common.runtime.files import atomic

# What a checkpoint may really call: functions that only rebuild tensors and containers.
_ALLOWED = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("builtins", "set"),
    ("builtins", "frozenset"),
    ("__builtin__", "set"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
}
# Modules whose classes describe a network. They are never imported: stand-ins keep their state.
_STRUCTURE = ("ultralytics.", "models.", "utils.", "torch.nn.modules.", "pathlib")


class Inert:
    """Stands for an object of a pickled class: it holds the object's state and does nothing."""

    pickled_class = ""

    def __new__(cls, *arguments: Any, **keywords: Any) -> "Inert":
        return object.__new__(cls)

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


@dataclass(frozen=True)
class Checkpoint:
    """The network of a pickled checkpoint as plain data."""

    model_class: str  # for example "ultralytics.nn.tasks.DetectionModel"
    state: dict[str, Tensor]  # name as in state_dict -> float32 (or integer) tensor
    attributes: dict[str, Any]  # plain attributes of the network: yaml, names, nc, stride ...
    head_class: str  # class of its last top-level layer, empty where there is none


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a pickled .pt file of Ultralytics or YOLOv5 without executing anything in it.

    The averaged weights (`ema`) are taken where the file has them, as those projects do.

    Raises:
        UserError: missing, damaged, not a checkpoint, or a pickle that asks for more than tensors and plain data.
    """
    if not path.is_file():
        raise UserError(f"weights: {path} does not exist; give the path of a float checkpoint (.pt or .safetensors)")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: not a PyTorch checkpoint, or cut off; fetch the file again")
    pickle_module = types.SimpleNamespace(Unpickler=_unpickler(path), load=None, __name__="zsqdet")
    try:
        content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=pickle_module)
    except UserError:
        raise
    except Exception as error:  # damaged archives fail in many ways, none of which is the user's code
        raise UserError(f"{path}: damaged checkpoint ({_one_line(error)}); fetch the file again") from error
    model = content
    if isinstance(content, dict):
        model = content.get("ema") or content.get("model")
    if not isinstance(model, Inert) or "_modules" not in vars(model):
        raise UserError(f"{path}: holds no detector (expected the whole model under `ema` or `model`)")
    return Checkpoint(type(model).pickled_class, dict(_tensors(model)), _attributes(model), _head_class(model))


def read_state(path: Path) -> dict[str, Tensor]:
    """Reads a pickled state_dict, as torchvision publishes them; nothing but tensors is accepted.

    Raises:
        UserError: missing, damaged, or anything else than names with tensors.
    """
    return read_published(path)[0]


def read_published(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a pickled state_dict and, where OpenMMLab published it, its `meta`: plain data and numpy numbers.

    Raises:
        UserError: missing, damaged, or anything else than that.
    """
    if not path.is_file():
        raise UserError(f"weights: {path.absolute()} does not exist; give the path of a state_dict (.pth)")
    if not zipfile.is_zipfile(path) and not _is_pickle(path):  # as older files of torchvision are
        raise UserError(f"{path}: not a PyTorch checkpoint, or cut off; fetch the file again")
    try:
        with torch.serialization.safe_globals(_numbers()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged archives fail in many ways, none of which is the user's code
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"its pickle asks for {asked[1]}" if asked else _one_line(error)
        raise UserError(f"{path}: not a state_dict of tensors, or damaged ({reason})") from error
    meta: dict[str, Any] = {}
    if isinstance(content, dict):
        meta = content["meta"] if isinstance(content.get("meta"), dict) else {}
        inner = [content[key] for key in ("model", "state_dict") if isinstance(content.get(key), dict)]
        content = inner[0] if inner else content  # of torchvision's reference scripts, of OpenMMLab
    if not isinstance(content, dict) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        raise UserError(f"{path}: not a state_dict; expected names with tensors")
    return dict(content), meta


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes tensors and a JSON description as one safetensors file, atomically.

    Raises:
        UserError: the file cannot be written.
    """
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    with atomic(path) as temporary:
        try:
            save_file(plain, temporary, {"zsqdet": json.dumps(dict(metadata))})
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise UserError(f"{path}: cannot be written ({_one_line(error)}); nothing was changed there") from error


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `save_tensors` wrote: tensors by name, and the description (empty for a foreign file).

    Raises:
        UserError: missing or damaged file.
    """
    if not path.is_file():
        raise UserError(f"{path}: does not exist")
    try:
        with safe_open(path, framework="pt") as stream:
            description = (stream.metadata() or {}).get("zsqdet", "{}")
            return {name: stream.get_tensor(name) for name in stream.keys()}, json.loads(description)  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{path}: damaged safetensors file ({_one_line(error)})") from error


def load_own(path: Path, family: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The float32 state and the architecture of a detector of `family` from a safetensors file of ours.

    Raises:
        UserError: missing or damaged file, or of another family.
    """
    state, description = load_tensors(path)
    if description.get("family") != family or "architecture" not in description:
        raise UserError(f"{path}: not a {family} detector (family: {description.get('family', 'not given')})")
    return {name: t.float() if t.is_floating_point() else t for name, t in state.items()}, description["architecture"]


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(1) == pickle.PROTO


def _unpickler(path: Path) -> type[pickle.Unpickler]:
    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in _ALLOWED or (module == "torch" and name.endswith("Storage")):
                return super().find_class(module, name)
            if (module, name) == ("_codecs", "encode"):  # how old pickles spell bytes
                return _latin1
            value = getattr(torch, name, None) if module == "torch" else None
            if isinstance(value, torch.dtype):
                return value
            if module.startswith(_STRUCTURE):
                return type(name, (Inert,), {"pickled_class": f"{module}.{name}"})
            raise UserError(
                f"{path}: refused, its pickle asks for {module}.{name}; only tensors and plain data are read"
            )

    return Reader


def _numbers() -> list[Any]:
    """What a pickled numpy number is rebuilt from, under the names that old and new versions of numpy use."""
    scalar: Any = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in ("bool", "int32", "int64", "float16", "float32", "float64")]
    return [*((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")), np.dtype, *kinds]


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"unexpected encoding {encoding!r}")
    return text.encode("latin1")


def _tensors(module: Inert, prefix: str = "") -> list[tuple[str, Tensor]]:
    own = vars(module)
    skipped = own.get("_non_persistent_buffers_set", set())
    found = []
    for name, value in [*own.get("_parameters", {}).items(), *own.get("_buffers", {}).items()]:
        if isinstance(value, Tensor) and name not in skipped:
            found.append((prefix + name, value.detach().float() if value.is_floating_point() else value))
    for name, child in own.get("_modules", {}).items():
        if isinstance(child, Inert):
            found += _tensors(child, f"{prefix}{name}.")
    return found


def _attributes(model: Inert) -> dict[str, Any]:
    return {k: v for k, v in vars(model).items() if not k.startswith("_") and not isinstance(v, Inert)}


def _head_class(model: Inert) -> str:
    layers = vars(model)["_modules"].get("model")
    children = list(vars(layers).get("_modules", {}).values()) if isinstance(layers, Inert) else []
    return type(children[-1]).pickled_class if children else ""


def _one_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
