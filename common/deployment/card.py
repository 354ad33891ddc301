"""The README.md of an exported folder: a model card with its metrics, as Hugging Face reads it."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from common.deployment.parity import Parity
from common.detection.detector import is_one_to_one
from common.runtime.environment import version

LICENCE = "agpl-3.0"
USE = {
    "onnxruntime": "`python predict.py IMAGE`, or `YOLO('model.onnx').predict(...)` with Ultralytics.",
    "openvino": "`YOLO('model_openvino_model').predict(...)` with Ultralytics, or OpenVINO itself.",
    "opencv": "`cv2.dnn.readNetFromONNX('model.onnx')`, or `python predict.py IMAGE`.",
    "tensorrt": "`trtexec --onnx=model.onnx --stronglyTyped`; types stand in the graph.",
    "fp8": "`trtexec --onnx=model.onnx --stronglyTyped`; types stand in the graph. ONNX Runtime runs it in float.",
}


def model_card(
    about: Mapping[str, Any], detector: Any, target: str, description: Mapping[str, Any], parity: Parity
) -> str:
    """Markdown with a YAML head.

    Args:
        about: `name` of the run, `weights` (base model), `rows` of results.json, `zero_shot`, `label` (bits, levels).
        detector: an `ExportableDetector`.
        target: the runtime.
        description: `quantization.json`.
        parity: of the graph.
    """
    name, label = about["name"], about["label"]
    head = {
        "license": LICENCE,
        "library_name": "zsqdet",
        "pipeline_tag": "object-detection",
        "base_model": about["weights"],
        "tags": ["object-detection", "quantization", "zero-shot", target],
        "model-index": _index(name, about.get("rows", [])),
    }
    kept = [layer for layer in description["layers"] if layer["weight_bits"] > 8 and layer["role"] != "product"]
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        f"# {name} ({label}) for {target}\n",
        f"Made by zsqdet {version('zsqdet') or ''} out of `{about['weights']}`, "
        + ("without any real image or label.\n" if about.get("zero_shot") else "with real images or labels.\n"),
        "## Use\n",
        USE[target] + "\n",
        f"`images` [B, 3, H, W], RGB in [0, 1] -> {_outputs(detector)}.\n",
        "## Measured\n",
        _table(about.get("rows", [])),
        "## What is quantized\n",
        f"{label}; {len(description['layers']) - len(kept)} layers; profile {description['quantization']['profile']}. "
        f"In float: {len(kept)} layers, activations, normalisation and what follows the head.\n",
        *(f"- `{layer['name']}`: {layer['reason']}" for layer in kept),
        "\n## Parity\n",
        f"Each of {sum(parity.nodes.values())} integer nodes of ONNX Runtime's optimised graph against float64: "
        f"{parity.differing} of {parity.codes} codes differ, by at most {parity.largest}.\n",
        "Operators: " + ", ".join(f"{kind} {count}" for kind, count in parity.graph.most_common()) + ".\n",
    ]
    return "\n".join(parts)


def _outputs(detector: Any) -> str:
    if is_one_to_one(detector):
        return "`output0` [B, n, 6]: boxes xyxy in pixels, score and class, best first, nothing to suppress"
    if set(detector.export_outputs) == {"output0"}:
        return "`output0` [B, 4 + classes, N]: boxes xywh in pixels and scores"
    return f"of one image {', '.join(f'`{name}`' for name in detector.export_outputs)}; masks are grids over the boxes"


def _index(name: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    results = [
        {
            "task": {"type": "object-detection"},
            "dataset": {"name": str(row.get("annotations", "COCO")), "type": "coco"},
            "metrics": [{"type": "mAP50-95", "value": round(row["AP"], 4), "name": f"mAP50-95 ({row['name']})"}],
        }
        for row in rows
    ]
    return [{"name": name, "results": results}]


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "Not measured: the run named no set to evaluate on.\n"
    lines = ["| detector | bits | mAP50-95 | mAP50 | images | pixels |", "|--|--|--|--|--|--|"]
    for row in rows:
        bits = f"W{row['weight_bits']}A{row['activation_bits']}" if row["weight_bits"] <= 8 else "float"
        values = f"{row['AP']:.4f} | {row['AP50']:.4f} | {row['images']} | {row['image_size']}"
        lines.append(f"| {row['name']} | {bits} | {values} |")
    return "\n".join(lines) + "\n\nMeasured in PyTorch, by pycocotools.\n"
