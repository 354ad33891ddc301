"""`zsqdet export`: a folder for one runtime that stands by itself, with a model card as Hugging Face reads it."""

import contextlib
import glob
import logging
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from common.deployment.containers import Levels, as_float8, compact, pack_weights, with_own_zero_points
from common.deployment.graph import Shape, add_metadata, export_graph, metadata_of
from common.deployment.parity import Parity, check_nodes, require
from common.deployment.qdq import as_eight_bits
from common.deployment.runtime import ONNX
from common.deployment.targets import TARGETS, Options, check_target, read_options
from common.deployment.tensorrt import require_rules
from common.detection.detector import build_detector, is_one_to_one
from common.quantization import bits_label, load_quantized
from common.quantization.convert import DESCRIPTION, TENSORS, read_description
from common.quantization.policy import FLOAT
from common.runtime.environment import ROOT, needed, version
from common.runtime.errors import UserError
from common.runtime.files import atomic, own_prefix, read_json, remove_leftovers, sha256, write_json

log = logging.getLogger("zsqdet")

LICENCE = "agpl-3.0"
USE = {
    "onnxruntime": "`python predict.py IMAGE`, or `YOLO('model.onnx').predict(...)` with Ultralytics.",
    "openvino": "`YOLO('model_openvino_model').predict(...)` with Ultralytics, or OpenVINO itself.",
    "opencv": "`cv2.dnn.readNetFromONNX('model.onnx')`, or `python predict.py IMAGE`.",
    "tensorrt": "`trtexec --onnx=model.onnx --stronglyTyped`; types stand in the graph.",
    "fp8": "`trtexec --onnx=model.onnx --stronglyTyped`; types stand in the graph. ONNX Runtime runs it in float.",
}


IN_FLOAT = {  # besides layers, by quantization.profile
    "inputs": ", and all operators between quantized layers",
    "full": ", the decoding of boxes, and operators between layers that are none of SiLU, ReLU, sum, concatenation and "
    "what only moves values",
}


def export_folder(quantized: Path, out: Path, options: Options, about: dict[str, Any], image: np.ndarray) -> Parity:
    """Makes the folder, whole or not at all.

    Args:
        quantized: folder of `save_quantized`.
        out: the new folder.
        options: settings.
        about: what the card says of the run, as in `model_card`.
        image: [1, 3, H, W] float32 in [0, 1] of the size that is exported, on which the graph is checked.

    Raises:
        UserError: a run that this runtime cannot run, a check that failed, or a folder that cannot be written.
    """
    target = TARGETS[options.target]
    detector, module = load_quantized(quantized)
    description = read_json(quantized / DESCRIPTION)
    if options.activations == 8:
        as_eight_bits(module)
    profile = description["quantization"]["profile"]
    label = bits_label(description["quantization"], description["layers"])
    check_target(module, target, profile, any_profile=options.any_profile)
    with new_folder(out) as folder:
        graph = folder / "model.onnx"
        shape = Shape(options.size, options.batch, options.dynamic)
        log.info("export: tracing %s at %d x %d pixels", label, *options.size)
        levels = export_graph(detector, module, graph, shape, opset=options.opset, codes=target.codes)
        _finish(graph, levels, options)
        add_metadata(graph, metadata_of(detector, description["family"], shape, label))
        parity = check_nodes(graph, image.repeat(options.batch, 0))
        require(parity, out / graph.name)
        for name in (TENSORS, DESCRIPTION):
            shutil.copyfile(quantized / name, folder / name)
        shapes = _shapes(graph)
        if target.extension == ".xml":
            to_openvino(graph, folder / "model_openvino_model")
            graph.unlink()
        hashes = {str(file.relative_to(folder)): sha256(file) for file in sorted(folder.rglob("*")) if file.is_file()}
        write_json(folder / "parity.json", parity.as_json())
        write_json(folder / "export.json", asdict(options) | {"shapes": shapes, "files": hashes})
        if set(detector.export_outputs) == {"output0"} and target.extension == ONNX:  # type: ignore[attr-defined]
            shutil.copyfile(Path(__file__).parent / "scripts/predict_yolo.py", folder / "predict.py")
        write_card(folder, about)
    return parity


def write_card(folder: Path, about: Mapping[str, Any]) -> None:
    """Writes README.md of an exported folder, also again when more is known of its run; nothing else is changed.

    Args:
        folder: from `export_folder`.
        about: as in `model_card`.

    Raises:
        UserError: a damaged folder.
    """
    options, description = read_options(folder), read_description(folder)
    shapes = read_json(folder / "export.json").get("shapes", {})  # older versions did not note them
    found = read_json(folder / "parity.json")
    counts = {name: Counter(found[name]) for name in ("nodes", "graph")}
    parity = Parity(found["codes"], found["differing"], found["largest"], floating=found["floating"], **counts)
    detector = build_detector(description.family, description.architecture)
    card = model_card(about, detector, options.target, description.model_dump(), parity, shapes)
    with atomic(folder / "README.md") as temporary:
        temporary.write_text(card, encoding="utf-8")


