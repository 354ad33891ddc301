"""Presets and `bits` over any file, and a checkpoint in the place of a configuration: what each layer decides."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from hostile.forge import MICRO, pickled_yolo11
from toy.experiment import write_experiment

from common.cli import main
from common.config.from_checkpoint import recognise
from common.config.load import _run_dir, announcement, dump_config, flatten, load_config
from common.config.presets import EXPORTED, KEPT, PRESETS, PRESETS_OF_FAMILY
from common.config.schema import ExperimentConfig
from common.deployment.targets import TARGETS
from common.detection.detector import load_detector
from common.pipeline import stages as pipeline
from common.pipeline.run_dir import results
from common.runtime.errors import UserError

pytestmark = pytest.mark.usefixtures("undrawn")

ROOT = Path(__file__).parents[2]
FAMILIES = ("yolo11", "yolov5", "resnet", "vit")

# A file that has another value than the published one for every key it can have.
ODD = """
weights: a.pt
synthesis:
  {num_images: 7, image_size: 96, source: batch_norm, labels: scene, image: pyramid, iterations: 3, learning_rate: 0.5,
  low_resolution_iterations: 3, noise: normal, clip: false, warm_up: 3, betas: [0.1, 0.2], epsilon: 1.0e-3,
  low_resolution_factors: {task: 3, batch_norm: 3, first_batch_norm: 3, patch_similarity: 3, total_variation: 3},
  low_resolution_learning_rate: 0.5, loss: normalized, erase: true, flip: true, jitter: 3,
  weights: {task: 3, batch_norm: 3, first_batch_norm: 3, patch_similarity: 3, total_variation: 3},
  label_sampling: {every: 3, start: 0.1, stop: 0.2, confidence: 0.3, overlap: 0.4, min_area: 0.5, max_area: 0.6}}
quantization:
  {weight_bits: 3, activation_bits: 5, range_headroom: 3, fold_layernorm: true, calibration_images: 3,
  calibration_batch_size: 3, rounding: gptq, float_roles: [late], eight_bit_roles: [body], average_bits: 3.5,
  mixed_precision_bits: [5], layers: {'*': {weight_bits: 8, activation_bits: 8}}, softmax_quantizer: log2}
training:
  {epochs: 3, batch_size: 3, learning_rate: 0, optimizer: adamw, warm_up: 3, temperature: 3, gradient_clip: 3,
  momentum: 0.1, schedule: steps, milestones: [3], accumulate: 3, weight_decay: 0.3, decayed: [norms], frozen: [a],
  patience: 3, zoom: [0.5, 0.6], holdout: 0.5, checkpoint_every: 3, task_weight: 3, logit_weight: 3, feature_weight: 3}
