"""Adam or AdamW on weights, affine parameters and step sizes, each at its own rate, and averages of what it finds."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from common.config.schema import TrainingConfig
from common.quantization.attention_inputs import rounded_inputs
from common.quantization.layers import quantized_layers

# Ultralytics' for Adam, which the published training takes over, and the transformers' for AdamW.
BETAS = {"adam": (0.937, 0.999), "adamw": (0.9, 0.999)}
FINAL_RATE = 0.01  # of each learning rate, at the end of the schedule
FIRST_RATE = 0.001  # of each learning rate, at the start of the warm-up, as mmdet's configurations
LONGEST_WARM_UP = 2000  # updates of the average, as Ultralytics


def parameter_groups(module: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Trainable parameters by name: `steps` (and offsets) of quantizers, `weights`, and `affine`, the vectors."""
    quantizers = {
        f"{name}.{side}_quantizer."
        for name in (*quantized_layers(module), *rounded_inputs(module))
        for side in ("weight", "input")
    }  # fmt: skip
    groups: dict[str, dict[str, nn.Parameter]] = {"weights": {}, "affine": {}, "steps": {}}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.rpartition(".")[0] + "." in quantizers:
            groups["steps"][name] = parameter
        else:
            groups["weights" if parameter.ndim > 1 else "affine"][name] = parameter
    return groups


class Optimizer:
    """Adam over the parameters of a module.

    With `log_scale` a step size moves on a logarithmic scale: what Adam sees is a leaf l = log(step) with the gradient
    step * d loss / d step, and the step is exp(l).
    """

    def __init__(self, module: nn.Module, config: TrainingConfig) -> None:
        groups = parameter_groups(module)
        self._steps = groups["steps"]
        self._leaves: dict[str, nn.Parameter] = {}
        if config.log_scale:
            self._leaves = {n: nn.Parameter(p.detach().log()) for n, p in self._steps.items() if n.endswith(".step")}
        trained = {name: self._leaves.get(name, p) for group in groups.values() for name, p in group.items()}
        rates = {
            "weights": config.learning_rate,
            "affine": config.affine_learning_rate,
            "steps": config.scale_learning_rate,
        }
        self._names = list(trained)
        self._rates = list(rates.values())
        self._config = config
        self._clip = config.gradient_clip
        make = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
        self._adam: torch.optim.Optimizer = make(
            [
                {
                    "params": [trained[name] for name in groups[kind]],
                    "weight_decay": config.weight_decay if kind == "weights" else 0.0,
                }
                for kind in rates
            ],
            betas=BETAS[config.optimizer],
        )

    def update(self, done: int, total: int) -> None:
        """One step from the gradients that are there, after `done` of the `total` updates of the training."""
        factor = rate_factor(self._config, done, total)
        for rate, group in zip(self._rates, self._adam.param_groups, strict=True):
            group["lr"] = rate * factor
        for name, leaf in self._leaves.items():
            step = self._steps[name]
            leaf.grad = None if step.grad is None else step.grad * step.detach()
        nn.utils.clip_grad_norm_([p for group in self._adam.param_groups for p in group["params"]], self._clip)
        self._adam.step()
        for name, leaf in self._leaves.items():
            self._steps[name].data.copy_(leaf.detach().exp())

    def state(self) -> dict[str, Tensor]:
        """All that the next update depends on, besides the module."""
        state = {f"leaf.{name}": leaf.detach() for name, leaf in self._leaves.items()}
        for name, parameter in zip(self._names, self._parameters(), strict=True):
            for key, value in self._adam.state[parameter].items():
                state[f"adam.{key}.{name}"] = value
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state` gave, in place."""
        for name, leaf in self._leaves.items():
            leaf.data.copy_(state[f"leaf.{name}"])
        for name, parameter in zip(self._names, self._parameters(), strict=True):
            kept = self._adam.state[parameter]
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"adam.{key}.{name}" in state:
                    value = state[f"adam.{key}.{name}"].clone()
                    kept[key] = value if key == "step" else value.to(parameter.device)

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self._adam.param_groups for p in group["params"]]


def rate_factor(config: TrainingConfig, done: int, total: int) -> float:
    """The factor of the learning rates after `done` of `total` updates: that of the schedule and, while it lasts, that
    of the warm-up, 1 - (1 - done / warm_up) (1 - 1/1000), as in mmcv."""
    warming = max(1 - done / config.warm_up, 0) if config.warm_up else 0.0
    return schedule(config.schedule, done / total) * (1 - warming * (1 - FIRST_RATE))


def schedule(kind: str, progress: float) -> float:
    """The factor of the learning rates, from 1 to 1/100 unless it is constant."""
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return 1 - progress * (1 - FINAL_RATE)
    return FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, decay: float, updates: int) -> None:
    """Moves the float32 `average` towards `module` after `updates` earlier calls.

    The decay grows from 0, d (1 - exp(-n / tau)) as in Ultralytics, with tau no longer than the average itself.
    """
    tau = min(LONGEST_WARM_UP, 1 / (1 - decay))
    d = decay * (1 - math.exp(-updates / tau))
    for mine, other in zip(_tensors(average), _tensors(module), strict=True):
        if mine.is_floating_point():
            mine.lerp_(other.to(mine.dtype), 1 - d)
        else:
            mine.copy_(other)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*(p.data for p in module.parameters()), *module.buffers()]
