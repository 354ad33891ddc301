"""The folder of a run: its files, its settings, and which checkpoints in it are finished.

config.yaml       the resolved configuration; `zsqdet run RUN/config.yaml run_dir=OTHER` repeats the run
environment.json  versions, machine, commit, hash of the float checkpoint; continued_with: those of later commands;
                  directory: what the relative paths of config.yaml are relative to
results.json      rows (one per measured detector), layers, data_read, imageset, seconds, hashes of files
ptq/ quantized/   quantized checkpoints after calibration and after training
training/         the trainer's state, history and TensorBoard events
predictions/      detections of each row as COCO results
"""

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from common.checkpoints.strict_json import checked
from common.config.load import dump_config, flatten, load_config, short
from common.config.schema import ExperimentConfig
from common.config.yaml_text import parse_yaml, read_text
from common.pipeline.records import Environment, Results
from common.runtime.environment import is_first
from common.runtime.errors import UserError
from common.runtime.files import is_same, read_checked_json, read_json, sha256, write_checked_json

log = logging.getLogger("zsqdet")
FULL, PTQ, TRAINED = "full precision", "ptq", "trained"  # the rows of results.json
STAGES = ("ptq", "quantized")  # of stage two, their folders
CHECKPOINT = ("model.safetensors", "quantization.json")
# Keys that may change between two commands on one folder: places and devices, which do not change the result.
FREE_KEYS = frozenset(
    {
        *("run_dir", "weights", "device", "export", "data.dataset", "data.split"),
        *("data.images", "data.annotations"),
        *("synthesis.directory", "evaluation.directory", "training.wandb"),
    }
)
REPLACED = ("config.yaml", "results.json", "report.html")  # files that others have as well
MADE_WITH = ("bits", "preset", "quantization", "synthesis", "training")  # settings that a finished run has no use for
PLACES = (
    *("weights", "data.dataset", "data.images", "data.annotations", "evaluation.directory"),
    *("synthesis.directory", "synthesis.annotations", "synthesis.real_images"),
)


