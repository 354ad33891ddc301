"""Disturbs runs at random moments and starts them again: python -m tools.torture --times 100 --seed 0.

Each attempt runs a micro detector, disturbs it in one of the ways of KINDS, and repeats the command until it is done.
The end must be that of an undisturbed run, byte for byte, without leftovers and without a traceback on the way. What
differs is reported with its seed; `--times 1 --seed N` repeats it. On a small file system (a tmpfs of 200 MB)
`--folder` also fills the disk.
"""

import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common.runtime.errors import Parser
from common.runtime.files import TEMPORARY
from common.runtime.signals import leave_at_once
from tools import report

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
family: yolov5
weights: {weights}
run_dir: run
bits: w4a8
device: cpu
data: {{images: data/images, annotations: data/annotations.json}}
synthesis:
  {{directory: sets, num_images: 4, image_size: 64, batch_size: 2, iterations: 1, label_sampling: {{every: 1}},
  low_resolution_size: 32, low_resolution_iterations: 1}}
quantization: {{calibration_images: 2, calibration_batch_size: 2}}
training: {{epochs: 2, batch_size: 2, learning_rate: 1.0e-4}}
evaluation: {{image_size: 64, batch_size: 2, directory: measured}}
"""
MADE = ("run", "sets", "measured")  # folders that c.yaml makes
COMPARED = ("run", "sets")  # the other one is a cache
FREE = (".lock", "state.safetensors")  # files that a finished run does not read
COMMAND = ["run", "c.yaml"]
PATIENCE = 300.0  # seconds that a command may take
REPEATS = 4  # of the command, each of which may name one thing to remove
UNSTABLE = {"seconds", "sha256", "training/history.jsonl", "commit", "uncommitted_changes"}  # of JSON
UNSTABLE |= {"continued_with", "directory"}
ASKED = {signal.SIGINT, signal.SIGTERM}
SMALL = 2**30  # bytes of a file system that may be filled


class DisturbedError(Exception):
    """An attempt that did not end as an undisturbed one."""


def fork(folder: Path, log: str, limit: int | None = None) -> int:
    """Starts the command in a child inside `folder`, its output in `log` beside it, no file above `limit` bytes."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ASKED)  # until the child does with them what the program does
    process = os.fork()
    if process:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKED)
        return process
    code = 1
    try:
        leave_at_once()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKED)
        os.chdir(folder)
        sys.stdout = sys.stderr = stream = (folder.parent / log).open("w", buffering=1)
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        import torch

        from zsqdet import main

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # the parent has one: threads do not survive a fork
        code = main(COMMAND)
        stream.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(process: int) -> int:
    """The exit code of a child, below 0 for a signal.

    Raises:
        DisturbedError: it does not end.
    """
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    raise DisturbedError("hangs")


def _signal(number: int) -> Callable[["Attempt"], None]:
    def disturb(attempt: Attempt) -> None:
        process = attempt.start()
        attempt.sleep()
        os.kill(process, number)
        attempt.end(process)

    return disturb


