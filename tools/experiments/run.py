"""Runs the lines of a table, one after the other, each as a process of its own."""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import FrameType

from common.config.load import load_config
from common.pipeline.run_dir import FULL, PTQ, TRAINED, results
from common.runtime.environment import ROOT
from common.runtime.errors import UserError
from tools.experiments import store
from tools.experiments.data import check_variables, prepare
from tools.experiments.store import row_of
from tools.experiments.table import Line

INTERRUPTED = 130
PATIENCE = 20  # seconds that a run has to end by itself after Ctrl-C


@dataclass(frozen=True)
class Options:
    """How lines are run."""

    variables: Mapping[str, str]
    results: Path | None  # where rows go; None keeps none
    launcher: tuple[str, ...] = (sys.executable,)  # words before `-m common.cli`
    gpus: int = 1
    smoke: bool = False


def command_of(line: Line, options: Options) -> list[str]:
    """The words that are executed."""
    gpus = [f"--gpus={options.gpus}"] if options.gpus > 1 else []
    return [*options.launcher, "-m", "common.cli", "run", line.config, *line.expanded(options.variables), *gpus]


def run_lines(lines: Sequence[Line], options: Options) -> Iterator[str]:
    """Runs what is not finished yet and records each result; yields what to print.

    Raises:
        UserError: data that is missing, before anything runs.
        FailedError: some lines failed, and said why when they did; the others are done.
        KeyboardInterrupt: Ctrl-C, here or in a run.
    """
    check_variables((word for line in lines for word in line.words), options.variables)
    prepare((name for line in lines for name in line.sets), options.variables)
    failed = []
    for number, line in enumerate(lines, 1):
        yield f"== {line.table} {number}/{len(lines)}: {line.full_name}"
        if options.smoke:
            _forget_others(line)
        if is_finished(line, options.variables):
            yield "done before"
        else:
            code = _execute(command_of(line, options))
            if code == INTERRUPTED:
                raise KeyboardInterrupt
            if code:
                failed.append(line.full_name)
                continue
        if options.results:
            store.put(options.results, row_of(line.run_dir, line))
    if failed:
        raise FailedError(f"failed: {' '.join(failed)}; repeat the command for these once mended")


class FailedError(Exception):
    """The command did what it was asked for, and something in it is wrong: exit code 1."""


def is_finished(line: Line, variables: Mapping[str, str]) -> bool:
    """Whether the run folder holds these very settings, all measurements and the report."""
    run, config = line.run_dir, line.load(variables)
    if not (run / "report.html").exists():
        return False
    try:
        stored, found = load_config(run / "config.yaml"), results(run)
    except UserError:
        return False  # the run itself says what is wrong with it
    measured_on = found.get("measured_on", {})
    named = config.data.model_dump(mode="json", exclude_none=True, exclude=set() if config.data.dataset else {"split"})
    names = [FULL, PTQ] + [TRAINED] * bool(config.training.epochs)
    return stored == config and [row["name"] for row in found["rows"]] == names and named.items() <= measured_on.items()


def _execute(command: Sequence[str]) -> int:
    """Waits for a command. Ctrl-C reaches it as well, from the terminal or from here; it is never left behind."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    try:
        child = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"})
    except FileNotFoundError as error:
        raise UserError(f"--launcher: {command[0]} does not exist; give words that start a program") from error
    try:
        return child.wait()
    except KeyboardInterrupt:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(PATIENCE)
        raise
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
            try:
                child.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                child.kill()


def stop_on_sigterm() -> None:
    """What ends a job on a cluster ends it like Ctrl-C: the run stops too, and goes on with the next start."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)


def _forget_others(line: Line) -> None:
    """Removes a smoke run of other settings, or of a version with other defaults or micro detectors."""
    schema = [ROOT / "common/config/schema.py", ROOT / "common/config/presets.py"]
    files = schema + sorted([*ROOT.glob("configs/*/micro*"), *ROOT.glob("tools/shapes/*.safetensors")])
    digest = sha256(shlex.join([line.config, *line.words]).encode())
    for file in files:
        digest.update(file.read_bytes())
    mark = line.run_dir.with_name(f"{line.run_dir.name}.from")
    if not mark.exists() or mark.read_text(encoding="utf-8") != digest.hexdigest():
        shutil.rmtree(line.run_dir, ignore_errors=True)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(digest.hexdigest(), encoding="utf-8")