"""

QUICK = ["synthesis.num_images=2", "synthesis.low_resolution_iterations=2", "synthesis.iterations=1"]
SMALL = ["synthesis.image_size=64", "evaluation.image_size=64", "synthesis.low_resolution_size=32"]


def bits_of(config):
    return config.quantization.weight_bits, config.quantization.activation_bits


def recipe(config):
    """What a preset determines: every key of the three stages that KEPT does not name."""
    return {name: getattr(config, name).model_dump(mode="json", exclude=set(kept)) for name, kept in KEPT.items()}


@pytest.mark.parametrize("text", ["w4a8", "W4A8", "w4A8"])
def test_bits_are_read_in_a_file_and_on_the_command_line_in_either_case(write, text):
    assert bits_of(load_config(write(f"weights: a.pt\nbits: {text}\n"))) == (4, 8)
    assert bits_of(load_config(write("weights: a.pt\n", "plain.yaml"), [f"bits={text}"])) == (4, 8)


@pytest.mark.parametrize(
    "text", ["4", "w4", "w9a8", "w1a8", "w4a16", "a8w4", "w4a8 ", "w\uff14a8", "[w4a8]", "null", "true", ""]
)
def test_bits_of_another_form_are_one_line(write, text):
    with pytest.raises(UserError, match=r"^command line: bits: found .*; allowed: w4a8 and the like[^\n]*$"):
        load_config(write("weights: a.pt\n"), [f"bits={text!r}" if text in ("w4a8 ", "") else f"bits={text}"])


@pytest.mark.parametrize("key", ["weight_bits", "activation_bits"])
def test_bits_that_contradict_the_same_layer_are_one_line(write, key):
    path = write(f"weights: a.pt\nbits: w4a6\nquantization: {{{key}: 5}}\n")
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value) == (f"{path}: bits: found w4a6, but also quantization.{key}: 5; keep one of the two ways")
    with pytest.raises(UserError, match=rf"^command line: bits: found w4a6, but also quantization.{key}: 5; [^\n]*$"):
        load_config(write("weights: a.pt\n", "plain.yaml"), ["bits=w4a6", f"quantization.{key}=5"])


def test_a_later_layer_wins_over_bits_and_with_bits(write):
    write("weights: a.pt\nbits: w2a3\n", "base.yaml")
    assert bits_of(load_config(write("base: base.yaml\n"))) == (2, 3)
    assert bits_of(load_config(write("base: base.yaml\nquantization: {weight_bits: 5}\n"))) == (5, 3)
    path = write("base: base.yaml\nquantization: {weight_bits: 5}\n")
    assert bits_of(load_config(path, ["bits=w6a7"])) == (6, 7)
    assert bits_of(load_config(path, ["bits=w6a7", "bits=w4a4"])) == (4, 4)


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("yolo11n.yaml", [], "runs/yolo11n_w8a8"),
        ("yolo11n.yaml", ["bits=W4A8"], "runs/yolo11n_w4a8"),
        ("yolo11n.yaml", ["quantization.weight_bits=5"], "runs/yolo11n_w5a8"),
        ("mine_w4a8.yaml", ["bits=w4a8"], "runs/mine_w4a8"),
        ("yolo11n.yaml", ["bits=w4a8", "quantization.weight_levels=codebook"], "runs/yolo11n_w4a8_codebook"),
        (
            "yolo11n.yaml",
            ["bits=w4a8", "quantization.weight_levels=codebook", "quantization.codebook=fp8"],
            "runs/yolo11n_w4a8_fp8_codebook",
        ),
        ("yolo11n.yaml", ["quantization.codebook=int8"], "runs/yolo11n_w8a8"),
        ("mine_w4a8.yaml", ["bits=w4a4"], "runs/mine_w4a4"),
        ("yolo11n.yaml", ["bits=w4a4", "run_dir=here"], "here"),
    ],
)
def test_a_run_has_the_name_of_its_file_and_its_bits(write, name, overrides, expected):
    assert load_config(write("weights: a.pt\n", name), overrides).run_dir == Path(expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_a_preset_on_the_command_line_means_the_same_whatever_file_it_is_given_to(write, family, preset):
    plain = load_config(write(f"weights: a.pt\nfamily: {family}\npreset: {preset}\n", "plain.yaml"))
    odd = load_config(write(f"family: {family}\n{ODD}"), [f"preset={preset}"])
    assert recipe(odd) == recipe(plain)
    assert bits_of(odd) == (3, 5)
    assert (odd.synthesis.num_images, odd.synthesis.image_size, odd.training.checkpoint_every) == (7, 96, 3)


@pytest.mark.parametrize("section", PRESETS)
def test_a_preset_of_one_stage_leaves_the_others_as_the_file_has_them(write, section):
    path = write(ODD)
    before, after = recipe(load_config(path)), recipe(load_config(path, [f"{section}=paper"]))
    assert after == before | {section: recipe(load_config(path, ["preset=paper"]))[section]}
    assert after[section] != before[section]


PUBLISHED = json.loads((Path(__file__).parent / "published_recipe.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_published_recipe_has_the_published_values(family):
    found = dict(flatten(ExperimentConfig(weights="a.pt", family=family, preset="paper").model_dump(mode="json")))
    rows = PUBLISHED["families"][family]
    assert len(rows) == len({key for key, *_ in rows})
    for key, published, factor, source in rows:
        expected = published if factor is None else published * factor
        assert found[key] == (expected if factor is None else pytest.approx(expected, rel=1e-12)), (key, source)


def test_every_key_of_the_published_recipe_has_a_place_or_a_reason():
    """A key that a family's table does not name has the first one's value, or is among those with a reason."""
    first = {key for key, *_ in PUBLISHED["families"]["yolo11"]}
    for family in FAMILIES:
        own = PRESETS_OF_FAMILY.get(family, {})
        named = {key for key, *_ in PUBLISHED["families"][family]} | set(PUBLISHED["ours"])
        for section, presets in PRESETS.items():
            changed = {key for key, value in flatten({section: own.get(section, {}).get("paper", {})}) if value != {}}
            assert changed <= named, (family, changed - named)
            keys = {key for key, _ in flatten({section: presets["paper"]})}
            assert keys <= named | first, (family, keys - named - first)


EXPERIMENTS = sorted(p for p in (ROOT / "configs").glob("*/*.yaml") if p.parent.name != "tables")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_the_published_recipe_over_a_shipped_file_is_that_of_its_family(path):
    config = load_config(path, ["preset=paper"])
    plain = ExperimentConfig(weights="a.pt", family=config.family, preset="paper")
    assert recipe(config) == recipe(plain)
    assert config.training.epochs == (15 if config.family == "vit" else 100)


def test_keys_beside_a_preset_change_it_and_keys_of_earlier_layers_do_not(write):
    write("weights: a.pt\nquantization: {rounding: gptq, float_roles: []}\ntraining: {epochs: 5}\n", "base.yaml")
    path = write("base: base.yaml\nquantization: {preset: paper, range_headroom: 2}\n")
    config = load_config(path, ["quantization.calibration_images=9"])
    assert (config.quantization.rounding, config.quantization.float_roles[0]) == ("nearest", "first")
    assert (config.quantization.range_headroom, config.quantization.calibration_images) == (2, 9)
    assert config.training.epochs == 5
    again = load_config(path, ["preset=paper", "training.epochs=7"])
    assert (again.quantization.range_headroom, again.training.epochs) == (1, 7)


def test_a_preset_of_a_stage_beside_that_of_all_is_the_one_that_counts_there(write):
    config = load_config(write(ODD), ["preset=paper", "quantization=default"])
    assert recipe(config)["quantization"] == recipe(ExperimentConfig(weights="a.pt"))["quantization"]
    assert config.training.preset == "paper"


def test_the_published_recipe_names_every_key_that_it_depends_on():
    """So that a new default cannot change it. What is not listed has no effect on the published recipe."""
    unlisted = {"quantization": {"preset", "softmax_quantizer", "mixed_precision_bits", "concat_scales", "codebook"}}
    for section, kept in KEPT.items():
        fields = set(getattr(ExperimentConfig(weights="a.pt"), section).model_fields_set) | set(
            ExperimentConfig.model_fields[section].annotation.model_fields
        )
        listed = set(PRESETS[section]["paper"]) | set(kept) | unlisted.get(section, {"preset"})
        assert fields <= listed, fields - listed


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("overrides", [["preset=paper"], ["quantization=paper", "bits=w4a4"], ["training=paper"], []])
def test_a_resolved_file_has_every_key_and_gives_the_same_settings(write, tmp_path, family, overrides):
    config = load_config(
        write(f"family: {family}\n{ODD}"), [*overrides, "training.epochs=9", "synthesis.weights.task=2"]
    )
    dump_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    moved = load_config(tmp_path / "config.yaml", [f"run_dir={tmp_path}"])
    assert moved == config.model_copy(update={"run_dir": tmp_path})
    assert set(PRESETS_OF_FAMILY) < set(FAMILIES)


@pytest.mark.parametrize("overrides", [[], ["preset=paper", "synthesis.iterations=2", "training.epochs=1"]])
def test_a_run_repeated_from_its_resolved_file_makes_the_same_detector(tmp_path, overrides):
    short = ["synthesis.low_resolution_iterations=4", "quantization.calibration_batch_size=2"] if overrides else []
    first = pipeline.train(load_config(write_experiment(tmp_path), [*overrides, *short]))
    again = [f"run_dir={tmp_path / 'other'}", f"synthesis.directory={tmp_path / 'other_images'}"]
    assert main(["train", str(first / "config.yaml"), *again]) == 0
    for file in ("ptq/model.safetensors", "quantized/model.safetensors"):
        assert (tmp_path / "other" / file).read_bytes() == (first / file).read_bytes()


@pytest.fixture
def best(tmp_path, monkeypatch):
    """A file as Ultralytics' training leaves it, and its folder as the current one."""
    monkeypatch.chdir(tmp_path)
    return pickled_yolo11(tmp_path / "best.pt", lambda module: setattr(module, "args", {"imgsz": 200}))


