"""Configurations: every shipped file loads, overrides and presets combine, and every mistake is named."""

import re
from pathlib import Path

import pytest
import yaml

from common.config.load import RENAMED, dump_config, load_config
from common.config.presets import PRESETS, PRESETS_OF_FAMILY
from common.config.reference import known_keys, nearest_key, reference
from common.config.schema import ExperimentConfig
from common.runtime.errors import UserError
from tools.experiments.table import matching, table_lines
from vit.models import OFFICIAL

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.parent.name != "tables")
BITS = {"w8a8": (8, 8), "w6a6": (6, 6), "w4a8": (4, 8), "w4a4": (4, 4), "W2A3": (2, 3)}


def mistakes(path, *overrides):
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value).splitlines()


def bits_of(config):
    return config.quantization.weight_bits, config.quantization.activation_bits


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_file_loads_and_survives_being_written(path, tmp_path):
    config = load_config(path)
    assert config.run_dir == Path("runs") / f"{path.stem}_w8a8"
    dump_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_no_two_shipped_files_share_a_run_folder():
    assert len({path.stem for path in SHIPPED}) == len(SHIPPED)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_file_names_its_bits_near_the_top_and_takes_others(path):
    assert any(line.startswith("bits: w8a8") for line in path.read_text().splitlines()[:8])
    for bits, expected in BITS.items():
        config = load_config(path, [f"bits={bits}"])
        assert bits_of(config) == expected
        assert config.run_dir == Path("runs") / f"{path.stem}_{bits.lower()}"


@pytest.mark.parametrize("family", ["yolo11", "yolov5"])
@pytest.mark.parametrize("size", "nsmlx")
def test_every_size_ships_with_the_papers_number_of_images_and_epochs(family, size):
    lines = matching(table_lines(ROOT / "configs/tables/models.yaml"), f"{family}{size}/w8a8/ours")
    config = lines[0].load()
    assert (config.synthesis.num_images, config.synthesis.image_size, config.training.epochs) == (2048, 640, 100)
    assert (config.family, config.weights.name) == (family, f"{family}{size}.pt")


@pytest.mark.parametrize("path", [p for p in SHIPPED if p.parent.name == "yolov5"], ids=lambda p: p.stem)
def test_yolov5_is_measured_as_its_val_py_measures(path):
    config = load_config(path).evaluation
    measured = (config.confidence, config.iou, config.max_detections, config.interpolation, config.rectangular)
    assert measured == (0.001, 0.6, 300, "area", True)


def test_each_swin_has_an_official_checkpoint():
    config = load_config(ROOT / "configs/vit/swin_t.yaml")
    assert (config.family, config.synthesis.num_images, config.synthesis.image_size) == ("vit", 2048, 640)
    larger = yaml.safe_load((ROOT / "configs/tables/swin.yaml").read_text())["models"]["swin_s"]["weights"]
    for size, name in (("t", config.weights.name), ("s", Path(larger).name)):
        assert name.startswith(f"mask_rcnn_swin-{size}-p4-w7_fpn_")
        assert name in OFFICIAL


def test_all_bit_widths_of_one_model_share_their_stage_one():
    path = ROOT / "configs/yolo11/yolo11n.yaml"
    sections = {load_config(path, [f"bits={bits}"]).synthesis.model_dump_json() for bits in BITS}
    assert len(sections) == 1


def test_a_file_changes_its_base_and_the_command_line_changes_both(write):
    write("weights: base.pt\nseed: 1\ntraining: {epochs: 3, batch_size: 4}\n", "base.yaml")
    path = write("base: base.yaml\ntraining: {epochs: 5}\n")
    config = load_config(path, ["training.learning_rate=1e-4", "seed=7", "seed=8"])
    assert (config.weights, config.seed) == (Path("base.pt"), 8)
    assert (config.training.epochs, config.training.batch_size, config.training.learning_rate) == (5, 4, 1e-4)


@pytest.mark.parametrize("order", [1, -1])
def test_a_preset_lies_under_single_keys_wherever_they_stand(write, order):
    overrides = ["quantization=paper", "quantization.rounding=gptq"][::order]
    config = load_config(write("weights: a.pt\nquantization: {weight_bits: 3}\n"), overrides)
    expected = PRESETS["quantization"]["paper"] | {"rounding": "gptq", "weight_bits": 3, "preset": "paper"}
    actual = config.quantization.model_dump(mode="json")
    assert {key: actual[key] for key in expected} == expected


def test_the_short_form_of_a_preset_works_in_files_and_bases(write):
    write("weights: a.pt\nquantization: paper\n", "base.yaml")
    config = load_config(write("base: base.yaml\nquantization: {weight_bits: 4}\n"))
    assert (config.quantization.preset, config.quantization.weight_bits) == ("paper", 4)
    assert config.quantization.rounding == PRESETS["quantization"]["paper"]["rounding"]


