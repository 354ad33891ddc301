"""`zsqdet export`: a folder for one runtime that stands by itself."""

import contextlib
import glob
import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from common.deployment.card import model_card
from common.deployment.containers import Levels, as_float8, compact, pack_weights
from common.deployment.graph import Shape, add_metadata, export_graph, metadata_of
from common.deployment.parity import Parity, check_nodes, require
from common.deployment.qdq import as_eight_bits
from common.deployment.runtime import ONNX
from common.deployment.targets import TARGETS, Options, check_target
from common.deployment.tensorrt import require_rules
from common.quantization import bits_label, load_quantized
from common.quantization.convert import DESCRIPTION, TENSORS
from common.runtime.environment import needed
from common.runtime.errors import UserError
from common.runtime.files import own_prefix, read_json, remove_leftovers, write_json

log = logging.getLogger("zsqdet")


def export_folder(quantized: Path, out: Path, options: Options, about: dict[str, Any], image: np.ndarray) -> Parity:
    """Makes the folder, whole or not at all.

    Args:
        quantized: folder of `save_quantized`.
        out: the new folder.
        options: settings.
        about: what the card says of the run: `name`, `weights`, `rows` of results.json, `zero_shot`.
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
    about = about | {"label": bits_label(description["quantization"], description["layers"])}
    check_target(module, target, profile, any_profile=options.any_profile)
    with new_folder(out) as folder:
        graph = folder / "model.onnx"
        shape = Shape(options.size, options.batch, options.dynamic)
        log.info("export: tracing %s at %d x %d pixels", about["label"], *options.size)
        levels = export_graph(detector, module, graph, shape, opset=options.opset, codes=target.codes)
        _finish(graph, levels, options)
        add_metadata(graph, metadata_of(detector, description["family"], shape, about["label"]))
        parity = check_nodes(graph, image.repeat(options.batch, 0))
        require(parity, out / graph.name)
        for name in (TENSORS, DESCRIPTION):
            shutil.copyfile(quantized / name, folder / name)
        if target.extension == ".xml":
            to_openvino(graph, folder / "model_openvino_model")
            graph.unlink()
        write_json(folder / "parity.json", parity.as_json())
        write_json(folder / "export.json", asdict(options))
        if set(detector.export_outputs) == {"output0"} and target.extension == ONNX:  # type: ignore[attr-defined]
            shutil.copyfile(Path(__file__).parent / "scripts/predict_yolo.py", folder / "predict.py")
        card = model_card(about, detector, options.target, description, parity)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return parity


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
    model = compact(model)
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
    code = (
        "import sys, openvino; model = openvino.convert_model(sys.argv[1]); "
        "openvino.save_model(model, sys.argv[2], compress_to_fp16=False)"
    )
    folder.mkdir()
    made = folder / "model.xml"
    done = subprocess.run([sys.executable, "-c", code, str(graph), str(made)], capture_output=True, text=True)
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