def test_family_size_preset_and_name_of_the_run_come_from_the_file_and_the_device(best, caplog):
    caplog.set_level(logging.INFO, "zsqdet")
    config = load_config(Path("best.pt"), ["bits=w4a8", "device=cpu"])
    assert (config.family, config.weights, config.run_dir) == ("yolo11", Path("best.pt"), Path("runs/best_w4a8"))
    assert config.synthesis.image_size == config.evaluation.image_size == 224  # the multiple of 32 that holds 200
    assert config.preset == "quick"
    assert config.synthesis.num_images == PRESETS["synthesis"]["quick"]["num_images"]
    assert config.training.epochs == 0
    assert not caplog.text
    assert announcement(config).startswith(
        "best.pt: yolo11; preset=quick: 48 images of 224 pixels, no training; a minute and a half"
    )
    changed = ["device=cpu", "synthesis.num_images=8", "synthesis.image_size=160", "training.epochs=1"]
    line = "best.pt: yolo11; preset=quick: 8 images of 160 pixels, 1 epoch of training"
    assert announcement(load_config(Path("best.pt"), changed)) == line


def test_the_trainings_of_ultralytics_have_folders_of_their_own(best):
    for name in ("fruit", "fish"):
        (best.parent / name / "weights").mkdir(parents=True)
        shutil.copy(best, best.parent / name / "weights/best.pt")
    shutil.copy(best, best.parent / "fruit/weights/last.pt")
    places = ("fruit/weights/best.pt", "fish/weights/best.pt", "fruit/weights/last.pt", "fruit/../best.pt")
    found = [load_config(Path(place), ["bits=w4a8", "device=cpu"]).run_dir.name for place in places]
    assert found == ["fruit_best_w4a8", "fish_best_w4a8", "fruit_last_w4a8", "best_w4a8"]


