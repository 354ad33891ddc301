"""Checkpoints: pickled ones as plain data, and safetensors with a JSON description."""

import json
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from common.checkpoints.archive import one_line, read_pickled
from common.checkpoints.strict_json import parse_json
from common.checkpoints.unpickle import Inert
from common.checkpoints.yolo_architecture import HEADS
from common.runtime.errors import UserError
from common.runtime.files import atomic, open_ordinary

DEEPEST, MOST_MODULES = 64, 20_000  # of the modules of a network
LONGEST_HEADER = 100_000_000  # bytes, of a safetensors file: the limit of safetensors itself


@dataclass(frozen=True)
class Checkpoint:
    """The network of a pickled checkpoint as plain data."""

    path: Path
    model_class: str  # for example "ultralytics.nn.tasks.DetectionModel"
    state: dict[str, Tensor]  # name as in state_dict -> float32 (or integer) tensor
    attributes: dict[str, Any]  # plain attributes of the network: yaml, names, nc, stride ...
    modules: dict[str, Inert]  # all its modules by name, the network itself as ""
    trained_with: Any = None  # what the network says of its training's arguments, unchecked

    @property
    def head(self) -> Inert | None:
        """Its last top-level layer."""
        layers = [name for name in self.modules if name.startswith("model.") and name.count(".") == 1]
        return self.modules[layers[-1]] if layers else None


