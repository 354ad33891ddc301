"""A checkpoint in the place of a configuration: family, sizes and preset are found out from the file and the device."""

import importlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config.presets import TAKES
from common.runtime.environment import choose_device
from common.runtime.errors import UserError
from common.runtime.files import open_ordinary

if TYPE_CHECKING:
    from common.checkpoints.read import WeightsFile

# torch takes seconds to import, so what needs it is imported where it is used.

SUFFIXES = (".pt", ".pth", ".safetensors", ".ckpt")
STARTS = (b"PK\x03\x04", b"\x80")  # of the files of torch.save


def is_checkpoint(path: Path) -> bool:
    """Whether a path is meant as weights and not as YAML: by its suffix or, without a known one, its first bytes."""
    if path.suffix.lower() in (*SUFFIXES, ".yaml", ".yml"):
        return path.suffix.lower() in SUFFIXES
    try:
        with open_ordinary(path) as stream:
            return stream.read(4).startswith(STARTS)
    except (OSError, ValueError):
        return False


def settings_of(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of an experiment on a checkpoint, as a YAML file would have them.

    Args:
        path: of the weights.
        given: the settings of the command line, which decide on family, device, preset and model where they name them.

    Raises:
        UserError: no file of a known family, or not such a device.
    """
    named, detector = given.get("family"), given.get("detector")
    model = detector.get("model") if isinstance(detector, dict) else None
    if isinstance(named, str):
        family, settings = named, _asked(named, path, model)
    else:
        family, settings = recognise(path, model)
    device = given.get("device", "auto")
    preset = given.get("preset")
    if preset not in TAKES:
        preset = "quick" if choose_device(device if isinstance(device, str) else "auto").type == "cpu" else "default"
    return {"family": family, "weights": str(path), "preset": preset} | settings


def recognise(path: Path, model: Any = None) -> tuple[str, dict[str, Any]]:
    """The family of a file of weights, and the settings that go with the file, or with the `detector.model` given.

    Raises:
        UserError: missing, damaged or unsafe, or not recognised: what was found, and what is supported.
    """
    file, known = _read(path, model), _families()
    found = {name: settings for name, part in known.items() if (settings := _of(part, file)) is not None}
    if len(found) == 1:
        return next(iter(found.items()))
    if found:
        raise UserError(f"{path}: found {file.content}, a file of {' and '.join(found)}; say which: family=NAME")
    supported = "; ".join(f"{name}: {part.SUPPORTED}" for name, part in known.items() if hasattr(part, "SUPPORTED"))
    advice = "" if file.network else "; a state_dict of a YOLO lacks its network: give the .pt that training wrote"
    raise UserError(
        f"{path}: found {file.content}, which is not recognised as a supported detector; "
        f"supported are {supported}{advice}"
    )


def _asked(family: str, path: Path, model: Any) -> dict[str, Any]:
    """The settings for a file whose family was named; none where that family does not know the file, or it is not
    there yet: its adapter can fetch it, or says what is wrong."""
    part = _families().get(family)
    return (_of(part, _read(path, model)) or {}) if part and path.is_file() else {}


def _read(path: Path, model: Any) -> "WeightsFile":
    from common.checkpoints.read import read_weights

    if not path.exists():
        raise UserError(
            f"weights: {path} does not exist; give the path of a checkpoint, or family=NAME to fetch an official one"
        )
    file = read_weights(path)
    return replace(file, model=model) if isinstance(model, str) else file


def _families() -> dict[str, Any]:
    """The package of each family; it says by `recognise` which files are its own."""
    from common.detection.detector import families

    packages = {name: module.partition(".")[0] for name, module in families().items()}
    return {name: importlib.import_module(package) for name, package in packages.items()}


def _of(part: Any, file: "WeightsFile") -> dict[str, Any] | None:
    settings: dict[str, Any] | None = part.recognise(file) if hasattr(part, "recognise") else None
    return settings