def _shapes(graph: Path) -> dict[str, list[int | str]]:
    """The sides of a graph's input and outputs, by name; those that may change have a name instead of a number."""
    onnx: Any = needed("onnx", "export")
    found = onnx.load(graph, load_external_data=False).graph
    sides = {value.name: value.type.tensor_type.shape.dim for value in (*found.input, *found.output)}
    return {name: [dim.dim_value or dim.dim_param or "?" for dim in dims] for name, dims in sides.items()}


def _finish(graph: Path, levels: Mapping[str, Levels], options: Options) -> None:
    """Simplifies the graph and packs its weights, in place."""
    onnx: Any = needed("onnx", "export")
    onnxslim: Any = needed("onnxslim", "export")
    model = onnxslim.slim(str(graph))
    wanted = options.container == "packed" and TARGETS[options.target].packed
    if wanted and any(entry.bits <= 4 for entry in levels.values()):
        model = pack_weights(model, levels)
    if TARGETS[options.target].codes == "float8":
        model = as_float8(model)
    model = with_own_zero_points(compact(model))
    onnx.checker.check_model(model)
    onnx.save(model, graph)
    if TARGETS[options.target].strict:
        require_rules(model)


def to_openvino(graph: Path, folder: Path) -> Path:
    """Makes the OpenVINO pair of an ONNX file in a new folder, with its metadata, and returns the .xml.

    In a process of its own: OpenVINO and ONNX Runtime in one process have crashed.

    Raises:
        UserError: OpenVINO is not installed, or cannot convert the graph.
    """
    code = "import sys; from common.deployment.containers import save_openvino; save_openvino(*sys.argv[1:])"
    folder.mkdir()
    made = folder / "model.xml"
    command = [sys.executable, "-c", code, str(graph.resolve()), str(made.resolve())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)  # not where a foreign `common` may be
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1]
        if "No module named" in last:
            needed("openvino", "export")
        raise UserError(f"openvino: cannot convert the graph ({last[:200]})")
    onnx: Any = needed("onnx", "export")
    entries = {p.key: p.value for p in onnx.load(graph).metadata_props}
    (folder / "metadata.yaml").write_text(yaml.safe_dump(entries, sort_keys=False), encoding="utf-8")
    return made


def check_new(out: Path) -> None:
    """Raises UserError where something has this name already."""
    if out.exists():
        raise UserError(f"{out}: exists already; remove it, or give another folder with --out")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name when all went well, and is removed when not.

    Each process has its own, so that of two at once the first one done has the name; what killed ones left is removed.

    Raises:
        UserError: something has this name already, or the folder cannot be made.
    """
    check_new(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out.parent.glob(f".{glob.escape(out.name)}.*.part"))
    part = Path(tempfile.mkdtemp(dir=out.parent, prefix=own_prefix(out), suffix=".part"))
    try:
        part.chmod(0o755)
        yield part
        with contextlib.suppress(OSError):  # not empty: another process was faster
            part.rename(out)
            return
        check_new(out)
        part.rename(out)  # says why it cannot be
    finally:
        shutil.rmtree(part, ignore_errors=True)


def example_image(size: tuple[int, int]) -> np.ndarray:
    """A smooth random image [1, 3, H, W], for a run whose own are gone."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 8, 8, generator=generator)
    return torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1).numpy()


