"""What a run is called: bits, kinds of levels, mean bits."""

import pytest
from toy.adapter import ToyDetector

from common.config.schema import QuantizationConfig
from common.quantization import bits_label, idle_levels, mean_weight_bits, plan_layers
from common.quantization.description import levels_in_use
from common.runtime.errors import UserError

EIGHT = {"weight_bits": 8, "activation_bits": 8}
LEVELS = {"weight_levels": "codebook", "activation_levels": "minifloat"}


def rows(*bits):
    return [{"role": "body", "weight_bits": w, "activation_bits": a, "weights": n} for w, a, n in bits]


@pytest.mark.parametrize(
    ("settings", "layers", "expected"),
    [
        ({"weight_bits": 4, "activation_bits": 4}, [], "W4A4"),
        ({"weight_bits": 4, "activation_bits": 8, **LEVELS}, [], "W4A8, codebook weights"),
        ({"weight_bits": 4, "weight_levels": "codebook", "codebook": "fp8"}, [], "W4A8, fp8 codebook weights"),
        ({"weight_bits": 8, "activation_bits": 4, **LEVELS}, [], "W8A4, minifloat inputs"),
        ({"weight_bits": 4, "activation_bits": 4, **LEVELS}, [], "W4A4, codebook weights, minifloat inputs"),
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
