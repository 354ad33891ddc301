"""From a YAML file and `key=value` overrides to a checked ExperimentConfig, and back.

A file holds only what differs from the defaults. It may name one `base:` file, relative to itself, whose values it
changes; all other relative paths are relative to the current directory.

Base, file and command line are a layer over the one before: a value of a later one replaces that of an earlier one. A
preset that a layer names takes the place of everything that earlier layers say about the recipe of its section, so that
it means the same over any file; KEPT lists what stays.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from common.config.from_checkpoint import is_checkpoint, settings_of
from common.config.presets import KEPT, PRESETS, TAKES
from common.config.reference import BITS, known_keys, known_sections, nearest_key
from common.config.schema import ExperimentConfig, QuantizationConfig
from common.config.yaml_text import MAX_DEPTH, parse_yaml, read_text
from common.runtime.errors import UserError
from common.runtime.files import atomic

COMMAND_LINE = "command line"
RENAMED = {  # keys of version 0.1, for an error that names the new one
    "quantization.initial_step": "quantization.scale_init",
    "quantization.input_margin": "quantization.range_headroom",
    "quantization.borders": "quantization.letterbox_padding",
    "quantization.budget": "quantization.average_bits",
    "quantization.budget_bits": "quantization.mixed_precision_bits",
    "quantization.fold_norms": "quantization.fold_layernorm",
    "synthesis.mixed_precision": "synthesis.autocast",
    "training.step_learning_rate": "training.scale_learning_rate",
    "training.log_steps": "training.log_scale",
    "training.scale": "training.zoom",
    "evaluation.shrink": "evaluation.interpolation",
    **{
        f"synthesis.relabel.{name}": f"synthesis.label_sampling.{name}"
        for name in ("every", "start", "stop", "confidence", "overlap", "min_area", "max_area")
    },
}

_BITS = re.compile(r"w([2-8])a([2-8])", re.IGNORECASE)
_BOTH = ("weight_bits", "activation_bits")


def load_config(
    path: Path, overrides: Sequence[str] = (), content: Mapping[str, Any] | None = None
) -> ExperimentConfig:
    """Loads the experiment described by `path`; without `run_dir` its run folder is runs/<name of the file>_<bits>.

    Args:
        path: YAML file, or a checkpoint: then family, image size and preset come from it and the device.
        overrides: `key=value` with dotted keys and YAML values, over the file; the last one of a key counts.
            `quantization=paper` is short for `quantization.preset=paper`, `bits=w4a8` for both bit-widths.
        content: what the file is to be read as, where it is no YAML.

    Raises:
        UserError: one line for each mistake in the file, its base and the overrides.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    given = _parse_overrides(overrides, problems)
    if content is not None:
        files = [(str(path), dict(content))]
    else:
        files = [(str(path), settings_of(path, given))] if is_checkpoint(path) else _files(path, problems)
    if is_checkpoint(path) and given.get("preset") == files[0][1]["preset"]:
        del given["preset"]  # already under what goes with the file, and not over it
    for source, layer in [*files, (COMMAND_LINE, given)]:
        layer, mistakes = open_bits(open_presets(layer))
        problems += [f"{source}: {mistake}" for mistake in mistakes]
        origins |= {name: source for name, _ in flatten(layer)}
        problems += [_unknown(source, name, value) for name, value in flatten(layer) if not _is_known(name)]
        values = lay(values, layer)
        left = {name for name, _ in flatten(values)}
        origins = {name: origin for name, origin in origins.items() if name in left}
    values.setdefault("run_dir", _run_dir(path, values))
    try:
        config = ExperimentConfig.model_validate(values)
    except ValidationError as error:
        problems += _describe(error, values, origins, path)
    if problems:
        raise UserError(*problems)
    return config


