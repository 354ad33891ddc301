"""What the program runs on: checks that fail early, and the record that goes with every result."""

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from common.runtime.errors import UserError

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
# glibc's M_MMAP_MAX, M_TRIM_THRESHOLD (-1: never) and M_TOP_PAD (bytes), and their defaults; see mallopt(3).
MALLOC_OPTIONS = ((-4, 0, 2**16), (-1, -1, 2**17), (-2, 2**26, 2**17))
MOST_DIGITS = 19  # of what fits into 64 bits
REPAIR = "run `bash scripts/setup.sh` and use the .venv it makes"


def _is_launched() -> bool:
    """Whether torchrun started this process; a cluster may set some of the same variables for one that is alone."""
    return {"TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def _launched(name: str, otherwise: int) -> int:
    said = os.environ.get(name, "")
    return int(said) if _is_launched() and said.isdecimal() else otherwise


def check_variables() -> None:
    """Takes out what a cluster says to a process that is alone, which counts for Ultralytics.

    Raises:
        UserError: a variable that torch, tqdm or OpenCV would fail on.
    """
    for name in () if _is_launched() else ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    for name, value in os.environ.items():
        if name.startswith("OPENCV_IO_MAX_IMAGE_") and not (value.isdecimal() and len(value) < MOST_DIGITS):
            raise UserError(f"{name}: found {value!r} in the environment; allowed is a whole number, or unset it")
    if given := [name for name in os.environ if name == "TORCH_LOGS" or name.startswith("TQDM_")]:
        try:
            import torch  # noqa: F401
            import tqdm  # noqa: F401
        except ValueError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{', '.join(given)}: found in the environment, and wrong ({reason}); unset it") from error


def count() -> int:
    """How many processes do this experiment, see `common.runtime.distributed`."""
    return _launched("WORLD_SIZE", 1)


def index() -> int:
    """The number of this process, from 0."""
    return _launched("RANK", 0)


def is_first() -> bool:
    """Whether this is the process that writes and reports."""
    return index() == 0


def check_installation() -> None:
    """Fails early where another distribution hides our folders, or torchvision does not fit torch.

    Raises:
        UserError: what is wrong and how to repair it.
    """
    _check_import_names([path.parent.name for path in ROOT.glob("*/adapter.py")])
    _check_torchvision()


def choose_device(name: str) -> "torch.device":
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` means on this machine; of several processes each has its own.

    Raises:
        UserError: another name, or a GPU that is not there.
    """
    import torch

    kind, colon, number = name.partition(":")
    if name == "auto":
        name = kind = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if kind != "cuda" or (colon and not number.isdigit()):
        raise UserError(f"device: found {name!r}; allowed are auto, cpu, cuda and cuda:N")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(number or 0) >= found:
        raise UserError(
            f"device: found {name!r}, but torch {torch.__version__} sees {found} CUDA devices here; use device=cpu"
        )
    if count() > 1:
        if number:
            raise UserError(f"device: found {name!r}, but there are {count()} processes; use device=cuda")
        if count() > found:
            raise UserError(f"torchrun: found {count()} processes for {found} GPUs; give --nproc_per_node {found}")
        return torch.device("cuda", _launched("LOCAL_RANK", 0))
    return torch.device(name)


def free_memory() -> int:
    """Bytes of memory that this machine has to give, or that its container may take besides what this process has."""
    own, sizes = int(psutil.Process().memory_info().rss), [int(psutil.virtual_memory().available)]
    for limit in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            sizes.append(int(Path(limit).read_text(encoding="ascii")) - own)
    return max(min(sizes), 0)


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside, glibc keeps what is freed for the next tensor, as other allocators do, in the place of giving it back to
    the system, which has to clear it every time: up to half of the time. Without glibc nothing changes."""
    libc = ctypes.CDLL(None)
    known = hasattr(libc, "mallopt")
    for option, value, _ in MALLOC_OPTIONS if known else ():
        libc.mallopt(option, value)
    try:
        yield
    finally:
        for option, _, default in MALLOC_OPTIONS if known else ():
            libc.mallopt(option, default)
        give_back_freed_memory()


def give_back_freed_memory() -> None:
    """After something large that is needed once, inside `freed_memory_kept`. Without glibc nothing changes."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


@contextlib.contextmanager
def torch_threads(number: int | None) -> Iterator[None]:
    """Inside, torch computes with so many threads; None leaves them as they are."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def multiplies_bfloat16(device: "torch.device") -> bool:
    """Whether autocast to bfloat16 pays there: on a GPU, and on a CPU that has instructions for it."""
    import torch

    return device.type == "cuda" or bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def describe(device: "torch.device") -> dict[str, Any]:
    """Versions, processor and commit, for environment.json."""
    import torch

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "processes": count(),
        "device": str(device),
        "gpu": gpu,
        "cuda": torch.version.cuda if gpu else None,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


_PACKAGES = ("zsqdet", "torch", "torchvision", "ultralytics", "numpy", "pycocotools", "faster-coco-eval")


def version(distribution: str) -> str | None:
    """The installed version of a distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_import_names(names: list[str]) -> None:
    for name in names:
        spec = importlib.util.find_spec(name)
        places = [] if spec is None else list(spec.submodule_search_locations or [str(spec.origin)])
        if not any(Path(place).resolve() == ROOT / name for place in places):
            found = places[0] if places else "nothing"
            owners = importlib.metadata.packages_distributions().get(name, ["another distribution"])
            raise UserError(
                f"import name {name!r}: found {found} ({', '.join(sorted(set(owners)))}) instead of {ROOT / name}; "
                f"uninstall the other one, or {REPAIR}"
            )


def _check_torchvision() -> None:
    try:
        import torch
        import torchvision

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        raise UserError(
            f"torchvision {version('torchvision')} does not fit torch {version('torch')}, often a CPU build of one "
            f"and a CUDA build of the other ({str(error).splitlines()[0]}); {REPAIR}"
        ) from error


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()} ({os.cpu_count()} threads)"


def _git(*arguments: str) -> str | None:
    """What git says about the folder of the program; None outside a repository or without git."""
    if not (ROOT / ".git").exists():
        return None
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # other repositories
    command = ["git", "-C", str(ROOT), "-c", "core.fsmonitor=false", *arguments]
    try:
        done = subprocess.run(command, env=own, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


@contextlib.contextmanager
def temporarily(thing: Any, **values: Any) -> Iterator[None]:
    """Inside, these attributes of `thing` have these values."""
    before = {name: getattr(thing, name) for name in values}
    try:
        for name, value in values.items():
            setattr(thing, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(thing, name, value)


def needed(module: str, extra: str) -> Any:
    """An optional package, imported.

    Raises:
        UserError: it is not installed; `extra` is the group of pyproject.toml that holds it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{module}: not installed; run `bash scripts/setup.sh {extra}` or `pip install -e .[{extra}]`"
        ) from error
