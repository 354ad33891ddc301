"""Every configuration key with its allowed values, default and meaning, read from the schema."""

import difflib
import functools
from dataclasses import dataclass
from typing import Any

from common.config.schema import ExperimentConfig


@dataclass(frozen=True)
class Key:
    """One line of the reference: a key that takes a value."""

    name: str  # dotted, e.g. quantization.weight_bits
    allowed: str
    default: Any  # None where there is none
    required: bool
    meaning: str
    is_text: bool  # a string or path: what is written is meant literally


BITS = Key(
    name="bits",
    allowed="w4a8 and the like: w and 2 to 8 bits of weights, a and 2 to 8 bits of activations",
    default="w8a8",
    required=False,
    meaning="short for quantization.weight_bits and quantization.activation_bits",
    is_text=True,
)


@functools.cache
def known_keys() -> dict[str, Key]:
    """All keys by dotted name, in the order of the schema."""
    schema = ExperimentConfig.model_json_schema()
    return {key.name: key for key in _walk(schema, schema["$defs"], "")}


@functools.cache
def known_sections() -> frozenset[str]:
    """The dotted names that hold other keys: synthesis, synthesis.weights, ..."""
    parts = [name.split(".") for name in known_keys()]
    return frozenset(".".join(p[:i]) for p in parts for i in range(1, len(p)))


def nearest_key(name: str) -> str | None:
    """The known key or section closest to `name`, by the whole name or by its last part; None if nothing is close."""

    def closeness(known: str) -> float:
        whole = difflib.SequenceMatcher(None, name, known).ratio()
        last = difflib.SequenceMatcher(None, name.rpartition(".")[2], known.rpartition(".")[2]).ratio()
        return max(whole, 0.9 * last)  # the right word in the wrong section comes second

    best = max([BITS.name, *known_keys(), *known_sections()], key=closeness)
    return best if closeness(best) >= 0.6 else None


def reference(word: str = "") -> str:
    """The keys as text, for --help: all of them, or those with `word` in their name, else in what is said of them."""
    lines: list[str] = []
    section = ""
    keys = (BITS, *known_keys().values())
    said = word.lower().replace("_", " ")
    for key in [k for k in keys if word in k.name] or [k for k in keys if said in f"{k.allowed} {k.meaning}".lower()]:
        if key.name.partition(".")[0] != section:
            section = key.name.partition(".")[0]
            lines += [""] if "." in key.name and lines else []
        default = "required" if key.required else f"default {'none' if key.default is None else _text(key.default)}"
        lines.append(f"  {key.name}  ({key.allowed}; {default})")
        lines.append(f"      {key.meaning}")
    return "\n".join(lines)


def _walk(schema: dict[str, Any], definitions: dict[str, Any], prefix: str) -> list[Key]:
    keys = []
    for name, field in schema["properties"].items():
        if "$ref" in field:
            keys += _walk(definitions[field["$ref"].rpartition("/")[2]], definitions, f"{prefix}{name}.")
            continue
        options = field.get("anyOf", [field])
        keys.append(
            Key(
                name=prefix + name,
                allowed=" or ".join(_allowed(option, definitions) for option in options),
                default=field.get("default"),
                required=name in schema.get("required", ()),
                meaning=field.get("description", ""),
                is_text=any(o.get("type") == "string" and "enum" not in o for o in options),
            )
        )
    return keys


def _allowed(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "enum" in field:
        return " | ".join(map(_text, field["enum"]))
    if field.get("format") == "path":
        return "a path"
    if field["type"] in ("integer", "number"):
        return ("an integer" if field["type"] == "integer" else "a number") + _range(field)
    if "prefixItems" in field:
        return f"[{', '.join(_allowed(item, definitions) for item in field['prefixItems'])}]"
    if field["type"] == "array":
        each = _allowed(field["items"], definitions).replace("an integer", "integers")
        return f"a list of {'one or more ' if field.get('minItems') else ''}{each}"
    if field["type"] == "object":
        inner = _walk(definitions[field["additionalProperties"]["$ref"].rpartition("/")[2]], definitions, "")
        return "a mapping of patterns to {" + ", ".join(f"{k.name}: {k.allowed}" for k in inner) + "}, both of them"
    return {"boolean": "true or false", "string": "text", "null": "none"}[field["type"]]


def _range(field: dict[str, Any]) -> str:
    if "minimum" in field and "maximum" in field:
        return f" from {field['minimum']} to {field['maximum']}"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f" {sign} {field[name]}" for name, sign in signs.items() if name in field]
    return " and".join(limits)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return str(value)