@dataclass(frozen=True)
class WeightsFile:
    """What a file of weights holds, before it is known which family it belongs to."""

    path: Path
    family: str | None = None  # that a safetensors file of ours names
    network: Checkpoint | None = None  # a whole pickled network
    state: Mapping[str, Tensor] = field(default_factory=dict)  # a state_dict, pickled or of a safetensors file
    trained_with: Mapping[str, Any] = field(default_factory=dict)  # the arguments of the training, unchecked
    model: str | None = None  # which of torchvision's models it is said to be, unchecked

    def is_network(self, classes: Collection[str]) -> bool:
        """Whether it is a pickled network of one of these classes with a head that is supported."""
        head = self.network.head if self.network and self.network.model_class in classes else None
        return head is not None and head.pickled_class.rpartition(".")[2] in HEADS

    @property
    def content(self) -> str:
        """What was found, for a message."""
        if self.network is not None:
            head = self.network.head.pickled_class.rpartition(".")[2] if self.network.head else "none"
            return f"a {plain_text(self.network.model_class)} with head {plain_text(head)}"
        names = ", ".join(plain_text(name) for name in list(self.state)[:2])
        of = f" of a {plain_text(self.family)}" if self.family else ""
        return f"{len(self.state)} tensors{of} ({names}, ...)"

    @property
    def image_size(self) -> int | None:
        """`imgsz` of the training as a multiple of the largest stride, pixels; None where nothing usable is said."""
        said = self.trained_with.get("imgsz", self.trained_with.get("img_size"))
        sides = said if isinstance(said, list | tuple) else [said]
        if not sides or not all(isinstance(n, int) and not isinstance(n, bool) and 32 <= n <= 8192 for n in sides):
            return None
        found = self.network.head.attributes.get("stride") if self.network and self.network.head else None
        usable = isinstance(found, Tensor) and found.numel() and found.is_floating_point()
        stride = int(found.max().clamp(32, 128)) if isinstance(found, Tensor) and usable else 32
        return min(-(-max(sides) // stride) * stride, 8192 // stride * stride)


def read_weights(path: Path) -> WeightsFile:
    """Opens a .pt, .pth or .safetensors file of any family, without executing anything in it.

    Raises:
        UserError: missing, damaged or unsafe, or neither a network nor names with tensors.
    """
    if path.suffix == ".safetensors":
        state, about = load_tensors(path)
        return WeightsFile(path, _text(about, "family"), state=state, model=_text(about.get("architecture"), "model"))
    content = read_pickled(path)
    network = _network(path, content)
    if network is None:
        state, arguments = _published(path, content)
        return WeightsFile(path, state=state, model=_text(arguments, "model"))
    places = [content.get("train_args"), content.get("opt")] if isinstance(content, dict) else []
    places = [place.attributes if isinstance(place, Inert) else place for place in [*places, network.trained_with]]
    return WeightsFile(path, network=network, trained_with=next((p for p in places if isinstance(p, dict)), {}))


def _text(values: Any, name: str) -> str | None:
    found = values.get(name) if isinstance(values, Mapping) else None
    return found if isinstance(found, str) else None


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a pickled .pt file of Ultralytics or YOLOv5 without executing anything in it.

    The averaged weights (`ema`) are taken where the file has them, as those projects do.

    Raises:
        UserError: missing, damaged, not a checkpoint, or a pickle that asks for more than tensors and plain data.
    """
    network = _network(path, read_pickled(path))
    if network is None:
        raise UserError(f"{path}: holds no detector (expected the whole model under `ema` or `model`)")
    return network


def _network(path: Path, content: Any) -> Checkpoint | None:
    """The whole network in what a pickle holds; None where there is none."""
    found = [content.get("ema"), content.get("model")] if isinstance(content, dict) else [content]
    models = [model for model in found if isinstance(model, Inert) and "_modules" in model.attributes]
    if not models:
        return None
    model = _unwrapped(models[0])
    modules = _walk(path, model)
    attributes = {k: v for k, v in model.attributes.items() if not k.startswith("_") and not isinstance(v, Inert)}
    args = model.attributes.get("args")
    trained_with = args.attributes if isinstance(args, Inert) else args
    return Checkpoint(path, model.pickled_class, _tensors(modules), attributes, modules, trained_with)


def read_published(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a pickled state_dict, float32 (or integers), and what stands beside it, unchecked: OpenMMLab's `meta`, or
    the arguments of torchvision's reference training.

    What wraps it is taken off: `model` of torchvision's reference training, `state_dict` of OpenMMLab (which holds the
    averaged weights where there are some), and the `module.` that DataParallel and AveragedModel put before names.

    Raises:
        UserError: missing, damaged, or anything else than that.
    """
    return _published(path, read_pickled(path))


def _published(path: Path, content: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    beside: Any = {}
    if isinstance(content, dict):
        beside = content.get("meta", content.get("args"))
        beside = beside.attributes if isinstance(beside, Inert) else beside
        inner = [content[key] for key in ("model", "state_dict") if isinstance(content.get(key), dict | Inert)]
        if isinstance(content.get("model_ema"), dict):  # the averaged weights, as Ultralytics and YOLOv5 take theirs
            inner = [content["model_ema"]]
        if len(inner) > 1:
            raise UserError(f"{path}: holds two states, under model and state_dict; give a file with one of them")
        content = inner[0] if inner else content
    if isinstance(content, Inert):
        raise UserError(
            f"{path}: holds a whole {content.pickled_class}; give a file of its state_dict: "
            "torch.save(model.state_dict(), FILE)"
        )
    if not isinstance(content, dict) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        raise UserError(f"{path}: not a state_dict; expected names with tensors")
    if not all(isinstance(name, str) for name in content):
        raise UserError(f"{path}: not a state_dict; its names are no texts")
    state = {name: tensor for name, tensor in content.items() if name != "n_averaged"}
    while state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return as_float32(state), beside if isinstance(beside, dict) else {}


def plain_text(text: str) -> str:
    """A text from a file as a message shows it: short, and without control characters."""
    return "".join(c if c.isprintable() else "?" for c in text[:80])


def as_float32(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, those of any floating-point kind in float32."""
    return {name: t.float() if t.is_floating_point() else t for name, t in state.items()}


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes tensors and a JSON description as one safetensors file, atomically.

    Raises:
        UserError: the file cannot be written.
    """
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    with atomic(path) as temporary:
        try:
            about = dict(metadata) | {"crc32": _checksum(plain, metadata)}  # one key: the order of several is random
            save_file(plain, temporary, {"zsqdet": json.dumps(about)})
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise UserError(f"{path}: cannot be written ({one_line(error)}); nothing was changed there") from error


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `save_tensors` wrote: tensors by name, and the description (empty for a foreign file).

    Raises:
        UserError: missing or damaged file.
    """
    if not path.is_file():
        raise UserError(f"{path}: does not exist")
    try:
        header, content = _safetensors(path)
        loaded, text = load(content), header.pop("__metadata__", {}).get("zsqdet", "{}")
        # `load` gives them in an order of chance; here it is that of the file.
        tensors = {name: loaded[name] for name in sorted(header, key=lambda name: (header[name]["data_offsets"], name))}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); change its permissions") from error
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged safetensors file ({one_line(error)})") from error
    about = parse_json(text, f"{path}: its description")
    if not isinstance(about, dict):
        raise UserError(f"{path}: its description is no JSON object; make the file again")
    if "crc32" in about and about.pop("crc32") != _checksum(tensors, about):
        raise UserError(f"{path}: damaged safetensors file (its checksum is another one); make or fetch it again")
    return tensors, about


def _safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and content of a file that is as long as its header says.

    It is read and not mapped: whoever truncates a mapped file meanwhile ends the program (SIGBUS).
    """
    with open_ordinary(path) as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        header = stream.read(length) if length <= LONGEST_HEADER else b""
        found = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in found.items() if name != "__metadata__"]
        if 8 + length + max(ends, default=0) != path.stat().st_size:
            raise ValueError("its length is not what its header says")
        return found, start + header + stream.read(max(ends, default=0))


def load_own(path: Path, family: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The float32 state and the architecture of a detector of `family` from a safetensors file of ours.

    Raises:
        UserError: missing or damaged file, or of another family.
    """
    state, description = load_tensors(path)
    if description.get("family") != family or "architecture" not in description:
        raise UserError(f"{path}: not a {family} detector (family: {description.get('family', 'not given')})")
    return as_float32(state), description["architecture"]


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """Of names, kinds, shapes and numbers, and of the description; safetensors files have none of their own."""
    found = zlib.crc32(json.dumps(dict(metadata)).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), found)
        if tensor.numel():
            found = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, found)
    return f"{found:08x}"


def _unwrapped(model: Inert) -> Inert:
    """The network inside DataParallel."""
    inner = model.attributes["_modules"]
    wrapped = model.pickled_class.startswith("torch.nn.parallel.") and isinstance(inner, dict)
    module = inner.get("module") if wrapped else None
    return module if isinstance(module, Inert) and "_modules" in module.attributes else model


def _walk(path: Path, model: Inert) -> dict[str, Inert]:
    """All modules by name, parents first.

    Raises:
        UserError: a module that contains itself, far too many of them, or one with a dot in its name.
    """
    found: dict[str, Inert] = {}
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if name.count(".") >= DEEPEST or len(found) >= MOST_MODULES:
            raise UserError(f"{path}: a module contains itself, or there are far too many ({name[:40]}...)")
        found[name] = module
        for child, part in reversed(_dict(module, "_modules").items()):
            if str(child) == "" or "." in str(child):  # torch makes no such names, which would hide others here
                raise UserError(f"{path}: {plain_text(name) or 'the network'} has a part that is named as none can be")
            if isinstance(part, Inert):
                waiting.append((f"{name}.{child}" if name else str(child), part))
    return found


def _tensors(modules: Mapping[str, Inert]) -> dict[str, Tensor]:
    found = {}
    for prefix, module in modules.items():
        skipped = module.attributes.get("_non_persistent_buffers_set", ())
        for name, value in [*_dict(module, "_parameters").items(), *_dict(module, "_buffers").items()]:
            if isinstance(value, Tensor) and not (isinstance(skipped, set) and name in skipped):
                found[f"{prefix}.{name}" if prefix else str(name)] = value
    return as_float32(found)


def _dict(module: Inert, name: str) -> dict[Any, Any]:
    value = module.attributes.get(name)
    return value if isinstance(value, dict) else {}
