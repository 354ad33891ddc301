"""Files that nobody should trust: written byte by byte, so that no library is asked whether they make sense."""

import io
import json
import pickle
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
