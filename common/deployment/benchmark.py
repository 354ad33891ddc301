"""Times of a quantized graph beside the float one in one runtime, interleaved, so that a busy machine slows both."""

import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.deployment.graph import Shape
from common.deployment.runtime import ONNX, Session, onnxruntime_session, open_session
from common.runtime.environment import needed
from common.runtime.errors import UserError

WARM_UP = 3
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm")

TIMED_ELSEWHERE = {"tensorrt": "TensorRT", "fp8": "TensorRT", "opencv": "OpenCV"}  # whose runtime is not what is timed


@dataclass(frozen=True)
class Timing:
    """Medians of one graph."""

    name: str
    threads: int  # 0: all
    milliseconds: float
    spread: float  # half of the distance between the quartiles, milliseconds
    ratio: float  # to the first graph, the median of pairs


def compare(graphs: Sequence[tuple[str, Path]], shape: Shape, threads: int, rounds: int = 30) -> list[Timing]:
    """Runs the graphs in turns on random images of `shape`; the first one is the reference.

    Raises:
        UserError: a graph takes images of another shape.
    """
    sessions = [(name, open_session(path, threads)) for name, path in graphs]
    wanted = (shape.batch, 3, *shape.size)
    for (_, session), (_, path) in zip(sessions, graphs, strict=True):
        if any(side not in (None, own) for side, own in zip(session.input_shape, wanted, strict=True)):
            raise UserError(
                f"{path}: takes images {list(session.input_shape)}, but export.json says {[*wanted]}; export it again"
            )
    images = np.random.default_rng(0).random((shape.batch, 3, *shape.size), dtype=np.float32)
    times = np.array([[_seconds(session, images) for _, session in sessions] for _ in range(rounds + WARM_UP)])
    times = times[WARM_UP:] * 1e3
    return [
        Timing(
            name,
            threads,
            float(np.median(column)),
            float(np.subtract(*np.percentile(column, [75, 25]))) / 2,
            statistics.median(column / times[:, 0]),
        )
        for (name, _), column in zip(sessions, times.T, strict=True)
    ]


def timing_lines(
    target: str, graph: Path, timings: Sequence[Timing], shares: Mapping[str, float], instructions: Sequence[str]
) -> Iterator[str]:
    """What `zsqdet benchmark` prints: of the export for `target`, whose `graph` was timed."""
    module, name = ("onnxruntime", "ONNX Runtime") if graph.suffix == ONNX else ("openvino", "OpenVINO")
    runtime: Any = needed(module, "export")
    elsewhere = TIMED_ELSEWHERE.get(target)
    yield f"timed in {name} {runtime.__version__} on the CPU" + (
        f"; says nothing about {elsewhere}" if elsewhere else ""
    )
    yield f"processor: {', '.join(instructions) or 'nothing for 8 bits found'}"
    yield "medians +- half the interquartile range; the ratio is the median of the pairs"
    for timing in timings:
        threads = "all threads" if timing.threads == 0 else f"{timing.threads} thread{'s' * (timing.threads > 1)}"
        spread = f"{timing.milliseconds:8.2f} +- {timing.spread:.2f} ms"
        yield f"{timing.name:<10} {threads:<12} {spread:<22} {timing.ratio:.2f} of float"
    if not elsewhere and any(timing.name != "float" and timing.ratio > 1 for timing in timings):
        yield "on this processor float is faster; see docs/deployment.md for which device multiplies what"
    if shares:
        yield "time by kind of node: " + ", ".join(f"{kind} {share:.0%}" for kind, share in list(shares.items())[:8])


def _seconds(session: Session, images: np.ndarray) -> float:
    start = time.perf_counter()
    session(images)
    return time.perf_counter() - start


def node_times(path: Path, shape: Shape, threads: int, folder: Path, runs: int = 10) -> dict[str, float]:
    """Share of the time of each kind of node, by the runtime's own profile, largest first.

    Args:
        path: an .onnx file, or the .xml of an OpenVINO pair.
        shape: of the images.
        threads: of an inference; 0 for all.
        folder: where the profile (profile.json) and the graph as the runtime has changed it go.
        runs: inferences.
    """
    images = np.random.default_rng(0).random((shape.batch, 3, *shape.size), dtype=np.float32)
    profile = _profile_onnx if path.suffix == ONNX else _profile_openvino
    total: Counter[str] = Counter()
    for kind, spent in profile(path, images, threads, folder, runs):
        total[kind] += spent
    whole = sum(total.values())
    return {name: spent / whole for name, spent in total.most_common()}


def _profile_onnx(path: Path, images: np.ndarray, threads: int, folder: Path, runs: int) -> Iterator[tuple[str, int]]:
    profile, graph = str(folder / "profile"), str(folder / "optimized.onnx")
    session = onnxruntime_session(
        path, threads, enable_profiling=True, profile_file_prefix=profile, optimized_model_filepath=graph
    )
    for _ in range(runs):
        session.run(None, {session.get_inputs()[0].name: images})
    file = Path(session.end_profiling()).rename(folder / "profile.json")
    for event in json.loads(file.read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            yield event["args"]["op_name"], event["dur"]


def _profile_openvino(
    path: Path, images: np.ndarray, threads: int, folder: Path, runs: int
) -> Iterator[tuple[str, int]]:
    openvino: Any = needed("openvino", "export")
    settings = {"PERF_COUNT": True} | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    openvino.save_model(compiled.get_runtime_model(), folder / "execution_graph.xml", compress_to_fp16=False)
    request, events = compiled.create_infer_request(), []
    for _ in range(runs):
        request.infer(images)
        events += [
            {
                "name": node.node_name,
                "type": node.node_type,
                "kernel": node.exec_type,
                "us": node.real_time.microseconds,
            }
            for node in request.get_profiling_info()
        ]
    (folder / "profile.json").write_text(json.dumps(events))
    yield from ((str(event["type"]), int(event["us"])) for event in events)


def instruction_sets() -> list[str]:
    """Those of this processor that matter for 8 bits."""
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return []
    lines = [line for line in file.read_text().splitlines() if line.startswith(("flags", "Features"))]
    found = set(lines[0].partition(":")[2].split()) if lines else set()
    return [name for name in INSTRUCTIONS if name in found]
