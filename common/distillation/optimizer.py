"""Adam or AdamW on weights, affine parameters and scales, each at its own rate, and the average of what it finds."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from common.config.schema import TrainingConfig
from common.quantization.attention_inputs import rounded_attention_inputs
from common.quantization.layers import quantized_layers

# Ultralytics' for Adam, which the published training takes over, and the transformers' for AdamW.
BETAS = {"adam": (0.937, 0.999), "adamw": (0.9, 0.999)}
FINAL_RATE = 0.01  # of each learning rate, at the end of the schedule
FIRST_RATE = 0.001  # of each learning rate, at the start of the warm-up, as mmdet's configurations
LONGEST_WARM_UP = 2000  # updates of the average, as Ultralytics
SMALLEST_GAMMA = 1e-6  # magnitude of a BatchNorm's scale that would have changed its sign


def learning_rates(config: TrainingConfig) -> dict[str, float]:
    """The learning rate of each of the `parameter_groups`."""
    return {
        "weights": config.learning_rate,
        "affine": config.affine_learning_rate,
        "scales": config.scale_learning_rate,
    }


def freeze(module: nn.Module, config: TrainingConfig) -> None:
    """Takes, in place, what has a learning rate of 0 out of training: no gradients, no part in the clipping norm."""
    rates = learning_rates(config)
    for kind, parameters in parameter_groups(module).items():
        for parameter in parameters.values():
            parameter.requires_grad_(rates[kind] > 0)


def parameter_groups(module: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Trainable parameters by name: `scales` (and offsets) of quantizers, `weights`, and `affine`, the vectors."""
    quantizers = {
        f"{name}.{side}_quantizer."
        for name in (*quantized_layers(module), *rounded_attention_inputs(module))
        for side in ("weight", "input")
    } | {f"tensor_quantizers.{key}." for key in getattr(module, "tensor_quantizers", ())}  # fmt: skip
    groups: dict[str, dict[str, nn.Parameter]] = {"weights": {}, "affine": {}, "scales": {}}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.rpartition(".")[0] + "." in quantizers:
            groups["scales"][name] = parameter
        else:
            groups["weights" if parameter.ndim > 1 else "affine"][name] = parameter
    return groups


class Optimizer:
    """Adam over the trainable parameters of a module.

    With `log_scale` Adam sees a leaf l = log(s) of each scale s, with the gradient s * d loss / d s; s = exp(l) stays
    positive. Without it a scale may pass zero; quantizers take its magnitude.

    The scale gamma of a BatchNorm keeps its sign. Where BatchNorm is folded into the layer before it, a channel's scale
    is multiplied by gamma, and another sign would ask for negated codes, of which signed integers have one too few.
    """

    def __init__(self, module: nn.Module, config: TrainingConfig) -> None:
        groups = parameter_groups(module)
        self._scales = groups["scales"]
        self._leaves: dict[str, nn.Parameter] = {}
        if config.log_scale:
            self._leaves = {n: nn.Parameter(p.detach().log()) for n, p in self._scales.items() if n.endswith(".scale")}
        trained = {name: self._leaves.get(name, p) for group in groups.values() for name, p in group.items()}
        gammas = (part.weight for part in module.modules() if isinstance(part, nn.BatchNorm2d))
        self._gammas = [(gamma, gamma.detach() < 0) for gamma in gammas if gamma is not None and gamma.requires_grad]
        rates = learning_rates(config)
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
        """One update from the gradients that are there, after `done` of the `total` updates of the training."""
        factor = rate_factor(self._config, done, total)
        for rate, group in zip(self._rates, self._adam.param_groups, strict=True):
            group["lr"] = rate * factor
        for name, leaf in self._leaves.items():
            scale = self._scales[name]
            leaf.grad = None if scale.grad is None else scale.grad * scale.detach()
        nn.utils.clip_grad_norm_([p for group in self._adam.param_groups for p in group["params"]], self._clip)
        self._adam.step()
        for name, leaf in self._leaves.items():
            self._scales[name].data.copy_(leaf.detach().exp())
        for gamma, negative in self._gammas:
            gamma.data.masked_fill_(negative & (gamma > 0), -SMALLEST_GAMMA)
            gamma.data.masked_fill_(~negative & (gamma < 0), SMALLEST_GAMMA)

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
