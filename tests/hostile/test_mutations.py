"""Hundreds of damaged files: each is refused in one line, or is the detector that it was.

`ZSQDET_MUTATIONS=1000 pytest tests/hostile/test_mutations.py` tries more of each kind.
"""

import json
import os
import random
import shutil
import zipfile
from collections import Counter

import pytest
import torch
import yaml
from hostile import forge
from PIL import Image
from safetensors.torch import save_file
from test_code_in_files import quantized
from toy.experiment import CONFIG, write_experiment

from common.checkpoints.rcnn_architecture import MOBILE
from common.checkpoints.read import load_tensors, save_tensors
from common.cli import main
from common.config.load import dump_config, load_config
from common.detection.detector import load_detector
from common.quantization import load_quantized
from common.reporting import figures
from common.reporting.run_data import gather
from common.runtime.environment import ROOT
from common.runtime.errors import UserError
from common.runtime.files import read_checked_json
from common.runtime.image_files import read_image
from tools.torture import fingerprint

COUNT = int(os.environ.get("ZSQDET_MUTATIONS", "3"))
FAMILIES = ("yolo11", "yolov5", "resnet", "vit")


def attempt(read, counts):
    """What `read` gives; None where it refuses, with one line."""
    try:
        found = read()
    except UserError as error:
        message = str(error)
        assert "\n" not in message
        assert len(message) < 700
        counts["refused"] += 1
        return None
    counts["read"] += 1
    return found


def same(found, wanted):
    return (
        found.class_names == wanted.class_names
        and found.state.keys() == wanted.state.keys()
        and all(torch.equal(found.state[name], tensor) for name, tensor in wanted.state.items())
    )


def finite(detector, module):
    return all(tensor.isfinite().all() for tensor in module.state_dict().values() if tensor.is_floating_point())


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """The micro detector of each family as our safetensors file, with a checksum, and as a pickled file."""
    folder, found = tmp_path_factory.mktemp("originals"), {}
    for family in FAMILIES:
        tensors, about = load_tensors(forge.MICRO[family])
        save_tensors(folder / f"{family}.safetensors", tensors, about)
        found[family] = load_detector(family, folder / f"{family}.safetensors")
    forge.pickled_yolo11(folder / "yolo11.pt")
    torch.save({"model": small_torchvision().state_dict(), "args": {"model": MOBILE[0]}}, folder / "torchvision.pth")
    return folder, found


def small_torchvision():
    from torchvision.models import detection

    return detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_damaged_bytes_of_a_safetensors_file_are_noticed(family, originals, tmp_path, record_property):
    folder, wanted = originals
    content, counts = (folder / f"{family}.safetensors").read_bytes(), Counter()
    for seed in range(COUNT):
        path = tmp_path / "bad.safetensors"
        path.write_bytes(forge.damaged_bytes(content, random.Random(seed)))
        found = attempt(lambda p=path: load_detector(family, p), counts)
        assert found is None or same(found, wanted[family]), seed
    record_property("counts", dict(counts))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_damaged_description_of_a_detector_is_refused_or_describes_one(family, originals, tmp_path, record_property):
    counts = Counter()
    for seed in range(COUNT):
        change = lambda about, s=seed: forge.damaged_value(about, random.Random(s))  # noqa: E731
        path = forge.own_file(tmp_path / "bad.safetensors", family, change)
        found = attempt(lambda p=path: load_detector(family, p), counts)
        if found is not None:
            assert finite(found, found.build()), seed
    record_property("counts", dict(counts))


@pytest.mark.parametrize("family", FAMILIES)
def test_damaged_tensors_are_named(family, originals, tmp_path, record_property):
    tensors, about = load_tensors(forge.MICRO[family])
    counts = Counter()
    for seed in range(COUNT):
        path = tmp_path / "bad.safetensors"
        save_file(forge.damaged_tensors(tensors, random.Random(seed)), path, {"zsqdet": json.dumps(about)})
        found = attempt(lambda p=path: load_detector(family, p), counts)
        assert found is None or set(tensors) - set(found.state), seed  # a counter of a BatchNorm may be missing
    record_property("counts", dict(counts))