def config_of_run(folder: Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """The configuration of the run that a folder or an exported graph is or belongs to, with it as `weights`.

    A graph that belongs to none has the family that stands in it and the default settings. Overrides that name a set
    do so in the place of the run's own.

    Raises:
        UserError: no such run, a mistake in the overrides, or one that only another run would obey.
    """
    for word in overrides:
        if (name := word.partition("=")[0]).partition(".")[0] in MADE_WITH:
            raise UserError(
                f"{name}: found {short(word)}, but {folder} is made already; leave it out, or make a new run"
            )
    found = [place / "config.yaml" for place in (folder, *folder.resolve().parents[:3])]
    if not any(path.is_file() for path in found):
        from common.deployment.runtime import family_of, find_graph

        if graph := find_graph(folder):
            return load_config(graph, overrides, {"family": family_of(graph), "weights": str(folder)})
        raise UserError(f"{folder}: belongs to no run; give a configuration, and this folder as weights={folder}")
    path = next(path for path in found if path.is_file())
    own = [*_placed(path.parent), f"weights={folder}"]
    if any(word.startswith("data") for word in overrides):
        own.append("data={dataset: null, images: null, annotations: null}")
    return load_config(path, [*own, *overrides])


def stored_config(run: Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """The configuration of a run, with its paths where they were, whatever the current directory is.

    Raises:
        UserError: the file is damaged, or a mistake in the overrides.
    """
    return load_config(run / "config.yaml", [*_placed(run), *overrides])


def _placed(run: Path) -> list[str]:
    """Overrides for the relative paths of a run that lead from where it was made to something that is there.

    They include the run folder's own path, unless the folder was moved or copied.

    Where the current directory is that one, or an older version noted none, paths stay as they are written.
    """
    try:
        directory = Path(environment_of(run)["directory"])
        if directory == Path.cwd():
            return []
    except (UserError, OSError, KeyError):
        return []
    settings = stored_settings(run)
    paths = {name: directory / settings[name] for name in PLACES if isinstance(settings.get(name), str)}
    found = [f"{name}={path}" for name, path in paths.items() if str(path) != settings[name] and path.exists()]
    own = directory / str(settings.get("run_dir"))
    return [*found, f"run_dir={own}"] if own.exists() and own.samefile(run) else found


def check_run(config: ExperimentConfig, weights_sha256: str) -> None:
    """Checks that an existing run folder has the same settings and the same float checkpoint.

    A file of it that is damaged or gone is made again by `open_run` where results.json knows the run.

    Raises:
        UserError: it has others, is damaged, or is a folder of something else with files of the names of a run's.
    """
    run = config.run_dir
    if os.path.realpath(run) in ("/", os.path.realpath(os.path.expanduser("~"))):
        raise UserError(f"run_dir: found {run}; a run has a folder of its own, e.g. runs/yolo11n_w4a8")
    if outer := next((parent for parent in Path(os.path.realpath(run)).parents if _known(parent, "identity")), None):
        raise UserError(f"run_dir: found {run}, within the run {outer}; a run has a folder of its own, beside others")
    known, now = _known(run, "identity"), _identity(config, weights_sha256)
    if known is None and not _is_own(run):
        if foreign := [name for name in REPLACED if os.path.lexists(run / name)]:
            raise UserError(
                f"{run}: has {', '.join(foreign)}, which a run would replace, but is none; choose another "
                "folder with run_dir=DIR"
            )
        return
    try:
        if (run / "config.yaml").exists():
            _check_same(load_config(run / "config.yaml"), config)
        recorded = environment_of(run).get("weights_sha256")
    except UserError:
        if known != now:
            raise
        return
    if recorded and recorded != weights_sha256:
        raise UserError(
            f"{run}: was made from another checkpoint (SHA-256 {recorded[:12]}... there, "
            f"{weights_sha256[:12]}... now); {_WAYS_OUT}"
        )
    if known not in (None, now) and not (recorded and is_same(run / "config.yaml", _known(run, "config_sha256"))):
        raise UserError(f"{run}: was made with other settings or another checkpoint; {_WAYS_OUT}")


def open_run(config: ExperimentConfig, weights_sha256: str, environment: dict[str, Any]) -> Path:
    """Makes the run folder, or reopens one that `check_run` accepts; what is damaged in it is made again.

    Raises:
        UserError: the folder belongs to another experiment, or cannot be written.
    """
    check_run(config, weights_sha256)
    run = config.run_dir
    try:
        recorded = environment_of(run)
    except UserError as error:
        log.warning("%s: made again", error)
        recorded = {}
    recorded = recorded or {"weights_sha256": weights_sha256} | environment
    if not environment.items() <= recorded.items() and environment not in recorded.get("continued_with", []):
        recorded["continued_with"] = [*recorded.get("continued_with", []), environment]
    with contextlib.suppress(OSError):  # it was removed; absolute paths need none
        recorded["directory"] = os.getcwd()
    write_checked_json(run / "environment.json", recorded)  # the first file: it tells a run's folder from another one
    dump_config(config, run / "config.yaml")
    try:
        results(run)
    except UserError as error:
        log.warning("%s: what it held is made again", error)
        (run / "results.json").unlink()
    found = results(run)
    if "identity" not in found and found["layers"]:  # an older version noted no hashes
        for stage in STAGES:
            if is_complete(run / stage):
                mark_done(run, stage, [run / stage / name for name in CHECKPOINT])
    update_results(run, identity=_identity(config, weights_sha256), config_sha256=sha256(run / "config.yaml"))
    return run


def results(run: Path) -> dict[str, Any]:
    """The contents of results.json so far.

    Raises:
        UserError: the file is damaged.
    """
    empty: dict[str, Any] = {"rows": [], "layers": [], "data_read": [], "imageset": None, "seconds": {}, "files": {}}
    path = run / "results.json"
    found = empty | (_object(path) if path.exists() else {})
    _check(Results, found, path, "remove it and rerun the command")
    return found


def mark_done(run: Path, stage: str, files: Iterable[Path]) -> None:
    """Marks a stage as done, with the SHA-256 of its files, which are in the run folder."""
    hashes = {str(path.relative_to(run)): sha256(path) for path in files}
    update_results(run, files=results(run)["files"] | {stage: hashes})


def is_done(run: Path, stage: str) -> bool:
    """Whether a stage, `ptq` or `quantized`, is done and its files are those that it wrote."""
    found = results(run)
    if stage not in found["files"] or not found["layers"]:
        return False
    for name, digest in found["files"][stage].items():
        if not is_same(run / name, digest):
            log.warning("%s: damaged or gone; made again", run / name)
            return False
    return True


def check_files(run: Path) -> None:
    """Compares the files of finished stages, those that are there, and the settings with their recorded hashes.

    Raises:
        UserError: one of them is damaged, or the settings have been changed since.
    """
    settings = run / "config.yaml"
    if settings.exists() and not is_same(settings, _known(run, "config_sha256")):
        raise UserError(f"{settings}: changed since the run; put it back, or run with it and another run_dir")
    for files in results(run)["files"].values():
        for name, digest in files.items():
            if (run / name).exists() and not is_same(run / name, digest):
                raise UserError(f"{run / name}: damaged; rerun the command, it is made again")


def stored_settings(run: Path) -> dict[str, Any]:
    """Dotted key -> value of config.yaml, not checked by the schema, so that runs of older versions can be read too.

    Raises:
        UserError: not a run folder, or the file is damaged.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run}: not a run folder (config.yaml is missing); give a folder that `zsqdet run` made")
    try:
        values, _ = parse_yaml(read_text(path))
    except UserError as error:
        raise UserError(f"{path}: cannot be read ({error}); repeat `zsqdet run`") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: not the settings of a run; give a folder that `zsqdet run` made")
    return dict(flatten(values))


def update_results(run: Path, **changes: Any) -> None:
    """Replaces some keys of results.json, atomically, in the first process only."""
    if is_first():
        write_checked_json(run / "results.json", results(run) | changes)


@contextlib.contextmanager
def timed(run: Path, stage: str) -> Iterator[None]:
    """Adds the seconds spent inside to those of `stage`, also after an interruption."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds = results(run)["seconds"]
        spent = seconds.get(stage, 0.0) + time.perf_counter() - start
        update_results(run, seconds=seconds | {stage: round(spent, 2)})


def is_complete(checkpoint: Path) -> bool:
    """Whether a folder holds a finished quantized checkpoint."""
    return all((checkpoint / name).exists() for name in CHECKPOINT)


def predictions_file(run_dir: Path, row: str) -> Path:
    """The detections, as COCO results, behind a row of results.json: "full precision", "ptq" or "trained"."""
    return run_dir / "predictions" / f"{row.replace(' ', '_')}.json"


def fidelity_file(run_dir: Path, name: str) -> Path:
    """The detections behind a fidelity, as COCO results, by the row's name; "images" is a COCO file of the images."""
    return predictions_file(run_dir, f"fidelity {name}")


def read_predictions(run: Path, path: Path) -> Any:
    """A file of detections that results.json tells of.

    Raises:
        UserError: missing, damaged, or not those that were measured.
    """
    found = results(run)
    wanted = {predictions_file(run, row["name"]): row.get("predictions_sha256") for row in found["rows"]}
    wanted |= {run / name: digest for name, digest in found.get("fidelity", {}).get("files", {}).items()}
    if path.exists() and not is_same(path, wanted.get(path)):
        raise UserError(f"{path}: damaged, its SHA-256 is not the recorded one; rerun the command, it is made again")
    return read_json(path)


def quantized_folder(weights: Path) -> Path | None:
    """The quantized checkpoint that `weights` names: a run folder, a checkpoint's folder or its model.safetensors.

    Returns:
        The checkpoint's folder; None for a float checkpoint.

    Raises:
        UserError: a folder that holds no finished quantized checkpoint.
    """
    if weights.is_dir():
        for folder in (weights, weights / "quantized"):
            if is_complete(folder):
                return folder
        hint = (
            f"weights={weights / 'ptq'} takes the calibrated one" if is_complete(weights / "ptq") else "finish its run"
        )
        raise UserError(f"weights: found {weights}, a folder without a finished quantized checkpoint; {hint}")
    if weights.name == "model.safetensors" and is_complete(weights.parent):
        return weights.parent
    return None


_WAYS_OUT = "choose another folder with run_dir=DIR, or delete this one to start over"


def environment_of(run: Path) -> dict[str, Any]:
    """The contents of environment.json; empty where there is none yet.

    Raises:
        UserError: the file is damaged.
    """
    path = run / "environment.json"
    if not path.exists():
        return {}
    found = _object(path)
    _check(Environment, found, path, _WAYS_OUT)
    return found


def _check(schema: type[BaseModel], found: dict[str, Any], path: Path, advice: str) -> None:
    try:
        checked(schema, found, f"{path}: damaged")
    except UserError as error:
        raise UserError(f"{error}; {advice}") from error


def _object(path: Path) -> dict[str, Any]:
    try:
        return read_checked_json(path)
    except UserError as error:
        raise UserError(f"{error}; remove it and rerun the command") from error


def _is_own(run: Path) -> bool:
    """Whether the folder has a file that only a run writes, be it damaged, or what was written after it was removed."""
    with contextlib.suppress(UserError):
        return (run / "environment.json").exists() or bool(read_checked_json(run / "results.json"))
    return False


def _known(run: Path, key: str) -> str | None:
    """A hash that results.json has; None where it has none, or is damaged."""
    try:
        return results(run).get(key)
    except UserError:
        return None


def _identity(config: ExperimentConfig, weights_sha256: str) -> str:
    """The SHA-256 of all that a run depends on, for when the files that say it in full are damaged."""
    values = config.model_dump(mode="json")
    values["detector"] = config.detector.given  # an empty section is none, as before there was one
    kept = {key: value for key, value in flatten(values) if key not in FREE_KEYS and (key, value) != ("detector", {})}
    return hashlib.sha256(json.dumps([kept, weights_sha256], sort_keys=True).encode()).hexdigest()


def _is_same_place(key: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether two ways to write a path, relative and absolute, name one place."""
    both = old[key], new[key]
    return key in PLACES and None not in both and len({os.path.abspath(path) for path in both}) == 1


def _check_same(before: ExperimentConfig, now: ExperimentConfig) -> None:
    old, new = (dict(flatten(config.model_dump(mode="json"))) for config in (before, now))
    names = [key for key in new if key not in FREE_KEYS and old[key] != new[key] and not _is_same_place(key, old, new)]
    if names:
        changed = ", ".join(f"{key} ({old[key]} there, {new[key]} now)" for key in names)
        # A target sets settings, which who repeats the command without it has not named.
        repeated = f"name export={before.export}, as then, or " if before.export and not now.export else ""
        raise UserError(f"{now.run_dir}: was made with other settings: {changed}; {repeated}{_WAYS_OUT}")