class _Dumper(yaml.SafeDumper):
    """PyYAML's, with quotes and escapes where a text has a line break of YAML, which it loses otherwise."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style='"' if {*"\x85\u2028\u2029\ufeff"} & {*text} else None
    ),
)


def dump_config(config: ExperimentConfig, path: Path) -> None:
    """Writes every key with its value; `load_config` gives back an equal object.

    Raises:
        UserError: the file cannot be written.
    """
    text = yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def announcement(config: ExperimentConfig) -> str:
    """What a run is about to do, in a line; how long it takes is known of a preset whose numbers nobody changed."""
    plain = ExperimentConfig(weights=config.weights, family=config.family, preset=config.preset)

    def work(of: ExperimentConfig) -> list[int]:
        return [of.synthesis.num_images, of.synthesis.iterations, of.training.epochs]

    epochs, size = config.training.epochs, config.synthesis.image_size
    training = f"{epochs} epoch{'s' * (epochs > 1)} of training" if epochs else "no training"
    time = f"; {TAKES[config.preset]}" if work(config) == work(plain) else ""
    return (
        f"{config.weights.name}: {config.family}; preset={config.preset}: {config.synthesis.num_images} images of "
        f"{size} pixels, {training}{time}"
    )


def _run_dir(path: Path, values: Mapping[str, Any]) -> str:
    """runs/yolo11n_w4a8 for yolo11n.yaml at these bits, with the kinds of levels that are not the default behind them.

    A name that ends in bits already gets them replaced. All of Ultralytics' trainings leave a NAME/weights/best.pt, so
    NAME goes before that.
    """
    section = values.get("quantization")
    given = section if isinstance(section, dict) else {}
    fields = QuantizationConfig.model_fields
    bits = [given.get(key, fields[key].default) for key in _BOTH]
    levels = [(given.get(key), fields[key].default) for key in ("codebook", "weight_levels", "activation_levels")]
    named = "".join(f"_{name}" for name, default in levels if isinstance(name, str) and name != default)
    stem = re.sub(r"_w[2-8]a[2-8]$", "", path.stem, flags=re.IGNORECASE)
    if path.name in ("best.pt", "last.pt") and path.absolute().parent.name == "weights":
        stem = f"{path.absolute().parents[1].name}_{stem}".lstrip("_")
    return f"runs/{stem}_w{bits[0]}a{bits[1]}{named}"


def _files(path: Path, problems: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """The file's values after those of its base, each with the name to blame."""
    values = _read(path, problems)
    base = values.pop("base", None)
    if base is None:
        return [(str(path), values)]
    if not isinstance(base, str):
        raise UserError(f"{path}: base: found {base!r}; allowed is the path of one YAML file, relative to this one")
    base_path = path.parent / base
    base_values = _read(base_path, problems)
    if base_values.pop("base", None) is not None:
        problems.append(f"{base_path}: base: a base has no base of its own; put its values into {base_path.name}")
    return [(str(base_path), base_values), (str(path), values)]


def _read(path: Path, problems: list[str]) -> dict[str, Any]:
    text = read_text(path)
    try:
        values, twice = parse_yaml(text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    problems += [f"{path}: {line}" for line in twice]
    if not isinstance(values, dict | None):
        raise UserError(f"{path}: found {short(values)}; allowed are lines of `key: value`")
    return values or {}


def _parse_overrides(overrides: Sequence[str], problems: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals or not name or name.count(".") > MAX_DEPTH:
            problems.append(f"{COMMAND_LINE}: found {short(text)}; allowed is key=value, e.g. bits=w4a8")
            continue
        try:
            parsed, twice = _parse_value(name, value)
        except UserError as error:
            problems.append(f"{COMMAND_LINE}: {name}: found {short(value)}, {error}; quote it")
            continue
        problems += [f"{COMMAND_LINE}: {name}.{line}" for line in twice]
        for part in reversed(name.split(".")):
            parsed = {part: parsed}
        values = merge(values, open_presets(parsed))
    return values


def _parse_value(name: str, value: str) -> tuple[Any, list[str]]:
    """YAML, except that texts and paths are taken as they are, whatever characters they hold."""
    is_text = known_keys()[name].is_text if name in known_keys() else name == "data" and value[:1] != "{"
    return (value, []) if is_text and value not in ("", "null", "none", "~") else parse_yaml(value)


def _is_known(name: str) -> bool:
    """Whether the schema has this key; a plain value in a section's place is left to the schema's own check."""
    if name in known_keys() or name in known_sections():
        return True
    return any(name.startswith(f"{key}.") for key in known_keys())


def _unknown(source: str, name: str, value: Any) -> str:
    if name in RENAMED:
        return f"{source}: {name}: found {short(value)}; this key is now {RENAMED[name]}"
    nearest = nearest_key(name)
    hint = f"did you mean {nearest}?" if nearest else "see `zsqdet run --help` for all keys"
    return f"{source}: {name}: found {short(value)}; allowed are known keys only; {hint}"


def _describe(error: ValidationError, values: Mapping[str, Any], origins: Mapping[str, str], path: Path) -> list[str]:
    """One line for each thing the schema rejected; unknown keys have been reported already."""
    lines = []
    for problem in error.errors():
        if not problem["loc"]:  # a key that is no text, which has been reported as unknown
            continue
        name = _key_of(problem["loc"])
        # A preset that is wrong at the top is passed on to the sections, and is one mistake.
        inherited = name.endswith(".preset") and name not in origins and "preset" in origins
        if inherited or (problem["type"] == "extra_forbidden" and name not in known_keys()):
            continue
        source = origins.get(name) or next((s for n, s in origins.items() if n.startswith(f"{name}.")), str(path))
        lines.append(f"{source}: {name}: {_complaint(problem, name, _found(values, name))}")
    return list(dict.fromkeys(lines))


def _key_of(location: Sequence[str | int]) -> str:
    """The known key that a place in the values belongs to, e.g. training.zoom for its first number."""
    names = [".".join(map(str, location[:i])) for i in range(1, len(location) + 1)]
    return next((name for name in names if name in known_keys()), names[-1])


def _complaint(problem: Any, name: str, found: Any) -> str:
    if problem["type"] == "missing" and found is None:
        return f"found nothing; allowed is {known_keys()[name].allowed}; set it in the file or as {name}=VALUE"
    if problem["type"] == "value_error":
        return problem["msg"].removeprefix("Value error, ")
    allowed = known_keys()[name].allowed if name in known_keys() else "a section with keys of its own"
    return f"found {short(found)}; allowed: {allowed}"


def _found(values: Mapping[str, Any], name: str) -> Any:
    found: Any = values
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


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
