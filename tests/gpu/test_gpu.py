"""What a GPU would do, without one: fake tensors know their device, do not mix with others, have no value to wait for.

Backward passes need a real device and are not run.
"""

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from common.config.schema import QuantizationConfig, SynthesisConfig, TrainingConfig
from common.detection.detector import build_detector
from common.detection.types import Targets
from common.distillation import trainer
from common.distillation.optimizer import Optimizer, update_average
from common.quantization import calibrate, plan_layers, quantize
from common.synthesis import losses as image_losses
from common.synthesis import optimize as stage_one
from common.synthesis.pixels import Augmentation, Pixels, Pyramid

SIZE = 64
CUDA = torch.device("cuda")
# Each kind of block of YOLO11 and of YOLOv5 at least once, in networks of half their depth and with two levels.
BLOCKS = {
    "yolo11": {
        "nc": 2,
        "depth_multiple": 0.5,
        "width_multiple": 0.125,
        "max_channels": 512,
        "backbone": [
            *([-1, 1, "Conv", [64, 3, 2]], [-1, 1, "Conv", [128, 3, 2]], [-1, 2, "C3k2", [128, False, 0.25]]),
            *([-1, 1, "Conv", [256, 3, 2]], [-1, 1, "Conv", [512, 3, 2]]),
            *([-1, 1, "SPPF", [512, 5]], [-1, 2, "C2PSA", [512]]),
        ],
        "head": [
            *([-1, 1, "nn.Upsample", ["None", 2, "nearest"]], [[-1, 3], 1, "Concat", [1]]),
            *([-1, 2, "C3k2", [512, True]], [[9, 6], 1, "Detect", ["nc"]]),
        ],
    },
    "yolov5": {
        "nc": 2,
        "depth_multiple": 0.33,
        "width_multiple": 0.125,
        "anchors": [[12, 12, 20, 16, 18, 26], [32, 30, 44, 56, 64, 50]],
        "backbone": [
            *([-1, 1, "Conv", [64, 6, 2, 2]], [-1, 1, "Conv", [128, 3, 2]], [-1, 3, "C3", [128]]),
            *([-1, 1, "Conv", [256, 3, 2]], [-1, 1, "Conv", [512, 3, 2]], [-1, 1, "SPPF", [512, 5]]),
        ],
        "head": [
            *([-1, 1, "nn.Upsample", ["None", 2, "nearest"]], [[-1, 3], 1, "Concat", [1]]),
            *([-1, 3, "C3", [512, False]], [[8, 5], 1, "Detect", ["nc", "anchors"]]),
        ],
    },
}


@pytest.fixture(params=BLOCKS)
def detector(request):
    architecture = {"yaml": BLOCKS[request.param], "names": ["a", "b"]}
    return build_detector(request.param, architecture)


@pytest.fixture
def targets():
    boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0], [20.0, 20.0, 60.0, 44.0]])
    none = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    return [Targets(boxes, torch.tensor([0, 1])), none]


@pytest.fixture
def fake():
    """Inside, nothing has a value; a module moved to `CUDA` gets new parameters, for no other kind can go into one."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    yield FakeTensorMode(allow_non_fake_inputs=True)
    torch.__future__.set_overwrite_module_params_on_conversion(False)


def statistics(x):
    """The same as one operator does on a GPU, of which this machine has no fake."""
    variance, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    return mean, variance


def on_cuda(values):
    return [Targets(t.boxes.to(CUDA), t.labels.to(CUDA)) for t in values]


def test_a_value_that_the_host_would_wait_for_and_two_devices_are_found(fake):
    with fake:
        x = torch.ones(3, device=CUDA)
        with pytest.raises(Exception, match=r"_local_scalar_dense"):
            float(x.sum())
        with pytest.raises(Exception, match="nonzero"):
            x[x > 0]
        with pytest.raises(RuntimeError, match="device"):
            x + torch.ones(3)


@pytest.mark.parametrize("parameterization", [Pyramid, Pixels])
@pytest.mark.parametrize("loss", ["normalized", "paper"])
def test_a_step_of_stage_one_stays_on_the_gpu_and_never_waits_for_it(
    detector, targets, fake, parameterization, loss, monkeypatch
):
    frozen = stage_one.freeze(detector, torch.device("cpu"))
    erased = torch.tensor([[1.0, 2.0, 30.0, 40.0], [0.0, 0.0, 0.0, 0.0]])
    augmentation = Augmentation(flip=True, shift_x=3, shift_y=-2, erased=erased)
    # These two run on the CPU, where the labels are.
    monkeypatch.setattr(stage_one, "sample_augmentation", lambda *_: augmentation)
    monkeypatch.setattr(stage_one, "augment_targets", lambda given, *_: given)
    monkeypatch.setattr(image_losses, "channel_statistics", statistics)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: losses.append(loss))  # needs a real device
    losses = []
    config = SynthesisConfig(loss=loss)
    with fake:
        frozen = stage_one.FrozenDetector(detector, frozen.module.to(CUDA), frozen.statistics_loss.to(CUDA), CUDA)
        image = parameterization(torch.full((2, 3, SIZE, SIZE), 0.5, device=CUDA))
        optimizer = torch.optim.Adam(image.parameters, lr=0.01, fused=True)
        loop = stage_one.OptimizationPass(
            frozen, config, torch.Generator(), SIZE, 10, 0.01, config.weights.model_dump(), None
        )
        terms = loop._step(image, optimizer, targets, None)
        assert terms.device.type == losses[0].device.type == "cuda"


NON_UNIFORM = {"weight_levels": "codebook", "activation_levels": "minifloat"}


@pytest.mark.parametrize(
    ("levels", "preset"), [(NON_UNIFORM, "default"), ({}, "default"), ({"quantizer": "lsq+"}, "paper")]
)
def test_an_update_of_training_stays_on_the_gpu_and_never_waits_for_it(detector, targets, fake, levels, preset):
    teacher = detector.build()
    settings = QuantizationConfig(weight_bits=4, activation_bits=4, rounding="nearest", **levels)
    plan = plan_layers(detector, teacher, settings)
    student = quantize(teacher, plan, settings)
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    calibrate(detector, teacher, student, plan, [images], settings)
    average = quantize(teacher, plan, settings)
    average.load_state_dict(student.state_dict())
    config = TrainingConfig(preset=preset, task_weight=1.0)
    teacher.requires_grad_(False)
    with fake:
        for module in (teacher, student, average):
            module.to(CUDA)
        features = trainer.features_of(detector, teacher, torch.zeros(1, 3, SIZE, SIZE, device=CUDA), config)
        job = trainer.Job(detector, teacher, None, config, 0, CUDA, Path(), features, [], [])
        optimizer = Optimizer(student, config)
        losses = trainer._losses(job, student, torch.zeros(2, 3, SIZE, SIZE, device=CUDA), on_cuda(targets))
        for parameter in student.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.update(1, 2)
        update_average(average, student, 0.98, 3)
        assert {value.device.type for value in losses.values()} == {"cuda"}
        assert {"logit", "feature", "task"} <= set(losses)
