"""A quantized detector as a folder: what it is called, and that it comes back bit by bit, or one line says why not."""

import json

import pytest
import torch
from toy.adapter import ToyDetector

from common.checkpoints.read import load_tensors, save_tensors
from common.config.schema import QuantizationConfig
from common.quantization import (
    bits_label,
    calibrate,
    idle_levels,
    load_quantized,
    mean_weight_bits,
    plan_layers,
    quantize,
    save_quantized,
)
from common.quantization.convert import levels_in_use
from common.quantization.layers import quantized_layers
from common.runtime.errors import UserError
from common.runtime.files import read_checked_json

SETTINGS = {
    "lsq": {"quantizer": "lsq"},
    "lsq+": {"quantizer": "lsq+"},
    "codebook": {"weight_levels": "codebook"},
    "minifloat": {"activation_levels": "minifloat"},
    "codebook and 8 bits": {
        "weight_levels": "codebook",
        "activation_levels": "minifloat",
        "layers": {"blocks.1.*": {"weight_bits": 8, "activation_bits": 8}},
    },
    "per tensor": {"weight_granularity": "tensor", "activation_range": "symmetric"},
    "paper": {"preset": "paper"},
    "mixed": {"float_roles": (), "layers": {"output": {"weight_bits": 8, "activation_bits": 32}}},
}
IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))

EIGHT = {"weight_bits": 8, "activation_bits": 8}
LEVELS = {"weight_levels": "codebook", "activation_levels": "minifloat"}


def prepared(**settings):
    """A detector of three classes, its uncalibrated student, and what is needed besides."""
    detector = ToyDetector(("circle", "square", "star"), width=6, seed=5)
    config = QuantizationConfig(**{"weight_bits": 4, "activation_bits": 4} | settings)
    teacher = detector.build()
    plan = plan_layers(detector, teacher, config)
    return detector, teacher, quantize(teacher, plan, config), plan, config