def test_one_preset_reaches_all_stages(write):
    config = load_config(write("weights: a.pt\n"), ["preset=paper"])
    for section, presets in PRESETS.items():
        actual = getattr(config, section).model_dump(mode="json")
        assert {key: actual[key] for key in presets["paper"]} == presets["paper"]


def test_the_published_transformers_round_the_patch_embedding_and_train_with_adamw(write):
    config = load_config(write("weights: a.pt\nfamily: vit\npreset: paper\n"))
    assert config.quantization.float_roles == ("late", "head", "output", "attention_input")
    assert (config.training.optimizer, config.training.weight_decay) == ("adamw", 0.05)
    assert (config.training.warm_up, config.training.ema_decay) == (1000, 0.0)
    assert config.synthesis.weights.batch_norm == PRESETS["synthesis"]["paper"]["weights"]["batch_norm"]
    plain = load_config(write("weights: a.pt\nfamily: vit\n", "plain.yaml"))
    assert "first" in plain.quantization.float_roles
    assert plain.training.optimizer == "adam"


@pytest.mark.parametrize(
    "overrides", [["preset=paper"], ["synthesis=paper", "training.preset=paper", "quantization=paper"]]
)
def test_a_preset_has_the_settings_of_the_family(write, overrides):
    config = load_config(write("weights: a.pt\nfamily: yolov5\n"), overrides)
    for section, presets in PRESETS_OF_FAMILY["yolov5"].items():
        actual = getattr(config, section).model_dump(mode="json")
        expected = PRESETS[section]["paper"] | presets["paper"]
        nested = {key: actual[key] | value for key, value in expected.items() if isinstance(value, dict)}
        assert {key: actual[key] for key in expected} == expected | nested
        assert any(presets["paper"][key] != PRESETS[section]["paper"].get(key) for key in presets["paper"])
    assert config.training.learning_rate == 1e-4
    assert (config.synthesis.label_sampling.every, config.synthesis.label_sampling.confidence) == (50, 0.2)


def test_single_keys_change_the_settings_of_the_family(write):
    path = write("weights: a.pt\nfamily: yolov5\npreset: paper\nsynthesis: {weights: {task: 2.0}}\n")
    config = load_config(path, ["training.batch_size=4", "quantization=default"])
    assert (config.training.batch_size, config.training.learning_rate) == (4, 1e-4)
    assert (config.synthesis.weights.task, config.synthesis.weights.batch_norm) == (2.0, 0.01 / 32)
    assert config.quantization.rounding == "coordinate_descent"


@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_first_stage_and_heads_of_two_stage_detectors_have_eight_bits_unless_asked_otherwise(write, family):
    path = write(f"weights: a.pt\nfamily: {family}\nquantization: {{weight_bits: 4}}\n")
    assert load_config(path).quantization.eight_bit_roles == ("early", "head")
    assert load_config(path, ["quantization.eight_bit_roles=[]"]).quantization.eight_bit_roles == ()
    assert load_config(path, ["quantization=paper"]).quantization.eight_bit_roles == ()


def test_without_a_preset_a_family_has_the_defaults(write):
    config = load_config(write("weights: a.pt\nfamily: yolov5\n"))
    plain = load_config(write("weights: a.pt\n", "plain.yaml"))
    assert (config.synthesis, config.training) == (plain.synthesis, plain.training)


@pytest.mark.parametrize("value", ["1e5", "a b", "[x].pt", "0x10", "yes", "# no comment", "C: d"])
def test_a_path_on_the_command_line_is_taken_literally(write, value):
    config = load_config(write("weights: a.pt\n"), [f"weights={value}"])
    assert config.weights == Path(value)


@pytest.mark.parametrize("value", ["null", ""])
def test_a_path_can_be_taken_back(write, value):
    path = write("weights: a.pt\ndata: {images: x}\n")
    assert load_config(path, [f"data.images={value}"]).data.images is None


def test_an_empty_section_is_no_mistake(write):
    assert load_config(write("weights: a.pt\ntraining:\n")).training == ExperimentConfig(weights="a.pt").training


