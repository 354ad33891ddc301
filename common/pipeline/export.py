"""A finished run as a folder for a runtime, and how fast it is there; what `zsqdet export` and `benchmark` do."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from shutil import copyfile, rmtree
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common.deployment.benchmark import Timing, compare, instruction_sets, node_times
from common.deployment.folder import example_image, export_folder, to_openvino, write_card
from common.deployment.graph import Shape, export_graph
from common.deployment.parity import Parity
from common.deployment.runtime import ONNX, check_export, graph_file
from common.deployment.targets import TARGETS, Options, read_options
from common.detection.detector import build_detector
from common.pipeline.records import protocol
from common.pipeline.run_dir import check_files, is_complete, quantized_folder, results, stored_settings, timed
from common.quantization.convert import read_description
from common.runtime.environment import needed
from common.runtime.errors import UserError
from common.runtime.files import atomic, lock
from common.synthesis.imageset import ImageSet

log = logging.getLogger("zsqdet")


def export(run: Path, options: Options, out: Path | None = None) -> tuple[Path, Parity]:
    """Makes RUN/export/TARGET, or `out`.

    Args:
        run: a finished run folder.
        options: settings; a size of (0, 0) is the one that the run evaluates at.
        out: the new folder.

    Raises:
        UserError: not a finished run, one that the runtime cannot run, or a check that failed.
    """
    if options.target not in TARGETS:
        raise UserError(f"export: to: found {options.target}; allowed are {', '.join(TARGETS)}")
    folder = quantized_folder(run)
    if folder is None or not is_complete(folder):
        raise UserError(f"export: {run} is no finished run; give a folder that `zsqdet run` or `zsqdet train` made")
    check_files(run)
    options = _sized(run, options)
    with lock(run):  # a run that exports, too, makes the same folder
        return _export(run, folder, options, out or run / "export" / options.target)


def _sized(run: Path, options: Options) -> Options:
    """The options, with the size that the run evaluates at where they have none."""
    side = int(stored_settings(run)["evaluation.image_size"])
    return replace(options, size=(side, side)) if options.size == (0, 0) else options


def _export(run: Path, folder: Path, options: Options, out: Path) -> tuple[Path, Parity]:
    return out, export_folder(folder, out, options, _about(run), _image(results(run), options.size))


def _about(run: Path) -> dict[str, Any]:
    """What the card of an export says of the run."""
    stored = results(run)
    alike, on = stored.get("fidelity") or {}, stored.get("measured_on") or {}
    measured = on.get("dataset") or on.get("annotations")
    return {
        "name": run.resolve().name,
        "weights": Path(str(stored_settings(run)["weights"])).name,
        "zero_shot": stored.get("zero_shot"),
        "rows": stored["rows"],
        "dataset": " ".join(filter(None, (Path(str(measured)).name, on.get("split")))),
        "fidelity": alike,
        "protocol": {
            "rows": protocol(on),
            "fidelity": protocol(alike.get("measured_on")),
        },
    }


def write_cards(run: Path) -> None:
    """Writes the cards of RUN/export again, from what the run now knows of itself."""
    for made in sorted(run.glob("export/*/export.json")):
        try:
            write_card(made.parent, _about(run))
        except (UserError, AttributeError, KeyError, TypeError, ValueError) as error:
            log.warning("%s: not written again (%s); remove the folder and repeat", made.parent / "README.md", error)


def check_packages() -> None:
    """Whether what exports need is installed, before the hours of a run that ends in one.

    Raises:
        UserError: it is not.
    """
    for name in ("onnx", "onnxslim", "onnxruntime"):
        needed(name, "export")


def export_once(run: Path, target: str) -> Path:
    """RUN/export/TARGET, made if it is not there yet.

    Raises:
        UserError: as `export`.
    """
    out = run / "export" / target
    with lock(run):
        if (out / "export.json").is_file():
            try:
                check_export(out)
            except UserError as error:
                log.warning("%s: made again", error)
                rmtree(out)
            else:
                write_cards(run)
                log.info("export: already complete")
                return out
        fused = TARGETS[target].profile != "full"  # by the runtime, from the roundings around
        what = "whose QuantizeLinear nodes are" if fused else "each integer operator of which is"
        log.info("export: a graph for %s, %s checked against float64", target, what)
        with timed(run, "export"):
            return _export(run, run / "quantized", _sized(run, Options(target, (0, 0))), out)[0]


def _image(stored: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray:
    """One of the run's own images [1, 3, H, W], on which the graph is checked."""
    folder = Path(str(stored.get("imageset")))
    try:
        images: Tensor = ImageSet(folder).batch(range(1), torch.device("cpu"))[0]
    except (UserError, OSError):
        log.info("export: the run's images are gone; the graph is checked on a random one")
        return example_image(size)
    return F.interpolate(images, size, mode="bilinear").numpy()


def benchmark(
    folder: Path, threads: Sequence[int], rounds: int, trace: Path | None = None
) -> tuple[list[Timing], dict[str, float], list[str]]:
    """Times an exported folder beside the float detector of the same architecture in the same runtime.

    Args:
        folder: from `export`.
        threads: of an inference, one measurement each; 0 for all.
        rounds: pairs of inferences.
        trace: a new folder that keeps the runtime's own timings and its optimised graph.

    Returns:
        Timings, the share of each kind of node, and the processor's instruction sets.

    Raises:
        UserError: not such a folder, or `trace` exists.
    """
    if trace and trace.exists():
        raise UserError(f"{trace}: exists; name another folder for the timings")
    if folder.is_file():
        raise UserError(f"{folder}: is a file; give the folder that `zsqdet export` made")
    graph = graph_file(folder)
    about, options = read_description(folder), read_options(folder)
    shape = Shape(options.size, options.batch)
    detector = build_detector(about.family, about.architecture)
    with TemporaryDirectory() as room:
        plain = Path(room) / "float.onnx"
        # Untrained: what is timed does not depend on the weights.
        export_graph(detector, detector.build(), plain, shape)
        reference = plain if graph.suffix == ONNX else to_openvino(plain, Path(room) / "float_openvino_model")
        timings = [
            timing
            for count in threads
            for timing in compare([("float", reference), ("quantized", graph)], shape, count, rounds)
        ]
        kept = Path(room) / "profile"
        kept.mkdir()
        shares = node_times(graph, shape, threads[0], kept)
        if trace:
            for file in kept.iterdir():
                with atomic(trace / file.name) as temporary:
                    copyfile(file, temporary)
    return timings, shares, instruction_sets()
