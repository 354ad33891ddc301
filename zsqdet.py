"""zsqdet from Python, and the command `zsqdet`.

    import zsqdet

    run = zsqdet.quantize("best.pt", bits="w4a8", run_dir="runs/best")
    run.export("onnxruntime")

Everything here does what the command of the same name does; `examples/` has programs that run. This module has a name
that nothing else has, so that a foreign `common` is noticed.
"""

import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from common.detection.detector import Detector
    from common.detection.types import Detections

OURS = Path(__file__).resolve().parent / "common"
__all__ = ["QuantizedDetector", "Run", "load", "main", "quantize"]


@dataclass(frozen=True)
class QuantizedDetector:
    """A quantized detector in PyTorch: its fake-quantized module, and the adapter that decodes what it says."""

    adapter: "Detector"
    module: "nn.Module"

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the labels, in their order."""
        return self.adapter.class_names

    def detect(
        self, images: "Tensor", confidence: float = 0.25, iou: float = 0.7, max_detections: int = 300
    ) -> "list[Detections]":
        """Boxes, scores and labels of each image.

        Args:
            images: [B, 3, H, W], RGB, uint8 or float in [0, 1], sides multiples of `adapter.stride`.
            confidence: lowest score.
            iou: overlap from which on the lower score is suppressed.
            max_detections: of an image.

        Raises:
            UserError: images or limits that a detector cannot take.
        """
        from common.detection.detector import check_limits, checked_images

        check_limits(confidence, iou, max_detections)
        checked, trained = checked_images(images, self.adapter.stride), self.module.training
        self.module.eval()  # in training mode a detector gives losses, or raw maps
        try:
            return self.adapter.detect(self.module, checked, confidence, iou, max_detections)
        finally:
            self.module.train(trained)


@dataclass(frozen=True)
class Run:
    """A finished run folder."""

    folder: Path

    @property
    def detector(self) -> QuantizedDetector:
        """Its quantized detector, on the CPU in eval mode; read anew each time.

        Raises:
            UserError: the folder is damaged.
        """
        from common.pipeline.run_dir import check_files
        from common.quantization import load_quantized

        check_files(self.folder)
        return QuantizedDetector(*load_quantized(self.folder / "quantized"))

    @property
    def results(self) -> dict[str, Any]:
        """What results.json says: `rows` of AP, or `fidelity`; `layers`, `seconds`, `zero_shot`."""
        from common.pipeline.run_dir import results

        return results(self.folder)

    @property
    def report(self) -> Path:
        """report.html, written anew."""
        from common.reporting.report import write_report

        return write_report(self.folder)

    def evaluate(self, settings: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        """AP on labelled data, or fidelity on images alone: `evaluate(data="data.yaml")`; by default the run's own set.

        Args:
            settings: keys of a configuration, as `{"data.images": "DIR", "evaluation.image_size": 640}`.
            more: those without a dot in their name.

        Raises:
            UserError: a mistake in the settings or the data.
        """
        from common.pipeline import stages
        from common.pipeline.run_dir import config_of_run

        with _keys_alone():
            config = config_of_run(self.folder, _words(_settings(settings) | more))
        return stages.evaluate(config)

    def export(self, to: str, out: str | Path | None = None, **options: Any) -> Path:
        """Writes a folder for a runtime and returns it; RUN/export/TO without `out`.

        Args:
            to: onnxruntime, openvino, opencv, tensorrt or fp8.
            out: the new folder.
            options: of `common.deployment.targets.Options`, as `size=(640, 640), dynamic=True`.

        Raises:
            UserError: an option that there is not, a run that this runtime cannot run, or a check that failed.
        """
        from common.deployment.targets import options_of
        from common.pipeline.export import export

        return export(self.folder, options_of(to, options), _path("out", out) if out else None)[0]


def quantize(
    source: str | Path, bits: str | None = None, settings: Mapping[str, Any] | None = None, **more: Any
) -> Run:
    """Quantizes a detector without any data, as `zsqdet run SOURCE bits=BITS ...`. Resumes what was interrupted.

    Args:
        source: a checkpoint, whose family, classes and image size are found in it, or a configuration (YAML).
        bits: of weights and inputs, as "w4a8".
        settings: keys of a configuration with dots, as `{"training.epochs": 0}`.
        more: those without, as `preset="quick"`, `run_dir="runs/mine"`, `device="cpu"`, `data="data.yaml"`.

    Raises:
        UserError: one line for each mistake in the settings, the checkpoint or the data.
    """
    _check_common()
    from common.cli import complete
    from common.config.load import load_config
    from common.runtime.environment import freed_memory_kept
    from common.runtime.signals import open_standard_streams

    open_standard_streams()
    given = ({"bits": bits} if bits else {}) | _settings(settings) | more
    with _keys_alone():
        config = load_config(_path("source", source), _words(given))
    with freed_memory_kept():
        return Run(complete(config)[0])


def load(run: str | Path) -> Run:
    """A run that is there already.

    Raises:
        UserError: not the folder of a finished run.
    """
    _check_common()
    from common.pipeline.run_dir import is_complete
    from common.runtime.errors import UserError

    folder = _path("run", run)
    if not is_complete(folder / "quantized"):
        raise UserError(f"{folder}: no finished run; give a folder that `zsqdet run` or `zsqdet.quantize` made")
    return Run(folder)


def _path(name: str, value: Any) -> Path:
    from common.runtime.errors import UserError

    try:
        path = Path(value)
        with contextlib.suppress(PermissionError):  # which is told by what reads it
            path.exists()  # a name that is far too long is no path either
    except (TypeError, ValueError, OSError) as error:
        found = repr(value)[:80] if isinstance(value, str | Path) else type(value).__name__
        raise UserError(f"{name}: found {found}; allowed: a path, as text or pathlib.Path") from error
    return path


def _settings(settings: Any) -> dict[str, Any]:
    from common.runtime.errors import UserError

    try:
        return dict(settings or {})
    except (TypeError, ValueError) as error:
        raise UserError(f"settings: found {type(settings).__name__}; allowed: a dict of keys and values") from error


@contextlib.contextmanager
def _keys_alone() -> Iterator[None]:
    """Inside, a mistake in a setting is said of its key, without the command line before it."""
    from common.config.load import COMMAND_LINE
    from common.runtime.errors import UserError

    try:
        yield
    except UserError as error:
        raise UserError(*(str(line).removeprefix(f"{COMMAND_LINE}: ") for line in error.args)) from error


def _words(settings: Mapping[str, Any]) -> list[str]:
    """Settings as the command line has them: texts and paths as they are, and of the rest JSON, which is YAML."""
    return [f"{key}={_text(key, value)}" for key, value in settings.items()]


def _text(key: str, value: Any) -> str:
    from common.runtime.errors import UserError

    try:
        return os.fspath(value) if isinstance(value, str | os.PathLike) else json.dumps(value)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{key}: found {type(value).__name__}; a setting is text, a number, a list or a dict"
        ) from error


def _check_common() -> None:
    """Raises ImportError where another package `common` hides ours."""
    spec = importlib.util.find_spec("common")
    places = [Path(place).resolve() for place in (spec and spec.submodule_search_locations) or []]
    if OURS not in places[:1]:
        raise ImportError(
            f"import name 'common': found {places[0] if places else 'nothing'} instead of {OURS}; "
            "uninstall the other one, or run `bash scripts/setup.sh` and use the .venv it makes"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line of common/cli.py. Returns its exit code, or 2 where it cannot start.

    It cannot where another `common` hides ours, and in a directory that was removed, where torch finds no libraries.
    """
    try:
        _check_common()
        os.getcwd()
    except ImportError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except FileNotFoundError:
        sys.stderr.write("error: the current directory was removed; change to one that exists\n")
        return 2
    from common.runtime.environment import check_variables, freed_memory_kept
    from common.runtime.errors import UserError
    from common.runtime.signals import leave_at_once, open_standard_streams, output_is_gone

    open_standard_streams()
    leave_at_once()
    try:
        check_variables()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if os.path.lexists("matplotlibrc"):  # matplotlib would read it
        with contextlib.chdir(OURS), contextlib.suppress(ImportError):
            import matplotlib  # noqa: F401
    # Before torch: threads that spin while they wait take ten times as long on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from common.cli import main as run

    try:
        with freed_memory_kept():
            code = run(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        return output_is_gone()
    return code


if __name__ == "__main__":
    sys.exit(main())