class Attempt:
    """One disturbed run in a folder of its own."""

    def __init__(self, folder: Path, seed: int, duration: float) -> None:
        self.folder, self.random, self.duration = folder, random.Random(seed), duration
        self.logs: list[Path] = []
        self.found = ""  # what was damaged, for the report

    def start(self, limit: int | None = None) -> int:
        """Starts the command; see `fork`."""
        name = f"{self.folder.name}.{len(self.logs)}.log"
        self.logs.append(self.folder.parent / name)
        self.logs[-1].touch()  # the child opens it when it comes to it
        return fork(self.folder, name, limit)

    def sleep(self) -> None:
        """Until a random moment of an undisturbed run."""
        time.sleep(self.random.uniform(0, self.duration))

    def end(self, process: int) -> int:
        """Waits for a command, and checks how it ended.

        Raises:
            DisturbedError: with another exit code than documented, or a traceback.
        """
        code = wait(process)
        for log in self.logs:
            text = log.read_text()
            if "Traceback" in text or "Exception" in text:
                raise DisturbedError(f"traceback\n{text[-3000:]}")
        if code not in (0, 2, 130, 143, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT):
            raise DisturbedError(f"exit code {code}")
        return code

    def files(self) -> list[Path]:
        """Those that the command has made so far, temporaries included."""
        found = (path for name in MADE for path in (self.folder / name).rglob("*") if path.is_file())
        return sorted(path for path in found if path.name != ".lock" and path.parent.name != "tensorboard")

    def damage(self) -> None:
        """Removes, cuts off, empties or changes a random file, or removes a folder."""
        files = self.files()
        if not files:
            return
        path = self.random.choice(files)
        kind = self.random.choice(("removed", "cut", "emptied", "flipped", "folder removed"))
        self.found = f"{path.relative_to(self.folder)} {kind}"
        try:
            if kind == "removed":
                path.unlink()
            elif kind == "folder removed":
                shutil.rmtree(self.random.choice(path.parents[: len(path.relative_to(self.folder).parts) - 1]))
            else:
                _change(path, kind, self.random)
        except OSError:  # gone meanwhile
            self.found += " (gone)"

    def finish(self) -> None:
        """Repeats the command until it is done; what it names to be removed is removed.

        Raises:
            DisturbedError: it does not get done.
        """
        for _ in range(REPEATS):
            if self.end(self.start()) == 0:
                return
            text = self.logs[-1].read_text()
            lines = [line for line in text.splitlines() if line.startswith("error: ")]
            named = [Path(line.split(" ")[1].rstrip(":")) for line in lines]
            if not named or "remove" not in lines[0] or not (self.folder / named[0]).is_file():
                raise DisturbedError(f"does not go on: {text[-1000:]}")
            self.found += f"; removed {named[0]} as told"
            (self.folder / named[0]).unlink()
        raise DisturbedError("does not get done")


def _change(path: Path, kind: str, generator: random.Random) -> None:
    """In place, as a bad disk would; not as the program writes."""
    with path.open("r+b") as stream:
        size = os.fstat(stream.fileno()).st_size
        at = generator.randrange(max(size, 1))
        if kind != "flipped":
            stream.truncate(at if kind == "cut" else 0)
        elif size:
            stream.seek(at)
            (value,) = stream.read(1)
            stream.seek(at)
            stream.write(bytes([value ^ 1 << generator.randrange(8)]))


def _damaged_meanwhile(attempt: Attempt) -> None:
    process = attempt.start()
    attempt.sleep()
    attempt.damage()
    attempt.end(process)


def _damaged_afterwards(attempt: Attempt) -> None:
    attempt.finish()
    attempt.damage()


def _killed_and_damaged(attempt: Attempt) -> None:
    _signal(signal.SIGKILL)(attempt)
    attempt.damage()


def _too_large(attempt: Attempt) -> None:
    """Files may not grow beyond a random size, from 1 kB to 10 MB."""
    attempt.end(attempt.start(limit=int(10 ** attempt.random.uniform(3, 7))))


def _full(attempt: Attempt) -> None:
    """The disk has a random number of bytes left."""
    filler = attempt.folder.parent / "filler"
    free = shutil.disk_usage(attempt.folder).free
    with filler.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, max(free - int(10 ** attempt.random.uniform(4, 7.4)), 1))
    attempt.end(attempt.start())
    filler.unlink()


def _twice(attempt: Attempt) -> None:
    """A second one starts meanwhile, and one of them may be killed."""
    first = attempt.start()
    attempt.sleep()
    second = attempt.start()
    if attempt.random.random() < 0.5:
        attempt.sleep()
        os.kill(first, signal.SIGKILL)
    attempt.end(first)
    if attempt.end(second) != 0:
        raise DisturbedError("the second of two did not end well")


KINDS: dict[str, Callable[[Attempt], None]] = {
    "kill": _signal(signal.SIGKILL),
    "terminate": _signal(signal.SIGTERM),
    "interrupt": _signal(signal.SIGINT),
    "damage meanwhile": _damaged_meanwhile,
    "damage afterwards": _damaged_afterwards,
    "kill and damage": _killed_and_damaged,
    "too large": _too_large,
    "twice": _twice,
    "full": _full,
}