def test_layer_exceptions_replace_those_of_the_base(write):
    write("weights: a.pt\nquantization: {layers: {'a.*': {weight_bits: 8, activation_bits: 8}}}\n", "base.yaml")
    path = write("base: base.yaml\nquantization: {layers: {'b.*': {weight_bits: 4, activation_bits: 32}}}\n")
    assert list(load_config(path).quantization.layers) == ["b.*"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("quantization.wieght_bits=4", "quantization.wieght_bits: found 4; *did you mean quantization.weight_bits?"),
        ("weight_bits=4", "weight_bits: found 4; *did you mean quantization.weight_bits?"),
        ("quantisation.weight_bits=4", "quantisation.weight_bits: *did you mean quantization.weight_bits?"),
        ("quantization.weight_bits=many", "quantization.weight_bits: found 'many'; allowed: an integer from 2 to 8"),
        ("quantization.weight_bits=9", "quantization.weight_bits: found 9; allowed: an integer from 2 to 8"),
        ("quantization.weight_bits=4.5", "quantization.weight_bits: found 4.5; allowed: an integer from 2 to 8"),
        ("quantization.range_headroom=.inf", "quantization.range_headroom: found inf; allowed: a number from 1 to 16"),
        ("training.learning_rate=.nan", "training.learning_rate: found nan; allowed: a number from 0 to 1"),
        ("training.zoom=[1]", "training.zoom: found [1]; allowed: [a number from 0.1 to 10, a number from 0.1 to 10]"),
        ("training.zoom=[0, 1]", "training.zoom: found [0, 1]; allowed: [a number from 0.1 to 10, *"),
        (
            "quantization.quantizer=lut",
            "quantization.quantizer: found 'lut', which is now weight_levels=codebook activation_levels=minifloat",
        ),
        ("quantization.weight_range=signed", "quantization.weight_range: found 'signed', which is now symmetric"),
        ("quantization.activation_range=affine", "quantization.activation_range: found 'affine', which is now asymm*"),
        (
            "quantization.layers={'a.*': {weight_bits: 8, activation_bits: 17}}",
            "quantization.layers: found {'a.*': *allowed: a mapping of patterns to *",
        ),
        (
            "data.split=test",
            "data: split: found test, but no data set that has parts; give data=PATH, or leave data.split out",
        ),
        ("quantization.weight_levels=table", "quantization.weight_levels: found 'table'; allowed: uniform | codebook"),
        ("synthesis.loss=papr", "synthesis.loss: found 'papr'; allowed: normalized | paper"),
        ("preset=papr", "preset: found 'papr'; allowed: default | quick | paper"),
        ("quantization=papr", "quantization.preset: found 'papr'; allowed: default | quick | paper"),
        (
            "quantization.mixed_precision_bits=[]",
            "quantization.mixed_precision_bits: *a list of one or more integers from 2 to 8",
        ),
        ("quantization.float_roles=[body, tail]", "quantization.float_roles: *allowed: a list of first | early*"),
        (
            "quantization.layers={a: {bits: 4}}",
            "quantization.layers: *{weight_bits: 2 | 3 |*, both of them",
        ),
        ("run_dir=/tmp/r\udcff", "run_dir: found a name that is not UTF-8; allowed: one that is"),
        ("training=5", "training: found 5; allowed: a section with keys of its own"),
        ("seed.a=5", "seed: found {'a': 5}; allowed: an integer from 0 to 4294967295"),
        ("synthesis.labels=true_label", "synthesis: labels: true_label needs `annotations`, a COCO JSON file"),
        ("seed", "found 'seed'; allowed is key=value*"),
        ("seed=[", "seed: found '[', not valid YAML*quote it"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_that_says_what_is_allowed(write, override, expected):
    path = write("weights: a.pt\n")
    (line,) = mistakes(path, override)
    assert _matches(line, f"command line: {expected}"), line


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("weight_levels=codebook scale_init=lsq", "weight_levels: found 'codebook', but scale_init: lsq is *uniform*"),
        ("preset=paper weight_levels=codebook", "weight_levels: *scale_init: lsq (of preset: paper) is *"),
        ("activation_levels=minifloat scale_init=lsq", "activation_levels: found 'minifloat', but scale_init: lsq*"),
        (
            "activation_range=asymmetric scale_init=lsq",
            "activation_range: *no zero point; *auto | symmetric | unsigned*",
        ),
        (
            "softmax_quantizer=log2 scale_init=lsq",
            "softmax_quantizer: *allowed with it: auto | same; *",
        ),
        (
            "codebook=fp8",
            "weight_levels: found 'uniform', but codebook: fp8 are entries of codebooks; *: codebook; or*",
        ),
        ("quantizer=lsq+ activation_levels=minifloat", "activation_levels: *learns an offset*or change quantizer"),
        ("activation_levels=minifloat activation_range=asymmetric", "activation_range: *has no zero point*"),
    ],
)
def test_settings_that_contradict_each_other_are_one_line_that_says_why(write, overrides, expected):
    (line,) = mistakes(write("weights: a.pt\n"), *(f"quantization.{text}" for text in overrides.split()))
    assert _matches(line, f"command line: quantization: {expected}"), line


