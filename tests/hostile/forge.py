"""Files that nobody should trust: written byte by byte, or damaged by a seed in bytes, JSON values and tensors."""

import copy
import io
import json
import pickle
import random
import struct
import zipfile
from pathlib import Path

import torch

from common.checkpoints.read import load_tensors

ROOT = Path(__file__).parents[2]
MICRO = {
    "yolo11": ROOT / "tools/shapes/micro_yolo11.safetensors",
    "yolov5": ROOT / "tools/shapes/micro_yolov5.safetensors",
    "resnet": ROOT / "tools/shapes/micro_mask_rcnn.safetensors",
    "vit": ROOT / "tools/shapes/micro_vit.safetensors",
}
PROTO, STOP = b"\x80\x02", b"."

VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    10**9,
    1e308,
    0.5,
    "",
    "x",
    "nc",
    "../x",
    [],
    {},
    [[]],
    [1, 2],
    {"a": 1},
    "y" * 500,
)


def text(value: str) -> bytes:
    content = value.encode()
    return b"X" + struct.pack("<I", len(content)) + content


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def call(module: str, attribute: str, *arguments: bytes) -> bytes:
    """The instructions that call a function with arguments."""
    return name(module, attribute) + b"(" + b"".join(arguments) + b"t" + b"R"


def inside_checkpoint(instructions: bytes) -> bytes:
    """A pickle {"model": ...}."""
    return PROTO + b"}" + text("model") + instructions + b"s" + STOP


def archive(path: Path, content: bytes, more: dict[str, bytes] | None = None, **options) -> Path:
    """An archive as torch.save writes it, around that pickle."""
    with zipfile.ZipFile(path, "w", options.get("compression", zipfile.ZIP_STORED)) as out:
        out.writestr("archive/data.pkl", content)
        out.writestr("archive/version", "3\n")
        for entry, data in (more or {}).items():
            out.writestr(entry, data)
    return path


def old_file(path: Path, content: bytes, keys: tuple[str, ...] = ()) -> Path:
    """A file of before PyTorch 1.6 around that pickle."""
    out = io.BytesIO()
    for part in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}):
        pickle.dump(part, out, 2)
    out.write(content)
    pickle.dump(list(keys), out, 2)
    path.write_bytes(out.getvalue())
    return path


def own_file(path: Path, family: str, change) -> Path:
    """The micro detector of a family with another description in its safetensors file."""
    content = MICRO[family].read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    about = json.loads(header["__metadata__"]["zsqdet"])
    changed = change(about)
    about = about if changed is None else changed
    header["__metadata__"]["zsqdet"] = about if isinstance(about, str) else json.dumps(about)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    path.write_bytes(struct.pack("<Q", len(head)) + head + content[8 + length :])
    return path


def pickled_yolo11(path: Path, change=lambda module: None, key: str = "model", more=None) -> Path:
    """The micro YOLO11 as Ultralytics saves its models, changed before."""
    from yolo11 import adapter

    state, about = load_tensors(MICRO["yolo11"])
    detector = adapter.from_architecture(about["architecture"])
    detector.state = {name: t.float() if t.is_floating_point() else t for name, t in state.items()}
    module = detector.build()
    module.yaml = dict(about["architecture"]["yaml"])
    module = change(module) or module
    torch.save({key: module} | (more or {}), path)
    return path


def damaged_bytes(content: bytes, generator: random.Random) -> bytes:
    """One to three of: a flipped bit, another byte, a piece cut out, doubled, zeroed or moved, the end cut off."""
    found = bytearray(content)
    for _ in range(generator.randint(1, 3)):
        at = generator.randrange(max(len(found), 1))
        length = generator.choice((1, 8, 64, 1024))
        kind = generator.randrange(7)
        if kind == 0:
            found[at : at + 1] = bytes([found[at] ^ 1 << generator.randrange(8)]) if at < len(found) else b""
        elif kind == 1:
            found[at : at + 1] = bytes([generator.randrange(256)])
        elif kind == 2:
            del found[at : at + length]
        elif kind == 3:
            found[at:at] = found[at : at + length]
        elif kind == 4:
            found[at : at + length] = bytes(len(found[at : at + length]))
        elif kind == 5:
            other = generator.randrange(max(len(found), 1))
            found[at : at + length] = found[other : other + length]
        else:
            del found[at:]
    return bytes(found)


def damaged_value(value, generator: random.Random):
    """A copy of a JSON value with one place changed: removed, of another kind, doubled, renamed or moved."""
    found = copy.deepcopy(value)
    places = list(_places(found))
    parent, key = generator.choice(places)
    kind = generator.randrange(5)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(parent[key]))
    elif kind == 2 and isinstance(parent, list):
        generator.shuffle(parent)
    elif kind == 1 and isinstance(parent, dict):
        parent[f"{key}x"] = parent.pop(key)
    else:
        parent[key] = copy.deepcopy(generator.choice(VALUES))
    return found


def damaged_tensors(tensors: dict, generator: random.Random) -> dict:
    """A copy with one tensor removed, renamed, of another kind or shape, or with a number that is none."""
    found = {name: tensor.clone() for name, tensor in tensors.items()}
    name = generator.choice(sorted(found))
    tensor = found[name]
    kind = generator.randrange(7)
    if kind == 0:
        del found[name]
    elif kind == 1:
        found[f"{name}x"] = found.pop(name)
    elif kind == 2:
        found[name] = tensor.to(torch.int32 if tensor.is_floating_point() else torch.float32)
    elif kind == 3:
        found[name] = tensor[None]
    elif kind == 4:
        found[name] = torch.cat([tensor.reshape(-1), tensor.reshape(-1)])
    elif kind == 5 and tensor.is_floating_point():
        tensor.view(-1)[generator.randrange(tensor.numel())] = generator.choice((float("nan"), float("inf")))
    else:
        found["more"] = torch.ones(1)
    return found


def damaged_pickle(path: Path, target: Path, generator: random.Random) -> Path:
    """An archive of torch.save whose pickle is damaged, with right checksums."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as out:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                content = damaged_bytes(content, generator)
            out.writestr(entry.filename, content)
    return target


def _places(value):
    if isinstance(value, dict):
        for key in value:
            yield value, key
            yield from _places(value[key])
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield value, index
            yield from _places(item)


def as_text(value) -> str:
    return json.dumps(value)
