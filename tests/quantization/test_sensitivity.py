"""The scan of layers without data, and the bits that a budget gives them."""

import copy
import json
from pathlib import Path

import pytest
import torch
from toy.adapter import ToyDetector
from toy.experiment import write_experiment

from common.cli import main
from common.config.schema import QuantizationConfig
from common.detection.detector import load_detector
from common.detection.prediction_distance import prediction_distance, random_predictions
from common.detection.types import HeadOutput, HeadTerm
from common.pipeline.run_dir import results
from common.quantization import Sensitivity, allocate_bits, calibrate, check_average_bits, plan_layers, quantize, scan
from common.quantization.policy import FLOAT, LayerPlan
from common.runtime.errors import UserError

pytestmark = pytest.mark.usefixtures("undrawn")

PLAN = [
    LayerPlan("stem", "first", FLOAT, FLOAT, "first: sees the image; in float_roles"),
    LayerPlan("a", "early", 4, 4, "early: few weights"),
    LayerPlan("b", "body", 4, 4, "body: backbone"),
    LayerPlan("c", "body", 4, 4, "body: backbone"),
]
# Per additional bit c gains most, then a, then b.
FOUND = [
    Sensitivity("a", "early", 100, (4, 4), 0.5, {8: 0.1}),
    Sensitivity("b", "body", 800, (4, 4), 0.6, {8: 0.0}),
    Sensitivity("c", "body", 100, (4, 4), 0.9, {8: 0.1}),
]


def bits(plan):
    return {entry.name: (entry.weight_bits, entry.activation_bits) for entry in plan}


def mean_bits(plan):
    sizes = {entry.name: entry.weights for entry in FOUND}
    quantized = [entry for entry in plan if entry.name in sizes]
    return sum(sizes[e.name] * e.weight_bits for e in quantized) / sum(sizes.values())


def test_a_budget_goes_to_the_layers_that_gain_most_for_each_bit_and_is_kept():
    assert bits(allocate_bits(PLAN, FOUND, 4.4)) == {"stem": (32, 32), "a": (4, 4), "b": (4, 4), "c": (8, 8)}
    plan = allocate_bits(PLAN, FOUND, 4.8)
    assert bits(plan) == {"stem": (32, 32), "a": (8, 8), "b": (4, 4), "c": (8, 8)}
    assert mean_bits(plan) == pytest.approx(4.8)
    assert bits(allocate_bits(PLAN, FOUND, 8.0)) == {"stem": (32, 32), "a": (8, 8), "b": (8, 8), "c": (8, 8)}


def test_a_budget_of_the_planned_bits_changes_nothing_and_a_lower_one_is_an_error():
    assert allocate_bits(PLAN, FOUND, 4.0) == PLAN
    with pytest.raises(
        UserError, match=r"quantization.average_bits: 3.5 bits, but the layers have 4.00 on average; raise it"
    ):
        allocate_bits(PLAN, FOUND, 3.5)


def test_a_layer_that_does_not_fit_is_passed_over_for_a_smaller_one():
    large = [FOUND[0], Sensitivity("b", "body", 800, (4, 4), 90.0, {8: 0.0}), FOUND[2]]
    assert bits(allocate_bits(PLAN, large, 4.4))["c"] == (8, 8)


def test_a_layer_that_gains_nothing_is_left_as_it_is_and_every_change_says_why():
    useless = [FOUND[0], FOUND[1], Sensitivity("c", "body", 100, (4, 4), 0.1, {8: 0.1})]
    plan = allocate_bits(PLAN, useless, 4.4)
    assert bits(plan) == {"stem": (32, 32), "a": (8, 8), "b": (4, 4), "c": (4, 4)}
    assert plan[1].reason == "early: few weights; 8 bits by the average of 4.4"
    assert plan[3].reason == "body: backbone"