def test_levels_of_any_name_are_in_that_of_the_run():
    assert _run_dir(Path("a.yaml"), {"quantization": {"weight_levels": "power"}}) == "runs/a_w8a8_power"


@pytest.mark.parametrize(("command", "says"), [("run", 1), ("synthesize", 1), ("train", 1), ("evaluate", 0)])
def test_what_is_about_to_happen_is_said_once_by_what_makes_images(best, monkeypatch, capsys, command, says):
    def nothing(_):
        raise UserError("stopped")

    monkeypatch.setattr(pipeline, "evaluate" if command == "evaluate" else "make_images", nothing)
    for words, times in (([], says), (["synthesis.num_images=many"], 0)):
        assert main([command, "best.pt", "device=cpu", *words]) == 2
        assert capsys.readouterr().err.count("preset=quick: 48 images of 224 pixels") == times


def test_settings_of_the_command_line_are_over_those_of_the_file(best):
    config = load_config(Path("best.pt"), ["preset=default", "synthesis.image_size=320", "run_dir=there", "seed=3"])
    assert (config.preset, config.synthesis.num_images, config.training.epochs) == ("default", 2048, 100)
    assert (config.synthesis.image_size, config.evaluation.image_size) == (320, 224)
    assert (config.run_dir, config.seed) == (Path("there"), 3)


@pytest.mark.parametrize("preset", ["quick", "default", "paper"])
def test_what_goes_with_a_two_stage_file_stays_under_any_preset(preset):
    config = load_config(MICRO["resnet"], [f"preset={preset}"])
    assert config.family == "resnet"
    assert not config.quantization.letterbox_padding
    assert (config.training.batch_size, config.evaluation.resize) == (8, "shorter_side")
    assert config.quantization.eight_bit_roles == (() if preset == "paper" else ("early", "head"))


@pytest.mark.parametrize("family", MICRO)
def test_the_family_of_our_own_files_is_recognised(family):
    assert recognise(MICRO[family])[0] == family


@pytest.mark.parametrize(("said", "size"), [([640, 480], 640), (None, 640), ("640", 640), (True, 640), (10**9, 640)])
def test_an_image_size_that_is_none_is_not_believed(tmp_path, said, size):
    path = pickled_yolo11(tmp_path / "a.pt", lambda module: setattr(module, "args", {"imgsz": said}))
    assert recognise(path)[1]["synthesis"]["image_size"] == size


