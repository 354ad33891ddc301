"""Times of a quantized graph beside the float one in one runtime, interleaved, so that a busy machine slows both."""

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.deployment.graph import Shape
from common.deployment.runtime import Session, open_session

WARM_UP = 3
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm")


@dataclass(frozen=True)
class Timing:
    """Medians of one graph."""

    name: str
    threads: int  # 0: all
    milliseconds: float
    spread: float  # half of the distance between the quartiles, milliseconds
    ratio: float  # to the first graph, the median of pairs


def compare(graphs: Sequence[tuple[str, Path]], shape: Shape, threads: int, rounds: int = 30) -> list[Timing]:
    """Runs the graphs in turns on random images of `shape`; the first one is the reference."""
    sessions = [(name, open_session(path, threads)) for name, path in graphs]
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


def _seconds(session: Session, images: np.ndarray) -> float:
    start = time.perf_counter()
    session(images)
    return time.perf_counter() - start


def node_times(path: Path, shape: Shape, threads: int, runs: int = 10) -> dict[str, float]:
    """Share of the time of each kind of node in ONNX Runtime, by its own profile, largest first."""
    import json
    import tempfile

    from common.runtime.environment import needed

    runtime: Any = needed("onnxruntime", "export")
    with tempfile.TemporaryDirectory() as folder:
        options = runtime.SessionOptions()
        options.enable_profiling, options.intra_op_num_threads, options.log_severity_level = True, threads, 3
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        images = np.random.default_rng(0).random((shape.batch, 3, *shape.size), dtype=np.float32)
        for _ in range(runs):
            session.run(None, {session.get_inputs()[0].name: images})
        events = json.loads(Path(session.end_profiling()).read_text())
    total: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            total[event["args"]["op_name"]] += event["dur"]
    whole = sum(total.values())
    return {name: spent / whole for name, spent in total.most_common()}


def instruction_sets() -> list[str]:
    """Those of this processor that matter for 8 bits."""
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return []
    lines = [line for line in file.read_text().splitlines() if line.startswith(("flags", "Features"))]
    found = set(lines[0].partition(":")[2].split()) if lines else set()
    return [name for name in INSTRUCTIONS if name in found]
