"""Adam, AdamW or SGD on weights, affine parameters and scales, each at its own rate, and the average of it all."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from common.config.schema import TrainingConfig
from common.quantization.layers import quantized_layers, rounded_attention_inputs

# Ultralytics' for Adam, which the published training takes over, and the transformers' for AdamW.
MOMENTUM = {"adam": 0.937, "adamw": 0.9, "sgd": 0.9}
SECOND_BETA = 0.999
FINAL_RATE = 0.01  # of each learning rate, at the end of the schedule
FIRST_RATE = 0.001  # of each learning rate, at the start of warm_up, as mmdet's configurations
SHORTEST_WARM_UP = 100  # batches of warmup_epochs, as Ultralytics
STEP = 0.1  # factor of each of the milestones
POSITIONS = ("*relative_position_bias_table", "*absolute_pos_embed")  # never decayed, as mmdet's configurations
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
    """Takes, in place, what is `frozen` or has a learning rate of 0 out of training: no gradients, no part in the
    clipping norm."""
    rates = learning_rates(config)
    for kind, parameters in parameter_groups(module).items():
        for name, parameter in parameters.items():
            fixed = any(fnmatchcase(name, pattern) for pattern in config.frozen)
            parameter.requires_grad_(rates[kind] > 0 and not fixed)


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


@dataclass(frozen=True)
class _Kind:
    """What the parameters of one group have in common."""

    rate: float
    decays: bool
    from_bias_rate: bool  # whether its warm-up starts at warmup_bias_rate


def _kinds(module: nn.Module, config: TrainingConfig) -> dict[str, _Kind]:
    """The kind of each trainable parameter by name, in the order of the `parameter_groups`."""
    norms = {
        f"{name}.{own}"
        for name, part in module.named_modules()
        if "Norm" in type(part).__name__
        for own, _ in part.named_parameters(recurse=False)
    }
    found, rates = {}, learning_rates(config)
    for group, parameters in parameter_groups(module).items():
        for name in parameters:
            is_bias = group == "affine" and name.endswith("bias")
            part = "norms" if name in norms else "biases" if group == "affine" else group
            fixed = any(fnmatchcase(name, pattern) for pattern in POSITIONS)
            decays = config.weight_decay > 0 and part in config.decayed and not fixed
            warm = is_bias and config.warmup_bias_rate > 0 and config.warmup_epochs > 0
            found[name] = _Kind(rates[group], decays, warm)
    return found


class Optimizer:
    """Adam or SGD over the trainable parameters of a module.

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
        kinds = _kinds(module, config)
        self._kinds = list(dict.fromkeys(kinds.values())) or [_Kind(0.0, False, False)]
        ordered = [[name for name in trained if kinds[name] == kind] for kind in self._kinds]
        self._names = [name for names in ordered for name in names]
        self._config = config
        self._clip = math.inf if config.gradient_clip is None else config.gradient_clip
        groups_of_torch = [
            {"params": [trained[name] for name in names], "weight_decay": config.weight_decay * kind.decays}
            for names, kind in zip(ordered, self._kinds, strict=True)
        ]
        self._torch = _make(groups_of_torch, config)

    def update(self, done: int, total: int) -> None:
        """One update from the gradients that are there, after `done` of the `total` batches of the training."""
        factor = rate_factor(self._config, done, total)
        warmed = warmed_up(self._config, done, total)
        for kind, group in zip(self._kinds, self._torch.param_groups, strict=True):
            group["lr"] = kind.rate * factor
            if kind.from_bias_rate:
                group["lr"] += self._config.warmup_bias_rate * (1 - warmed)
        for name, leaf in self._leaves.items():
            scale = self._scales[name]
            leaf.grad = None if scale.grad is None else scale.grad * scale.detach()
        nn.utils.clip_grad_norm_([p for group in self._torch.param_groups for p in group["params"]], self._clip)
        self._torch.step()
        for name, leaf in self._leaves.items():
            self._scales[name].data.copy_(leaf.detach().exp())
        for gamma, negative in self._gammas:
            gamma.data.masked_fill_(negative & (gamma > 0), -SMALLEST_GAMMA)
            gamma.data.masked_fill_(~negative & (gamma < 0), SMALLEST_GAMMA)

    def state(self) -> dict[str, Tensor]:
        """All that the next update depends on, besides the module."""
        state = {f"leaf.{name}": leaf.detach() for name, leaf in self._leaves.items()}
        for name, parameter in zip(self._names, self._parameters(), strict=True):
            for key, value in self._torch.state[parameter].items():
                if value is not None:
                    state[f"adam.{key}.{name}"] = value
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state` gave, in place.

        Raises:
            LookupError, RuntimeError: it is of another module.
        """
        for name, leaf in self._leaves.items():
            leaf.data.copy_(state[f"leaf.{name}"])
        for name, parameter in zip(self._names, self._parameters(), strict=True):
            kept = self._torch.state[parameter]
            for key in ("step", "exp_avg", "exp_avg_sq", "momentum_buffer"):
                if f"adam.{key}.{name}" in state:
                    value = state[f"adam.{key}.{name}"].clone()
                    if key != "step" and value.shape != parameter.shape:
                        raise LookupError(name)
                    kept[key] = value if key == "step" else value.to(parameter.device)

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self._torch.param_groups for p in group["params"]]


def _make(groups: list[dict[str, Any]], config: TrainingConfig) -> torch.optim.Optimizer:
    momentum = MOMENTUM[config.optimizer] if config.momentum is None else config.momentum
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=momentum)
    make = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return make(groups, betas=(momentum, SECOND_BETA))


def warmed_up(config: TrainingConfig, done: int, total: int) -> float:
    """How far `warmup_epochs` are, from 0 to 1, after `done` of `total` batches."""
    if not config.warmup_epochs:
        return 1.0
    length = max(round(config.warmup_epochs * total / config.epochs), SHORTEST_WARM_UP)
    return min(done / length, 1.0)


def accumulated(config: TrainingConfig, done: int, total: int) -> int:
    """Batches that make the update after `done` of `total` batches; during warmup_epochs they grow from 1."""
    return max(round(1 + (config.accumulate - 1) * warmed_up(config, done, total)), 1)


def rate_factor(config: TrainingConfig, done: int, total: int) -> float:
    """The factor of the learning rates after `done` of `total` batches: that of the schedule and, while it lasts, that
    of the warm-up, 1 - (1 - done / warm_up) (1 - 1/1000), as in mmcv, or from 0, as in Ultralytics."""
    warming = max(1 - done / config.warm_up, 0) if config.warm_up else 0.0
    factor = schedule(config, done, total) * (1 - warming * (1 - FIRST_RATE))
    return factor * warmed_up(config, done, total)


def schedule(config: TrainingConfig, done: int, total: int) -> float:
    """The factor of the learning rates without warm-up after `done` of `total` batches, from 1 to 1/100 unless it is
    constant or falls in steps."""
    kind, progress = config.schedule, done / total
    if kind == "constant":
        return 1.0
    epoch = done * config.epochs // total  # finished ones
    if kind == "steps":
        return STEP ** sum(epoch >= milestone for milestone in config.milestones)
    if kind == "linear_by_epoch":
        progress = epoch / config.epochs
    if kind != "cosine":
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
