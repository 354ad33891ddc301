"""How a base, a file and the command line become one set of values: each is a layer over the one before.

A value of a later layer replaces that of an earlier one. A preset that a layer names takes the place of everything that
earlier layers say about the recipe of its section, so that it means the same over any file; KEPT lists what stays.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from common.config.presets import KEPT, PRESETS
from common.config.reference import BITS, known_keys, known_sections

_BITS = re.compile(r"w([2-8])a([2-8])", re.IGNORECASE)
_BOTH = ("weight_bits", "activation_bits")


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values; known keys that hold a mapping (quantization.layers) stay whole."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and name not in known_keys():
            yield from flatten(value, f"{name}.")
        else:
            yield name, value


def open_presets(layer: dict[str, Any]) -> dict[str, Any]:
    """`quantization: paper` becomes {preset: paper}, `data: FILE` {dataset: FILE}, a section without any line {}."""
    opened = {}
    for name, value in layer.items():
        if isinstance(value, str) and (name in PRESETS or name == "data"):
            value = {"dataset" if name == "data" else "preset": value}
        opened[name] = {} if value is None and name in known_sections() else value
    return opened


def open_bits(layer: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`bits: w4a8` becomes quantization.weight_bits and activation_bits; the mistakes in it, a line each."""
    if "bits" not in layer:
        return layer, []
    rest = {name: value for name, value in layer.items() if name != "bits"}
    found = layer["bits"]
    match = _BITS.fullmatch(found) if isinstance(found, str) else None
    if match is None:
        return rest, [f"bits: found {short(found)}; allowed: {BITS.allowed}"]
    section = rest.get("quantization", {})
    if not isinstance(section, dict):  # the schema will say so
        return rest, []
    meant = dict(zip(_BOTH, map(int, match.groups()), strict=True))
    others = [f"quantization.{k}: {short(section[k])}" for k in _BOTH if k in section and section[k] != meant[k]]
    if others:
        return rest, [f"bits: found {found}, but also {' and '.join(others)}; keep one of the two ways"]
    return rest | {"quantization": section | meant}, []


def lay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`, after the presets that `above` names have taken the recipe out of `below`."""
    cleared = dict(below)
    for section, kept in KEPT.items():
        own = above.get(section)
        names_preset = "preset" in above or (isinstance(own, dict) and "preset" in own)
        if names_preset and isinstance(below.get(section), dict):
            cleared[section] = {name: value for name, value in below[section].items() if name in kept}
    if isinstance(above.get("data"), dict) and isinstance(below.get("data"), dict):
        cleared["data"] = _other_set(below["data"], above["data"])
    return merge(cleared, above)


def _other_set(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """What stays of the set of `below` under the one that `above` names: nothing, or not what is named another way."""
    named = {name for name, value in above.items() if value is not None}
    if "dataset" in named:
        return {}
    return {k: v for k, v in below.items() if k != "dataset"} if named & {"images", "annotations"} else below


def merge(below: dict[str, Any], above: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`above` over `below`, section by section; lists and quantization.layers are replaced as a whole."""
    merged = dict(below)
    for key, value in above.items():
        name = f"{prefix}{key}"
        both = isinstance(value, dict) and isinstance(merged.get(key), dict) and name not in known_keys()
        merged[key] = merge(merged[key], value, f"{name}.") if both else value
    return merged


def short(value: Any) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