@pytest.mark.parametrize(("family", "name"), [("yolo11", "yolo11.pt"), ("resnet", "torchvision.pth")])
def test_damaged_bytes_of_a_pickled_file_are_noticed(family, name, originals, tmp_path, record_property):
    folder, _ = originals
    wanted, counts = load_detector(family, folder / name), Counter()
    content = (folder / name).read_bytes()
    for seed in range(COUNT):
        path = tmp_path / f"bad.{name}"
        path.write_bytes(forge.damaged_bytes(content, random.Random(seed)))
        found = attempt(lambda p=path: load_detector(family, p), counts)
        assert found is None or same(found, wanted), seed
    record_property("counts", dict(counts))


@pytest.mark.parametrize(("family", "name"), [("yolo11", "yolo11.pt"), ("resnet", "torchvision.pth")])
def test_a_damaged_pickle_with_right_checksums_is_read_as_data_or_refused(
    family, name, originals, tmp_path, record_property
):
    folder, _ = originals
    counts = Counter()
    with zipfile.ZipFile(folder / name) as source:  # without the numbers, which are read over and over otherwise
        assert any(entry.endswith("data.pkl") for entry in source.namelist())
    for seed in range(COUNT):
        path = forge.damaged_pickle(folder / name, tmp_path / f"bad.{name}", random.Random(seed))
        found = attempt(lambda p=path: load_detector(family, p), counts)
        if found is not None:
            assert finite(found, found.build()), seed
    record_property("counts", dict(counts))


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    return quantized(tmp_path_factory.mktemp("calibrated"), "yolov5")


@pytest.mark.parametrize("part", ["quantization.json", "bytes of quantization.json", "model.safetensors", "tensors"])
def test_a_damaged_quantized_folder_is_refused_or_loads(part, calibrated, tmp_path, record_property):
    folder, counts = calibrated, Counter()
    _, wanted = load_quantized(folder)
    about = read_checked_json(folder / "quantization.json")
    tensors, description = load_tensors(folder / "model.safetensors")
    for seed in range(COUNT):
        bad, generator = tmp_path / "bad", random.Random(seed)
        shutil.copytree(folder, bad, dirs_exist_ok=True)
        if part == "quantization.json":
            (bad / part).write_text(json.dumps(forge.damaged_value(about, generator)))  # as an older version wrote it
        elif part == "tensors":
            save_tensors(bad / "model.safetensors", forge.damaged_tensors(tensors, generator), description)
        else:
            name = part.removeprefix("bytes of ")
            (bad / name).write_bytes(forge.damaged_bytes((folder / name).read_bytes(), generator))
        found = attempt(lambda b=bad: load_quantized(b), counts)
        if found is not None:
            state = found[1].state_dict()
            # The counters of BatchNorms may be lost: nothing reads them.
            kept = {n: t for n, t in wanted.state_dict().items() if not n.endswith("num_batches_tracked")}
            assert all(torch.equal(state[n], t) for n, t in kept.items() if n in state), seed
    record_property("counts", dict(counts))


@pytest.mark.parametrize("kind", ["bytes", "values"])
def test_a_damaged_configuration_is_lines_that_name_it_or_loads(kind, tmp_path, record_property):
    counts, path = Counter(), tmp_path / "c.yaml"
    base = yaml.safe_load((ROOT / "configs/yolo11/micro_yolo11.yaml").read_text())
    for seed in range(10 * COUNT):
        generator = random.Random(seed)
        if kind == "bytes":
            path.write_bytes(forge.damaged_bytes(yaml.safe_dump(base).encode(), generator))
        else:
            value = forge.damaged_value(base, generator)
            path.write_text(yaml.safe_dump(value, allow_unicode=True))
        try:
            config = load_config(path)
        except UserError as error:
            lines = str(error).splitlines()
            assert all(line.startswith(f"{path}: ") and len(line) < 700 and line.isprintable() for line in lines), seed
            counts["refused"] += 1
            continue
        counts["read"] += 1
        dump_config(config, tmp_path / "again.yaml")
        assert load_config(tmp_path / "again.yaml") == config, seed
    record_property("counts", dict(counts))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp"])