def save(folder, train=False, **settings):
    detector, teacher, student, plan, config = prepared(**settings)
    calibrate(detector, teacher, student, plan, IMAGES.split(2), config)
    if train:
        optimizer = torch.optim.SGD(student.parameters(), 1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            student.train()(IMAGES).square().mean().backward()
            optimizer.step()
        student.eval()
    save_quantized(folder, student, plan, "toy", detector.architecture, config)
    return student


@pytest.mark.parametrize("train", [False, True], ids=["calibrated", "trained"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_folder_alone_gives_the_same_outputs_bit_by_bit(tmp_path, name, train):
    student = save(tmp_path / "q", train, **SETTINGS[name])
    assert sorted(path.name for path in (tmp_path / "q").iterdir()) == ["model.safetensors", "quantization.json"]
    detector, loaded = load_quantized(tmp_path / "q")
    assert detector.class_names == ("circle", "square", "star")
    assert detector.width == 6
    fresh = torch.rand(2, 3, 40, 48, generator=torch.Generator().manual_seed(1)) * 3 - 1
    with torch.no_grad():
        for images in (fresh, IMAGES, fresh):  # nothing starts anew on what it sees first
            assert torch.equal(loaded(images), student(images))
    assert not any(module.training for module in loaded.modules())
    wanted = student.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in loaded.state_dict().items())
    for key, layer in quantized_layers(student).items():
        other = quantized_layers(loaded)[key]
        for side in ("weight_quantizer", "input_quantizer"):
            mine, its = getattr(layer, side), getattr(other, side)
            assert (mine is None) == (its is None)
            assert mine is None or (mine.low, mine.high, mine.initialised) == (its.low, its.high, True)


def test_saving_a_loaded_one_gives_the_same_files(tmp_path):
    save(tmp_path / "a")
    detector, loaded = load_quantized(tmp_path / "a")
    *_, plan, config = prepared()
    save_quantized(tmp_path / "b", loaded, plan, "toy", detector.architecture, config)
    for name in ("model.safetensors", "quantization.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_description_says_what_every_layer_is(tmp_path):
    save(tmp_path)
    description = json.loads((tmp_path / "quantization.json").read_text())
    assert description["family"] == "toy"
    assert description["architecture"] == {"class_names": ["circle", "square", "star"], "width": 6}
    assert QuantizationConfig(**description["quantization"]) == prepared()[4]
    assert [(row["name"], row["weight_bits"], row["activation_bits"]) for row in description["layers"]] == [
        ("blocks.0.conv", 32, 32),
        ("blocks.1.conv", 4, 4),
        ("blocks.2.conv", 4, 4),
        ("output", 32, 32),
    ]


def test_a_student_that_was_not_calibrated_is_not_saved(tmp_path):
    detector, _, student, plan, config = prepared()
    with pytest.raises(ValueError, match=r"blocks\.1\.conv: not calibrated"):
        save_quantized(tmp_path / "q", student, plan, "toy", detector.architecture, config)
    assert not (tmp_path / "q").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written") as caught:
        save(tmp_path / "file" / "q")
    assert "\n" not in str(caught.value)


def describe(change):
    def edit(folder):
        path = folder / "quantization.json"
        content = read_checked_json(path)
        path.write_text(json.dumps(change(content) or content))

    return edit


def retensor(change):
    def edit(folder):
        tensors, about = load_tensors(folder / "model.safetensors")
        change(tensors)
        save_tensors(folder / "model.safetensors", tensors, about)

    return edit


def replace_bytes(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


DAMAGE = {
    "another letter": (
        replace_bytes("quantization.json", lambda b: b.replace(b'"reason": "', b'"reason": "x', 1)),
        "its SHA-256 is not the recorded one",
    ),
    "no description": (lambda folder: (folder / "quantization.json").unlink(), "cannot be read"),
    "no tensors": (lambda folder: (folder / "model.safetensors").unlink(), "does not exist"),
    "description cut": (replace_bytes("quantization.json", lambda b: b[:50]), "not valid JSON"),
    "description is no text": (replace_bytes("quantization.json", lambda b: b"\xff\xfe\x00"), "not valid JSON"),
    "tensors cut": (replace_bytes("model.safetensors", lambda b: b[:-8]), "damaged safetensors"),
    "tensors empty": (replace_bytes("model.safetensors", lambda b: b""), "damaged safetensors"),
    "description is null": (describe(lambda c: [None]), "damaged quantized checkpoint"),
    "no family": (describe(lambda c: c.pop("family") and None), "damaged quantized checkpoint: family: found nothing"),
    "other family": (describe(lambda c: c | {"family": "nothing"}), "unknown detector 'nothing'"),
    "family is a number": (describe(lambda c: c | {"family": 7}), "damaged quantized checkpoint"),
    "no architecture": (describe(lambda c: c.pop("architecture") and None), "damaged quantized checkpoint"),
    "other architecture": (describe(lambda c: c["architecture"].update(width=9)), "damaged quantized checkpoint"),
    "unknown setting": (describe(lambda c: c["quantization"].update(bits=4)), "damaged quantized checkpoint"),
    "other granularity": (
        describe(lambda c: c["quantization"].update(weight_granularity="tensor")),
        "damaged quantized checkpoint",
    ),
    "layers missing": (describe(lambda c: c["layers"].clear()), "damaged quantized checkpoint"),
    "layers with other keys": (describe(lambda c: c["layers"][0].update(x=1)), "damaged quantized checkpoint"),
    "layer of another name": (describe(lambda c: c["layers"][1].update(name="blocks.7")), "damaged quantized"),
    "layer that is none": (describe(lambda c: c["layers"][1].update(name="blocks.1.bn")), "damaged quantized"),
    "tensor missing": (retensor(lambda t: t.pop("output.bias")), "damaged quantized checkpoint"),
    "tensor too many": (retensor(lambda t: t.update(other=torch.ones(1))), "damaged quantized checkpoint"),
    "tensor of another shape": (
        retensor(lambda t: t.update({"output.bias": torch.ones(2)})),
        "damaged quantized checkpoint",
    ),
    "codes missing": (
        retensor(lambda t: t.update({"blocks.1.conv.weight_quantizer._extra_state": torch.ones(1)})),
        "damaged quantized checkpoint",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_refused_in_one_line(tmp_path, name):
    save(tmp_path)
    load_quantized(tmp_path)
    change, message = DAMAGE[name]
    change(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load_quantized(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value) or name == "other family"


def test_tensors_of_another_run_are_refused(tmp_path):
    save(tmp_path / "a")
    save(tmp_path / "b", train=True)
    (tmp_path / "a/model.safetensors").write_bytes((tmp_path / "b/model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"model.safetensors: not of the quantization.json beside it; take both from"):
        load_quantized(tmp_path / "a")


def test_a_folder_that_is_not_there_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be read") as caught:
        load_quantized(tmp_path / "absent")
    assert "\n" not in str(caught.value)


def rows(*bits):
    return [{"role": "body", "weight_bits": w, "activation_bits": a, "weights": n} for w, a, n in bits]


@pytest.mark.parametrize(
    ("settings", "layers", "expected"),
    [
        ({"weight_bits": 4, "activation_bits": 4}, [], "W4A4"),
        ({"weight_bits": 4, "activation_bits": 8, **LEVELS}, [], "W4A8, codebook weights"),
        ({"weight_bits": 4, "weight_levels": "codebook", "codebook": "fp8"}, [], "W4A8, fp8 codebook weights"),
        ({"weight_bits": 8, "activation_bits": 4, **LEVELS}, [], "W8A4, minifloat activations"),
        ({"weight_bits": 4, "activation_bits": 4, **LEVELS}, [], "W4A4, codebook weights, minifloat activations"),
        ({"weight_bits": 8, "activation_bits": 8, **LEVELS}, [], "W8A8"),
        ({"weight_bits": 8, "activation_bits": 8, **LEVELS}, rows((4, 8, 1), (8, 8, 1)), "W8A8, codebook weights"),
        ({"weight_bits": 4, "activation_bits": 8, **LEVELS}, rows((8, 8, 1), (32, 32, 1)), "W4A8"),
        ({"weight_bits": 4, "activation_bits": 4, "quantizer": "lsq+"}, rows((4, 4, 1)), "W4A4"),
    ],
)
def test_levels_are_named_where_some_layer_has_them(settings, layers, expected):
    assert bits_label(QuantizationConfig(**settings).model_dump(), layers) == expected


def test_exceptions_count_before_there_are_layers():
    config = QuantizationConfig(layers={"a": {"weight_bits": 4, "activation_bits": 8}}, **LEVELS)
    assert bits_label(config.model_dump()) == "W8A8, codebook weights"


def test_a_run_of_an_older_version_is_uniform():
    assert bits_label({"weight_bits": 6, "activation_bits": 6}) == "W6A6"


def test_mean_bits_are_over_the_weights_that_are_rounded():
    layers = rows((4, 8, 300), (8, 8, 100), (32, 32, 1000))
    assert mean_weight_bits([*layers, {"weight_bits": 32, "activation_bits": 4}]) == 5
    assert mean_weight_bits([]) is None
    assert mean_weight_bits([{"weight_bits": 4, "activation_bits": 4}]) is None  # of an older version


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        ({}, []),
        ({"weight_bits": 4, "activation_bits": 4, **LEVELS}, []),
        ({"weight_bits": 4, **LEVELS}, ["activation_levels"]),
        (LEVELS, ["weight_levels", "activation_levels"]),
        ({"layers": {"blocks.1.*": {"weight_bits": 4, "activation_bits": 8}}, "weight_levels": "codebook"}, []),
        (
            {"weight_bits": 4, "weight_levels": "codebook", "layers": {"*": {"weight_bits": 8, "activation_bits": 8}}},
            ["weight_levels"],
        ),
    ],
)
def test_levels_that_no_layer_has_bits_for_are_named(settings, idle):
    detector, config = ToyDetector(), QuantizationConfig(**settings)
    lines = idle_levels(plan_layers(detector, detector.build(), config), config)
    assert [line.split(":")[0].removeprefix("quantization.") for line in lines] == idle


@pytest.mark.parametrize("settings", [{"fold_layernorm": True}, {"softmax_quantizer": "log2"}])
def test_settings_of_transformers_are_refused_for_other_detectors(settings):
    detector = ToyDetector()
    with pytest.raises(UserError, match=rf"quantization\.{next(iter(settings))}: .*leave it out"):
        plan_layers(detector, detector.build(), QuantizationConfig(**settings))


def test_levels_in_use_are_those_that_some_layer_has():
    settings = QuantizationConfig(weight_bits=4, activation_bits=8, **LEVELS).model_dump()
    assert levels_in_use(settings) == ("codebook", "uniform")
    assert levels_in_use(settings, rows((8, 8, 1))) == ("uniform", "uniform")
    assert levels_in_use({**settings, "layers": {"model.0": {"weight_bits": 8}}}) == ("codebook", "uniform")
    assert levels_in_use({"weight_levels": "codebook"}) == ("uniform", "uniform")  # a file without bits