def saved(path, content):
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"backbone.weight": torch.zeros(2)}, "1 tensors (backbone.weight, ...), which is not recognised as"),
        ({"model.0.conv.weight": torch.zeros(2)}, "a state_dict of a YOLO lacks its network: give the .pt"),
        ({"epoch": 3}, "not a state_dict; expected names with tensors"),
        ([1, 2], "not a state_dict; expected names with tensors"),
    ],
)
@pytest.mark.parametrize("command", ["run", "synthesize", "evaluate", "info"])
def test_a_file_of_no_family_is_one_line_and_leaves_nothing_behind(
    tmp_path, monkeypatch, capsys, command, content, found
):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "best.pt", content)
    assert main([command, "best.pt"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: best.pt: ")
    assert found in line
    if "no family" in found:
        assert all(f"{family}: " in line for family in MICRO)
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


def test_a_missing_file_is_named_and_a_text_is_still_a_configuration(tmp_path):
    with pytest.raises(UserError, match=r"none\.pt does not exist; give the path of a checkpoint, or family=NAME"):
        load_config(tmp_path / "none.pt")
    (tmp_path / "plain").write_text("weights: a.pt\n")
    assert load_config(tmp_path / "plain").weights == Path("a.pt")


def test_a_run_of_a_checkpoint_is_exported_and_its_configuration_repeats_it(best, capsys):
    words = ["bits=w4a8", "device=cpu", "export=onnxruntime", "quantization.rounding=nearest", *QUICK, *SMALL]
    assert main(["run", "best.pt", *words]) == 0
    out = capsys.readouterr().out
    run = Path("runs/best_w4a8")
    assert "report.html" in out
    assert (run / "export/onnxruntime/model.onnx").is_file()
    assert results(run)["seconds"].keys() >= {"synthesis", "calibration", "export"}
    assert load_config(run / "config.yaml") == load_config(Path("best.pt"), words)
    kinds = {"best.pt": "float checkpoint", str(run): "run", str(run / "quantized"): "quantized detector"}
    kinds |= {results(run)["imageset"]: "synthetic image set"}
    kinds |= {str(run / "export/onnxruntime"): "detector exported for onnxruntime"}
    kinds |= {str(run / "export/onnxruntime/model.onnx"): "ONNX graph"}
    parameters = sum(p.numel() for p in load_detector("yolo11", Path("best.pt")).build().parameters())
    for place, kind in kinds.items():
        assert main(["info", place, "--json", "about.json"]) == 0
        about = json.loads(Path("about.json").read_text())
        assert about["what"] == kind
        assert "W4A8" in about.get("bits", "W4A8") or place == "best.pt"
        if kind in ("float checkpoint", "run", "quantized detector"):
            assert about["family"] == "yolo11"
            assert about["classes"].startswith("10: ")
            assert about["stride"] == 32
            assert about["parameters"] == parameters
        if kind in ("run", "quantized detector"):
            weights = {row["name"]: (row["weights"], row["weight_bits"]) for row in results(run)["layers"]}
            size = sum(count * bits / 8 for count, bits in weights.values()) / 1e6
            assert about["size of weights"].startswith(f"{size:.2f} MB at their bits, ")
    assert main(["info", str(run)]) == main(["info", str(results(run)["imageset"])]) == 0
    out = capsys.readouterr().out
    graph = (run / "export/onnxruntime/model.onnx").stat().st_size
    assert f"exported to      onnxruntime ({graph / 1e6:.2f} MB)" in out
    assert re.search(r"distance +mean [\d.]+, deviation [\d.]+\n", out)


def test_what_an_export_needs_is_what_exports_ask_for():
    asked = {name: target for name, target in TARGETS.items() if name != "fp8"}  # by hand: it asks for certain levels
    assert {name: target.profile for name, target in asked.items()} == {n: k["profile"] for n, k in EXPORTED.items()}
    assert {n for n, target in asked.items() if target.codes == "int8"} == {
        n for n, k in EXPORTED.items() if len(k) > 1
    }


def test_an_export_that_its_settings_forbid_is_found_before_any_work(best):
    with pytest.raises(UserError, match=r"export: found onnxruntime, but quantization.profile: inputs; .*needs full"):
        load_config(Path("best.pt"), ["export=onnxruntime", "quantization.profile=inputs"])