def test_a_damaged_picture_is_refused_or_is_one(suffix, tmp_path, record_property):
    """PNG has checksums of its own: whatever is read has the pixels that were written."""
    counts = Counter()
    pixels = torch.randint(0, 256, (3, 40, 50), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    path = tmp_path / f"good{suffix}"
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
    wanted, content = read_image(path), path.read_bytes()
    for seed in range(10 * COUNT):
        bad = tmp_path / f"bad{suffix}"
        bad.write_bytes(forge.damaged_bytes(content, random.Random(seed)))
        found = attempt(lambda b=bad: read_image(b), counts)
        assert found is None or (found.dtype == torch.uint8 and found.shape[0] == 3), seed
        if suffix == ".png" and found is not None:
            assert torch.equal(found, wanted), seed
    record_property("counts", dict(counts))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    config = CONFIG.format(folder=folder).replace("/synthetic", "/sets")
    (write_experiment(folder)).write_text(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "image", lambda figure: "data:image/svg+xml;base64,")  # charts are not drawn
        assert main(["run", str(folder / "experiment.yaml")]) == 0
        shutil.copytree(folder, folder.with_name("kept"))
        yield folder


@pytest.mark.parametrize("kind", ["bytes", "values"])
def test_a_damaged_file_of_a_finished_run_is_made_again(kind, finished, capsys, record_property):
    """The same command ends as the first one; a report of the damaged folder is one, or one line."""
    counts, kept = Counter(), finished.with_name("kept")
    wanted = fingerprint(kept)
    names = sorted(str(p.relative_to(kept)) for d in ("run", "sets") for p in (kept / d).rglob("*") if p.is_file())
    names = [name for name in names if kind == "bytes" or name.endswith(".json")]
    for seed in range(COUNT):
        generator = random.Random(seed)
        for part in ("run", "sets", "measured"):
            shutil.rmtree(finished / part)
            shutil.copytree(kept / part, finished / part)
        path = finished / generator.choice(names)
        if kind == "bytes":
            path.write_bytes(forge.damaged_bytes(path.read_bytes(), generator))
        else:
            path.write_text(json.dumps(forge.damaged_value(json.loads(path.read_text()), generator)))
        attempt(lambda: gather(finished / "run"), counts)
        capsys.readouterr()
        assert main(["run", str(finished / "experiment.yaml")]) == 0, (seed, path, capsys.readouterr().err)
        found = fingerprint(finished)
        assert [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)] == [], (seed, path)
    record_property("counts", dict(counts))


def test_a_folder_in_the_place_of_a_file_of_a_run_is_one_line_and_without_it_the_run_is_as_before(finished, capsys):
    kept = finished.with_name("kept")
    wanted = fingerprint(kept)
    files = [p.relative_to(kept) for d in ("run", "sets", "measured") for p in sorted((kept / d).rglob("*"))]
    files = [path for path in files if (kept / path).is_file()]
    kinds = {(path.parts[0], path.parent.name, path.suffix, len(path.stem) > 6): path for path in files}
    names = list(kinds.values())
    assert len(names) > 10
    for name in random.Random(0).sample(names, min(2 * COUNT, len(names))):
        for part in ("run", "sets", "measured"):
            shutil.rmtree(finished / part, ignore_errors=True)
            shutil.copytree(kept / part, finished / part)
        (finished / name).unlink()
        (finished / name / "inside").mkdir(parents=True)
        attempt(lambda: gather(finished / "run"), Counter())
        capsys.readouterr()
        code = main(["run", str(finished / "experiment.yaml")])
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert (code, len(errors)) in ((0, 0), (2, 1)), (name, errors)
        if code:
            assert str(finished) in errors[0]
            shutil.rmtree(finished / name)
            assert main(["run", str(finished / "experiment.yaml")]) == 0, name
        found = fingerprint(finished)
        assert [n for n in {**found, **wanted} if found.get(n) != wanted.get(n)] == [], name
