"""The rules that keep the program readable, as tests."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("common", "yolo11", "yolov5", "resnet", "onestage", "vit", "tools", "tests")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
COMMON = sorted((ROOT / "common").rglob("*.py"))
FAMILIES = sorted(path.parent for path in ROOT.glob("*/adapter.py"))
BACKBONES = {"yolov5", "yolo11", "resnet", "onestage", "vit", "ultralytics", "mmdet", "mmcv", "timm"}
# Each layer of common/ and those below it that it may import; a file at the top counts as a layer.
LAYERS = (
    {"runtime"},
    {"checkpoints", "detection"},
    {"config"},
    {"synthesis", "quantization", "evaluation"},
    {"distillation", "deployment"},
    {"pipeline"},
    {"reporting"},
    {"cli"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
PICKLED = {"common/runtime/distributed.py": {"pickle.dumps((work, part))", "pickle.loads(pickled)"}}  # through pipes
KNOWS_THE_EXPERIMENT = {
    "config/schema.py",
    "config/reference.py",
    "config/load.py",
    "pipeline/run_dir.py",
    "pipeline/measure.py",
    "pipeline/stages.py",
    "pipeline/export.py",
    "cli.py",
}


def name_of(path):
    return str(path.relative_to(ROOT))


def imports(path):
    """Every imported module of a file, by full name, wherever the import stands; `from a import b` gives a.b too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)} imports by a relative name"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(module):
    """The entry of common/ that a module belongs to; None for other packages and for common itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "common" and len(parts) > 1 and parts[1] in LEVEL else None


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", COMMON, ids=name_of)
def test_common_imports_no_backbone(path):
    assert not {module.partition(".")[0] for module in imports(path)} & BACKBONES


def test_every_entry_of_common_is_in_a_layer():
    entries = {path.stem for path in (ROOT / "common").iterdir() if path.stem not in ("__init__", "__pycache__")}
    assert entries <= set(LEVEL)
    assert len(entries) <= 12


@pytest.mark.parametrize("path", COMMON, ids=name_of)
def test_a_layer_imports_only_lower_ones(path):
    own = layer_of(module_of(path))
    for module in imports(path):
        other = layer_of(module)
        if other not in (None, own):
            assert LEVEL[other] < LEVEL[own], f"{name_of(path)} imports {module}, which is not below {own}"


def test_no_modules_of_common_import_each_other_in_a_circle():
    graph = {module_of(path): set(imports(path)) for path in COMMON}
    graph = {module: found & set(graph) - {module} for module, found in graph.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError with the modules of a circle


@pytest.mark.parametrize("path", COMMON, ids=name_of)
def test_stages_take_their_own_section_and_not_the_whole_experiment(path):
    if path.relative_to(ROOT / "common").as_posix() in KNOWS_THE_EXPERIMENT:
        return
    assert "common.config.schema.ExperimentConfig" not in set(imports(path))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_is_over_400_lines_and_no_function_over_60(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{name_of(path)}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_is_called_utils(path):
    assert path.stem not in {"utils", "util", "helpers", "misc"}


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[len(ROOT.parts)] != "tests"], ids=name_of)
def test_nothing_that_runs_what_a_file_says_is_called(path):
    """Pickles of files are read by common/checkpoints/unpickle.py alone; tests/hostile tries what this rule cannot see.

    What a process sends to its own workers, through a pipe, comes from no file.
    """
    allowed = PICKLED.get(path.relative_to(ROOT).as_posix(), set())
    forbidden = {
        *("torch.load", "torch.save", "torch.jit.load", "eval", "exec", "compile", "yaml.load", "yaml.unsafe_load"),
        *(f"pickle.{name}" for name in ("load", "loads", "dump", "dumps", "Unpickler")),
    }
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            assert call not in forbidden or ast.unparse(node) in allowed, f"line {node.lineno}: {call}"
    assert allowed or "pickle" not in set(imports(path))


@pytest.mark.parametrize("folder", FAMILIES, ids=name_of)
def test_a_detectors_folder_has_the_fixed_files_and_is_small(folder):
    for name in ("__init__.py", "adapter.py", "synthesize.py", "train.py", "evaluate.py", "README.md"):
        assert (folder / name).is_file(), f"{folder.name}/{name} is missing"
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in folder.glob("*.py")) <= 640


@pytest.mark.parametrize("name", ["models", "utils", "train.py", "val.py"])
def test_the_top_level_leaves_the_names_that_upstream_checkpoints_claim(name):
    assert not (ROOT / name).exists()


def test_help_does_not_wait_for_torch():
    code = "import sys, common.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