def fingerprint(folder: Path) -> dict[str, str]:
    """Path -> digest of what a run must leave the same, whenever it was disturbed; times and machine do not count."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not (name.startswith(COMPARED) and path.is_file()) or path.name in FREE or "tensorboard" in name:
            continue
        content = path.read_bytes()
        if path.name == "report.html":
            content = b"there" if content else b"empty"
        elif path.suffix in (".json", ".jsonl"):
            rows = content.splitlines() if path.suffix == ".jsonl" else [content]
            with contextlib.suppress(ValueError):  # damaged
                content = json.dumps([_stable(json.loads(row)) for row in rows]).encode()
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stable(part) for key, part in value.items() if key not in UNSTABLE}
    return [_stable(part) for part in value] if isinstance(value, list) else value


def check(attempt: Attempt, wanted: dict[str, str]) -> None:
    """Compares the end of an attempt.

    Raises:
        DisturbedError: other files, other contents, or a temporary one.
    """
    left = [str(p) for p in attempt.folder.rglob(".*") if TEMPORARY.fullmatch(p.name)]
    if left:
        raise DisturbedError(f"left over: {left}")
    found = fingerprint(attempt.folder)
    different = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if different:
        raise DisturbedError(f"different: {different}")


def torture(inputs: Path, folder: Path, times: int, seed: int, kinds: Sequence[str], cores: int = 1) -> Iterator[str]:
    """A line for each attempt, and last the counts.

    Args:
        inputs: a folder with c.yaml, whose paths are relative, and what it names.
        folder: where to.
        times: attempts.
        seed: of the first one; each next one has the next number.
        kinds: of KINDS.
        cores: of each command; from two on stage one has a process on each.
    """
    os.environ["OMP_NUM_THREADS"] = str(cores)
    _import(inputs)
    plain = Attempt(_copy(inputs, folder / "plain"), 0, 0.0)
    plain.finish()  # the first one also loads libraries
    start = time.monotonic()
    reference = Attempt(_copy(inputs, folder / "reference"), 0, 0.0)
    reference.finish()
    duration, wanted = time.monotonic() - start, fingerprint(reference.folder)
    check(plain, wanted)
    yield f"an undisturbed run takes {duration:.1f} s"
    counts: Counter[str] = Counter()
    for number in range(seed, seed + times):
        kind = kinds[number % len(kinds)]
        attempt = Attempt(_copy(inputs, folder / str(number)), number, duration)
        try:
            KINDS[kind](attempt)
            attempt.finish()
            check(attempt, wanted)
            counts["good"] += 1
            yield f"seed {number}: {kind} {attempt.found}: good"
            for path in (attempt.folder, *attempt.logs):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        except DisturbedError as failure:
            counts["bad"] += 1
            yield f"seed {number}: {kind} {attempt.found}: BAD: {failure}"
    yield f"{counts['good']} of {times} good"


def micro(folder: Path) -> Path:
    """Inputs: the micro YOLOv5 and drawn images."""
    from tools.shapes.generate import generate

    folder.mkdir()
    generate(folder / "data", 3, 64)
    (folder / "c.yaml").write_text(CONFIG.format(weights=ROOT / "tools/shapes/micro_yolov5.safetensors"))
    return folder


def _import(inputs: Path) -> None:
    """What all children need, once."""
    import torch

    import common.pipeline.stages
    import common.reporting.report  # noqa: F401
    from common.config.load import load_config
    from common.detection.detector import load_detector

    torch.set_num_threads(1)
    with contextlib.chdir(inputs):
        config = load_config(Path("c.yaml"))
        load_detector(config.family, config.weights, config.detector.given)


def _copy(inputs: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in inputs.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the attempts. Returns 0 if all of them ended well, else 1."""
    parser = Parser(prog="python -m tools.torture", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--times", type=int, default=100, help="attempts (100)")
    parser.add_argument("--seed", type=int, default=0, help="of the first one (0)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="ways of disturbing (all)")
    parser.add_argument("--cores", type=int, default=1, help="of each command; more than one start processes (1)")
    parser.add_argument("--inputs", type=Path, help="folder with c.yaml and what it names (the micro YOLOv5)")
    parser.add_argument("--folder", type=Path, help="where to (a temporary folder)")
    options = parser.parse_args(argv)
    if options.times < 1 or (options.folder and not os.access(options.folder, os.W_OK)):
        parser.error("--times is 1 or more, and --folder one that can be written into")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        small = shutil.disk_usage(folder).total < SMALL
        kinds = options.kinds or [kind for kind in KINDS if small or kind != "full"]
        inputs = options.inputs.resolve() if options.inputs else micro(Path(folder) / "inputs")
        lines = torture(inputs, Path(folder), options.times, options.seed, kinds, options.cores)
        said: list[str] = []
        code = report(said.append(line) or line for line in lines)  # type: ignore[func-returns-value]
        return code or int(said[-1] != f"{options.times} of {options.times} good")


if __name__ == "__main__":
    sys.exit(main())