@pytest.mark.parametrize(
    "overrides",
    [
        "quantizer=lsq+ weight_levels=codebook",
        "weight_levels=codebook weight_bits=8 layers={a: {weight_bits: 4, activation_bits: 8}}",
        "preset=paper scale_init=mse weight_levels=codebook",
        "activation_levels=minifloat activation_range=symmetric",
        "quantizer=lsq+ scale_init=lsq activation_range=symmetric",
    ],
)
def test_settings_that_go_together_are_taken(write, overrides):
    load_config(write("weights: a.pt\n"), [f"quantization.{text}" for text in re.split(r" (?=[a-z_]+=)", overrides)])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nseed: 2\nweights: a.pt\n", "FILE: seed: given twice (lines 1 and 2); keep one"),
        (
            "weights: a.pt\ntraining:\n  epochs: 1\n  epochs: 2\n",
            "FILE: training.epochs: given twice (lines 3 and 4); keep one",
        ),
        ("seed: 1\n", "FILE: weights: found nothing; allowed is a path; set it in the file or as weights=VALUE"),
        ("- a\n", "FILE: found ['a']; allowed are lines of `key: value`"),
        ("weights: [\n", "FILE: not valid YAML*"),
        ("weights: a.pt\nepochs: 3\n", "FILE: epochs: found 3; *did you mean training.epochs?"),
        ("base: nowhere.yaml\n", "*nowhere.yaml: cannot be read (No such file or directory)*"),
        ("base: [a, b]\n", "FILE: base: found ['a', 'b']; allowed is the path of one YAML file*"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_that_names_the_file(write, text, expected):
    path = write(text)
    (line,) = mistakes(path)
    assert _matches(line, expected.replace("FILE", str(path))), line


def test_a_mistake_in_a_base_is_blamed_on_the_base(write):
    base = write("weights: a.pt\nseed: -1\n", "base.yaml")
    (line,) = mistakes(write("base: base.yaml\n"))
    assert line.startswith(f"{base}: seed: found -1")


def test_a_base_has_no_base(write):
    write("weights: a.pt\n", "first.yaml")
    base = write("base: first.yaml\nweights: b.pt\n", "base.yaml")
    (line,) = mistakes(write("base: base.yaml\n"))
    assert line.startswith(f"{base}: base: ")


def test_a_missing_file_and_bytes_that_are_no_text_are_named(tmp_path):
    assert mistakes(tmp_path / "no.yaml")[0].startswith(f"{tmp_path / 'no.yaml'}: cannot be read")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    assert mistakes(tmp_path / "binary.yaml")[0].startswith(f"{tmp_path / 'binary.yaml'}: not valid YAML")


def test_all_mistakes_are_reported_at_once(write):
    path = write("seed: -1\nseed: -2\ntrainning: {epochs: 1}\nevaluation: {iou: 2}\n")
    lines = mistakes(path, "quantization.weight_bits=1", "nonsense")
    named = [
        "seed: given twice",
        "nonsense",
        "trainning.epochs",
        "weights",
        "seed: found -2",
        "weight_bits",
        "evaluation.iou",
    ]
    assert len(lines) == len(named)
    assert all(any(part in line for line in lines) for part in named)


def test_the_reference_explains_every_key_of_the_schema():
    dumped = ExperimentConfig(weights="a.pt").model_dump(mode="json")
    names = {name for name, _ in _leaves(dumped)}
    assert set(known_keys()) == names
    text = reference()
    for key in known_keys().values():
        assert key.meaning, f"{key.name} has no description"
        assert f"  {key.name}  ({key.allowed}; " in text


def test_no_key_is_suggested_where_none_is_near():
    assert nearest_key("zzzzzz") is None
    assert nearest_key("training.epoch") == "training.epochs"


def test_what_is_written_is_plain_yaml_of_every_key(tmp_path):
    config = ExperimentConfig(weights="a.pt", preset="paper", quantization={"weight_bits": 4})
    dump_config(config, tmp_path / "config.yaml")
    values = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert {name for name, _ in _leaves(values)} == set(known_keys())
    assert load_config(tmp_path / "config.yaml") == config


def _leaves(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _matches(line, pattern):
    """`*` stands for anything; brackets are plain characters."""
    position = 0
    parts = pattern.split("*")
    for i, part in enumerate(parts):
        found = line.find(part, position)
        if found < 0 or (i == 0 and found > 0):
            return False
        position = found + len(part)
    return pattern.endswith("*") or position == len(line)


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_the_error_for_an_old_key_names_the_new_one(tmp_path, old, new):
    assert new in known_keys()
    file = tmp_path / "experiment.yaml"
    file.write_text("weights: yolo11n.pt")
    with pytest.raises(UserError, match=rf"^command line: {old}: found 1; this key is now {re.escape(new)}$"):
        load_config(file, [f"{old}=1"])