def test_the_scan_estimates_what_quantizing_one_layer_alone_does_to_the_predictions():
    detector = ToyDetector()
    config = QuantizationConfig(
        weight_bits=6, activation_bits=6, rounding="nearest", batch_norm_correction=False, mixed_precision_bits=[8]
    )
    teacher = detector.build()
    before = copy.deepcopy(teacher.state_dict())
    plan = plan_layers(detector, teacher, config)
    batches = [torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    found = scan(detector, teacher, plan, batches, config)
    assert [entry.name for entry in found] == [entry.name for entry in plan if entry.weight_bits < FLOAT]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    for entry in found:
        alone = [
            e if e.name == entry.name else LayerPlan(e.name, e.role, FLOAT, FLOAT, e.reason) for e in plan
        ]  # fmt: skip
        student = quantize(teacher, alone, config)
        calibrate(detector, teacher, student, alone, batches, config)
        with torch.no_grad():
            pairs = [(detector.head_output(teacher, x), detector.head_output(student, x)) for x in batches]
            wanted = sum(float(prediction_distance(*pair)) for pair in pairs) / len(pairs)
        # Errors of different places of an output count as independent.
        assert wanted / 2 < entry.planned < wanted * 2, entry.name
        assert 0 < entry.wider[8] < 0.2 * entry.planned
        assert entry.weights == teacher.get_submodule(entry.name).weight.numel()


def test_random_predictions_have_the_curvature_of_the_distance():
    generator = torch.Generator().manual_seed(0)
    kinds = {"sigmoid": (2, 3, 4), "softmax": (2, 3, 2, 4), "offset": (2, 3, 4)}
    values = {kind: torch.randn(shape, generator=generator).double() for kind, shape in kinds.items()}
    confidence = torch.rand(2, 3, generator=generator).double()

    def output(moved):
        terms = {kind: HeadTerm(moved[kind], kind, confidence) for kind in kinds}
        return HeadOutput(terms, (torch.zeros(1, dtype=torch.float64),))

    change = {kind: 1e-2 * torch.randn(x.shape, generator=generator).double() for kind, x in values.items()}
    total_change = 2 * float(prediction_distance(output(values), output({k: values[k] + change[k] for k in kinds})))
    leaves = {kind: x.clone().requires_grad_() for kind, x in values.items()}
    squares = []
    for _ in range(4000):
        total = random_predictions(output(leaves), generator)
        gradients = torch.autograd.grad(total, list(leaves.values()))
        squares.append(float(sum((g * d).sum() for g, d in zip(gradients, change.values(), strict=True))) ** 2 / 2)
    assert sum(squares) / len(squares) == pytest.approx(total_change, rel=0.1)  # of both images, not their mean


def test_every_kind_of_layer_is_scanned_transposed_convolutions_included():
    weights = Path(__file__).parents[2] / "tools/shapes/micro_mask_rcnn.safetensors"
    detector, config = load_detector("resnet", weights), QuantizationConfig(weight_bits=4, activation_bits=4)
    teacher = detector.build()
    plan = [e for e in plan_layers(detector, teacher, config) if "mask_predictor" in e.name]
    found = scan(detector, teacher, plan, [torch.rand(1, 3, 64, 64)], config)
    assert [entry.name for entry in found] == ["roi_heads.mask_predictor.conv5_mask"]
    assert found[0].planned >= found[0].wider[8] >= 0


def test_a_budget_of_several_widths_takes_the_steps_that_gain_most_for_each_bit():
    # The first bit of b gains more than any other, a's second step more than the rest of b's.
    found = [
        Sensitivity("a", "early", 100, (4, 4), 0.5, {5: 0.3, 6: 0.15, 8: 0.1}),
        Sensitivity("b", "body", 100, (4, 8), 0.6, {5: 0.2, 6: 0.1, 8: 0.05}),
        Sensitivity("c", "body", 100, (4, 4), 0.01, {5: 0.01, 6: 0.02, 8: 0.0}),
    ]
    plan = [*PLAN[:2], LayerPlan("b", "body", 4, 8, "body: backbone"), PLAN[3]]
    wanted = {4.34: (4, 5, 4), 4.67: (5, 5, 4), 5.0: (6, 5, 4), 5.34: (6, 6, 4), 6.0: (6, 8, 4), 6.67: (8, 8, 4)}
    for budget, expected in wanted.items():
        widened = bits(allocate_bits(plan, found, budget))
        assert tuple(widened[name][0] for name in "abc") == expected, budget
        assert widened["b"][1] == 8, "inputs never get less than they have"
        assert widened["a"][1] == widened["a"][0]


def test_a_step_over_a_width_that_gains_nothing_is_taken_at_once():
    found = [Sensitivity("a", "early", 100, (4, 4), 0.5, {5: 0.6, 8: 0.1}), *FOUND[1:]]
    assert bits(allocate_bits(PLAN, found, 4.8))["a"] == (8, 8)
    assert bits(allocate_bits(PLAN, [found[0]], 6.0))["a"] == (4, 4)


def test_a_layer_is_never_given_bits_that_it_has():
    plan = [LayerPlan("a", "early", 8, 8, "early: in eight_bit_roles"), *PLAN[2:]]
    found = [Sensitivity("a", "early", 100, (8, 8), 0.5, {5: 0.4, 8: 0.4}), *FOUND[1:]]
    assert allocate_bits(plan, found, 4.4) == plan


def test_weights_that_stay_in_float_cost_no_bits():
    plan = [*PLAN[:3], LayerPlan("c", "body", FLOAT, 4, "body: backbone")]
    found = [*FOUND[:2], Sensitivity("c", "body", 100, (FLOAT, 4), 0.9, {8: 0.1})]
    widened = bits(allocate_bits(plan, found, 4.4))
    assert widened == {"stem": (32, 32), "a": (4, 4), "b": (4, 4), "c": (FLOAT, 8)}


def test_the_command_prints_every_layer_and_writes_numbers_and_a_figure(tmp_path, capsys):
    config = str(write_experiment(tmp_path))
    options = ["--json", str(tmp_path / "scan.json"), "--figure", str(tmp_path / "scan.svg")]
    assert main(["sensitivity", config, *options, "quantization.mixed_precision_bits=[8,5,8]"]) == 0
    rows = json.loads((tmp_path / "scan.json").read_text())
    printed = capsys.readouterr().out
    assert " ".join(printed.splitlines()[0].split()) == "change at 5 bits at 8 bits weights bits layer"
    assert rows
    assert all(list(row["wider"]) == ["5", "8"] for row in rows)
    assert all(row["name"] in printed for row in rows)
    assert "<svg" in (tmp_path / "scan.svg").read_text()
    assert not (tmp_path / "run").exists()


def test_a_run_with_a_budget_quantizes_by_it_and_records_the_scan(tmp_path):
    config = str(write_experiment(tmp_path))
    assert main(["run", config, "quantization.average_bits=6.5", "training.epochs=1"]) == 0
    found = results(tmp_path / "run")
    chosen = [row for row in found["layers"] if row["weight_bits"] == 8]
    assert chosen
    assert len(chosen) < len(found["sensitivity"])
    for folder in ("ptq", "quantized"):
        stored = json.loads((tmp_path / "run" / folder / "quantization.json").read_text())["layers"]
        assert [row["name"] for row in stored if row["weight_bits"] == 8] == [row["name"] for row in chosen]
    (tmp_path / "run/results.json").unlink()
    assert main(["run", config, "quantization.average_bits=6.5", "training.epochs=1"]) == 0
    again = results(tmp_path / "run")
    assert (again["layers"], again["sensitivity"]) == (found["layers"], found["sensitivity"])


def test_a_budget_that_cannot_be_met_is_one_line(tmp_path, capsys):
    assert main(["run", str(write_experiment(tmp_path)), "quantization.average_bits=3"]) == 2
    assert "quantization.average_bits: 3.0 bits, but the layers have 4.00 on average" in capsys.readouterr().err


def test_a_budget_of_bits_that_all_layers_have_is_one_line(tmp_path, capsys):
    words = ["quantization.average_bits=6", "quantization.mixed_precision_bits=[3,4]"]
    assert main(["run", str(write_experiment(tmp_path)), *words]) == 2
    assert (
        "quantization.mixed_precision_bits: found [3, 4], but all layers have as many bits" in capsys.readouterr().err
    )


def test_a_budget_may_be_spent_on_layers_that_a_pattern_gives_less():
    detector = ToyDetector()
    module = detector.build()
    config = QuantizationConfig(layers={"*": {"weight_bits": 4, "activation_bits": 8}})
    check_average_bits(plan_layers(detector, module, config), module, 6.0, [8])