def model_card(
    about: Mapping[str, Any],
    detector: Any,
    target: str,
    description: Mapping[str, Any],
    parity: Parity,
    shapes: Mapping[str, Sequence[int | str]],
) -> str:
    """Markdown with a YAML head.

    Args:
        about: `name` of the run, `weights` (base model), `zero_shot`; `rows`, the name of the `dataset` that they are
            measured on, and `fidelity` of results.json, with the `protocol` of each, a text.
        detector: an `ExportableDetector`.
        target: the runtime.
        description: `quantization.json`.
        parity: of the graph.
        shapes: of the graph's input and outputs, as far as known.
    """
    name, label = about["name"], bits_label(description["quantization"], description["layers"])
    profile = description["quantization"]["profile"]
    head = {
        "license": LICENCE,
        "library_name": "zsqdet",
        "pipeline_tag": "object-detection",
        "base_model": about["weights"],
        "tags": ["object-detection", "quantization", "zero-shot", target],
        "model-index": _index(name, about.get("dataset", ""), about.get("rows", [])),
    }
    kept = [layer for layer in description["layers"] if layer["weight_bits"] == layer["activation_bits"] == FLOAT]
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        f"# {name} ({label}) for {target}\n",
        f"Made by zsqdet {version('zsqdet') or ''} out of `{about['weights']}`, "
        + ("without any real image or label.\n" if about.get("zero_shot") else "with real images or labels.\n"),
        "## Use\n",
        USE[target] + "\n",
        f"`images` {_sides(shapes, 'images', '[B, 3, H, W]')}, RGB in [0, 1] -> {_outputs(detector, shapes)}.\n",
        "## Measured\n",
        _measured(about),
        "## What is quantized\n",
        f"{label}; {len(description['layers']) - len(kept)} layers; profile {profile}. "
        f"In float: {len(kept)} layers{IN_FLOAT[profile]}.\n",
        *(f"- `{layer['name']}`: {layer['reason']}" for layer in kept),
        "\n## Parity\n",
        f"{_checked(parity)}, against float64: {parity.differing} of {parity.codes} codes differ, by at most "
        f"{parity.largest}.\n",
        "Operators: " + ", ".join(f"{kind} {count}" for kind, count in parity.graph.most_common()) + ".\n",
        "ONNX Runtime multiplies in float: "
        + (", ".join(f"`{name}`" for name in parity.floating) or "nothing")
        + ".\n",
    ]
    return "\n".join(parts)


def _outputs(detector: Any, shapes: Mapping[str, Sequence[int | str]]) -> str:
    if is_one_to_one(detector):
        sides = _sides(shapes, "output0", "[B, n, 6]")
        return f"`output0` {sides}: boxes xyxy in pixels, score and class, best first, nothing to suppress"
    if set(detector.export_outputs) == {"output0"}:
        return f"`output0` {_sides(shapes, 'output0', '[B, 4 + classes, N]')}: boxes xywh in pixels and scores"
    names = ", ".join(f"`{name}` {_sides(shapes, name, '')}".strip() for name in detector.export_outputs)
    return f"of one image {names}; masks are grids over the boxes"


def _sides(shapes: Mapping[str, Sequence[int | str]], name: str, unknown: str) -> str:
    return f"[{', '.join(map(str, shapes[name]))}]" if name in shapes else unknown


def _checked(parity: Parity) -> str:
    """What of the graph was checked: where the runtime itself fuses integer operators there are only the roundings."""
    count = sum(parity.nodes.values())
    if set(parity.nodes) == {"QuantizeLinear"}:
        return f"The {count} QuantizeLinear nodes alone, in ONNX Runtime; the rest is left to the device"
    return f"Each of {count} integer nodes of ONNX Runtime's optimised graph"


def _index(name: str, dataset: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    results = [
        {
            "task": {"type": "object-detection"},
            "dataset": {"name": f"{dataset}, {row['images']} images", "type": "custom"},
            "metrics": [{"type": "mAP50-95", "value": round(row["AP"], 4), "name": f"mAP50-95 ({row['name']})"}],
        }
        for row in rows
    ]
    return [{"name": name, "results": results}]


def _measured(about: Mapping[str, Any]) -> str:
    """AP and fidelity, in PyTorch, with how they were measured."""
    rows, alike = about.get("rows", []), about.get("fidelity") or {}
    parts = []
    if rows:
        lines = ["| detector | bits | mAP50-95 | mAP50 | images | pixels |", "|--|--|--|--|--|--|"]
        for row in rows:
            values = f"{row['AP']:.4f} | {row['AP50']:.4f} | {row['images']} | {row['image_size']}"
            lines.append(f"| {row['name']} | {_bits(row)} | {values} |")
        parts.append("\n".join(lines) + f"\n\nMeasured in PyTorch, by pycocotools; {about['protocol']['rows']}.\n")
    if alike.get("rows"):
        kind = "synthetic images that were held out" if alike["synthetic"] else "images without labels"
        lines = ["| detector | bits | fidelity | objects | images |", "|--|--|--|--|--|"]
        for row in alike["rows"]:
            value = f"{row['AP']:.4f}" if row["objects"] else "n/a"
            lines.append(f"| {row['name']} | {_bits(row)} | {value} | {row['objects']} | {alike['images']} |")
        meaning = f"mAP50-95 with the full-precision detections as ground truth, 1 being equal, on {kind}"
        parts.append("\n".join(lines) + f"\n\nFidelity: {meaning}; {about['protocol']['fidelity']}.\n")
    return "\n".join(parts) or "Not measured yet: `zsqdet evaluate RUN data.images=DIR` compares it with float.\n"


def _bits(row: Mapping[str, Any]) -> str:
    return f"W{row['weight_bits']}A{row['activation_bits']}" if row["weight_bits"] <= 8 else "float"
