"""`zsqdet info`: what a file or folder is. Nothing in it is run; pickles are read as plain data."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from torch import nn

from common.checkpoints.strict_json import Strict, checked
from common.config.from_checkpoint import is_checkpoint, recognise
from common.config.presets import EXPORTED
from common.config.schema import QuantizationConfig
from common.deployment.runtime import ONNX, OPENVINO
from common.deployment.targets import read_options
from common.detection.detector import Detector, ExportableDetector, load_detector
from common.pipeline.run_dir import is_complete, quantized_folder, results, stored_settings
from common.quantization import bits_label, load_quantized, plan_layers
from common.quantization.convert import read_config, read_description
from common.quantization.layers import weight_count
from common.runtime.environment import needed
from common.runtime.errors import SettingNeededError, UserError, printable
from common.runtime.files import read_checked_json

NAMES = 5  # of classes that are shown
FLOAT = 32
ATTENTION = "attention_input"  # a role without weights
About = dict[str, Any]


class _SetConfig(Strict):
    model_config = ConfigDict(extra="ignore")

    source: str
    num_images: int
    image_size: int


class _Set(Strict):
    """Of set.json, what is shown."""

    model_config = ConfigDict(extra="ignore")

    config: _SetConfig
    labels_from: str
    seed: int
    weights_sha256: str
    data_read: list[str]
    statistics_distance: dict[str, float] | None


def describe(path: Path) -> About:
    """What `path` is, a JSON-able value for each line that is printed.

    Raises:
        UserError: missing, damaged, or none of what zsqdet reads and writes.
    """
    if not path.exists():
        raise UserError(f"{path}: does not exist; give a checkpoint, or a folder that zsqdet made")
    kinds: list[tuple[bool, Callable[[Path], About]]] = [
        (path.suffix in (ONNX, OPENVINO), _graph),
        ((path / "export.json").is_file(), _exported),
        ((path / "set.json").is_file(), _image_set),
        ((path / "config.yaml").is_file(), _run),
        (is_complete(path) or (is_complete(path.parent) and path.name == "model.safetensors"), _quantized),
        (path.is_file() and is_checkpoint(path), _checkpoint),
    ]
    found = next((about for fits, about in kinds if fits), None)
    if found is None:
        raise UserError(
            f"{path}: none of a checkpoint (.pt, .pth, .safetensors), a folder of a run, of a quantized detector, "
            "of a synthetic image set or of an export, and an .onnx or .xml graph"
        )
    return found(path)


def lines(about: About) -> Iterator[str]:
    """What `describe` found, as it is printed."""
    for name, value in about.items():
        if isinstance(value, dict):
            value = [f"{part} {number:.3g}" for part, number in value.items()]
        yield printable(f"{name:<16} {', '.join(map(str, value)) if isinstance(value, list) else value}")


def _checkpoint(path: Path) -> About:
    family, settings = recognise(path)
    about = {"what": "float checkpoint", "family": family}
    try:
        detector = load_detector(family, path)
    except SettingNeededError as error:
        return about | {"needs a setting": str(error).removeprefix(f"{path}: ")} | _size(path)
    return about | _detector(detector, settings) | _size(path)


def _detector(detector: Detector, settings: About) -> About:
    module = detector.build()
    plan = plan_layers(detector, module, QuantizationConfig())
    kept = [str(entry.role) for entry in plan if entry.weight_bits == entry.activation_bits == FLOAT]
    counted = Counter(type(module.get_submodule(entry.name)).__name__ for entry in plan)
    size = settings.get("synthesis", {}).get("image_size")
    return {
        "architecture": _architecture(detector),
        **_classes(detector.class_names),
        "layers": f"{len(plan)} ({', '.join(f'{n} {kind}' for kind, n in counted.most_common())})",
        "parameters": sum(p.numel() for p in module.parameters()),
        "stride": detector.stride,
        "image size": f"{size} pixels unless a setting says otherwise",
        "bits": "float",
        "quantizable": f"yes, {len(plan) - len(kept)} of {len(plan)} layers; in float stay {_kinds(kept)}",
        "exportable to": [*EXPORTED, "fp8"] if isinstance(detector, ExportableDetector) else "none",
    }


def _architecture(detector: Detector) -> str:
    said = detector.architecture
    yaml = said.get("yaml")
    if isinstance(yaml, dict):
        scale = yaml.get("scale") or "depth {}, width {}".format(yaml.get("depth_multiple"), yaml.get("width_multiple"))
        return f"{len(yaml['backbone']) + len(yaml['head'])} blocks, scale {scale}"
    on = f" on {said['backbone']}" if said.get("backbone") else ""
    return str(said.get("model") or said.get("config") or ", ".join(said)) + on


def _kinds(roles: list[str]) -> str:
    return ", ".join(f"{role} ({count})" for role, count in Counter(roles).items()) or "none"


def _classes(names: tuple[str, ...] | list[str]) -> About:
    return {"classes": f"{len(names)}: {_few(list(names))}"}


def _few(names: list[str]) -> str:
    return ", ".join(name[:40] for name in names[:NAMES]) + (", ..." if len(names) > NAMES else "")


def _size(path: Path) -> About:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {"size": f"{sum(file.stat().st_size for file in files) / 1e6:.2f} MB"}


def _at_their_bits(module: nn.Module, layers: list[About]) -> str:
    """How large the weights are with the bits of their layers: the file of the folder has all of them in float."""
    counts = [(weight_count(module, row["name"]), row["weight_bits"]) for row in layers if row["role"] != ATTENTION]
    sizes = (sum(count * bits / 8 for count, bits in taken) for taken in (counts, [(n, FLOAT) for n, _ in counts]))
    return "{:.2f} MB at their bits, {:.2f} MB in float".format(*(size / 1e6 for size in sizes))


def _quantized(path: Path) -> About:
    folder = path if path.is_dir() else path.parent
    about = read_description(folder)
    detector, _ = load_quantized(folder)
    settings, layers = read_config(about, folder).model_dump(), about.model_dump()["layers"]
    kept = [row["role"] for row in layers if row["weight_bits"] == row["activation_bits"] == FLOAT]
    own = detector.build()  # without the quantizers' scales
    fitting = [name for name, wanted in EXPORTED.items() if wanted.items() <= settings.items()]
    return {
        "what": "quantized detector",
        "family": about.family,
        "architecture": _architecture(detector),
        **_classes(detector.class_names),
        "bits": bits_label(settings, layers),
        "layers": f"{len(layers)}, in float {_kinds(kept)}",
        "parameters": sum(p.numel() for p in own.parameters()),
        "size of weights": _at_their_bits(own, layers),
        "stride": detector.stride,
        "profile": settings["profile"],
        "exportable to": fitting,
    } | _size(folder)


def _run(path: Path) -> About:
    settings, stored = stored_settings(path), results(path)
    finished = is_complete(path / "quantized")
    found: About = {"what": "run" if finished else "run that is not finished: repeat its command"}
    found |= {"family": settings.get("family"), "weights": settings.get("weights")}
    folder = quantized_folder(path) if finished else path / "ptq" if is_complete(path / "ptq") else None
    if folder:
        found |= _quantized(folder) | {"what": found["what"]}
    found["image size"] = f"{settings.get('synthesis.image_size')} pixels"
    for row in stored["rows"]:
        found[f"AP {row['name']}"] = round(row["AP"], 4)
    made = [f"{file.parent.name} ({_graph_size(file.parent)})" for file in sorted(path.glob("export/*/export.json"))]
    return found | {"exported to": made or "nothing yet"} | _size(path)


def _image_set(path: Path) -> About:
    about = checked(_Set, read_checked_json(path / "set.json"), f"{path / 'set.json'}: damaged")
    return {
        "what": "synthetic image set" if about.config.source != "real" else "image set of real images",
        "images": about.config.num_images,
        "image size": f"{about.config.image_size} pixels",
        "source": about.config.source,
        "labels from": about.labels_from,
        "seed": about.seed,
        "of weights": f"SHA-256 {about.weights_sha256[:12]}...",
        "data read": about.data_read or "none",
        "distance": about.statistics_distance or "not measured",
    } | _size(path)


def _graph_size(folder: Path) -> str:
    found = [*folder.glob(f"*{ONNX}"), *folder.glob("*/*.bin")]
    return str(_size(found[0])["size"]) if found else "graph missing"


def _exported(path: Path) -> About:
    options, about = read_options(path), read_description(path)
    graphs = [*path.glob("*.onnx"), *path.glob("*/*.xml")]
    found = {
        "what": f"detector exported for {options.target}",
        "family": about.family,
        "bits": bits_label(about.quantization, about.model_dump()["layers"]),
        "image size": "{} x {} pixels".format(*options.size),
        "batch": "any" if options.dynamic else options.batch,
        "graph": graphs[0].relative_to(path).as_posix() if graphs else "missing",
    }
    names = about.architecture.get("names")
    known = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    return found | (_classes(known) if known else {}) | _size(path)


def _graph(path: Path) -> About:
    """A graph by itself: an .onnx file is read and not loaded into a runtime; an .xml is only named."""
    found: About = {"what": "graph of OpenVINO"} | _size(path.with_suffix(".bin") if path.suffix == OPENVINO else path)
    if path.suffix == OPENVINO:
        return found | {"more": "give the folder that `zsqdet export` wrote"}
    onnx = needed("onnx", "export")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's errors have no common class
        raise UserError(f"{path}: damaged, no ONNX graph; export it again") from error
    nodes = Counter(node.op_type for node in model.graph.node)
    metadata = {entry.key: entry.value[:80] for entry in model.metadata_props if entry.key not in ("names", "zsqdet")}
    if not nodes:
        raise UserError(f"{path}: damaged, no ONNX graph; export it again")
    given = [
        [dim.dim_param or dim.dim_value for dim in entry.type.tensor_type.shape.dim] for entry in model.graph.input
    ]
    return found | {
        "what": "ONNX graph" + ("" if nodes["QuantizeLinear"] else ", not quantized"),
        "input": given[0] if len(given) == 1 else given or "none",
        "outputs": [output.name for output in model.graph.output],
        "nodes": [f"{count} {kind}" for kind, count in nodes.most_common(6)],
        **metadata,
    }
