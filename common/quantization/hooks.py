"""Looks at what flows through a module while it runs."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.detection.detector import Detector
from common.detection.types import HeadOutput

SAMPLED_VALUES = 2**16  # of a layer's input, over all batches

Feed = Callable[[nn.Module], HeadOutput]  # runs one batch of images through a module


@torch.no_grad()
def feeds(detector: Detector, teacher: nn.Module, batches: Sequence[Tensor]) -> list[Feed]:
    """A feed for each batch of images [B, 3, H, W]; whatever module it runs gets the teacher's proposals, if any."""

    def feed(images: Tensor, proposals: object) -> Feed:
        return lambda module: detector.head_output(module, images, None, proposals)

    runs, proposes = [], True
    for images in batches:
        proposals = detector.head_output(teacher, images).proposals if proposes else None
        proposes = proposals is not None  # a detector has them for all batches or for none
        runs.append(feed(images, proposals))
    return runs


@contextlib.contextmanager
def watching(
    module: nn.Module, names: Iterable[str], inputs: Callable[[str, Tensor], None] | None = None,
    outputs: Callable[[str, Tensor], None] | None = None,
) -> Iterator[None]:  # fmt: skip
    """Inside, the first input and the output of each named submodule are reported."""
    handles = []
    for name in names:
        part = module.get_submodule(name)

        def before(_: nn.Module, arguments: tuple[Any, ...], name: str = name) -> None:
            if inputs is not None:
                inputs(name, arguments[0])

        def after(_: nn.Module, arguments: Any, result: Tensor, name: str = name) -> None:
            if outputs is not None:
                outputs(name, result)

        handles += [part.register_forward_pre_hook(before), part.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def overwritten(module: nn.Module, names: Sequence[str], run: Feed) -> set[str]:
    """Those of the named layers whose output is changed in place by what follows, as `out += identity` does."""
    kept: list[tuple[str, Tensor, int]] = []
    with watching(module, names, outputs=lambda name, x: kept.append((name, x, x._version))):
        run(module)
    return {name for name, x, version in kept if x._version != version}


class Sampler:
    """Draws values of named tensors evenly over batches, and keeps the smallest and the largest of all."""

    def __init__(self, batches: int) -> None:
        self._share = -(-SAMPLED_VALUES // batches)
        self._parts: dict[str, list[Tensor]] = {}
        self._generator = torch.Generator().manual_seed(0)

    def take(self, name: str, x: Tensor) -> None:
        """Draws from a tensor of any shape."""
        flat = x.flatten()
        chosen = torch.randint(len(flat), (min(self._share, len(flat)),), generator=self._generator).to(x.device)
        self._parts.setdefault(name, []).append(torch.cat([flat[chosen], torch.stack(flat.aminmax())]).float())

    def values(self) -> dict[str, Tensor]:
        """What was drawn, [n] for each name."""
        return {name: torch.cat(parts) for name, parts in self._parts.items()}


@torch.no_grad()
def sample_inputs(module: nn.Module, names: Sequence[str], batches: Sequence[Feed]) -> dict[str, Tensor]:
    """Values of each named layer's input, drawn evenly over the batches, with the smallest and the largest of all."""
    sampler = Sampler(len(batches))
    with watching(module, names, inputs=sampler.take):
        for run in batches:
            run(module)
    return sampler.values()


@torch.no_grad()
def relative_errors(
    teacher: nn.Module, student: nn.Module, names: Sequence[str], batches: Sequence[Feed]
) -> dict[str, float]:
    """Squared error of the student's outputs over the teacher's squared outputs, for each named layer."""
    # A layer may run at several levels, and what follows it may overwrite its output in place.
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    error, power = (dict.fromkeys(names, 0.0) for _ in range(2))

    def compare(name: str, x: Tensor) -> None:
        reference = kept[name].pop(0)
        error[name] += float((x - reference).square().sum())
        power[name] += float(reference.square().sum())

    for run in batches:
        with watching(teacher, names, outputs=lambda name, x: kept[name].append(x.clone())):
            run(teacher)
        with watching(student, names, outputs=compare):
            run(student)
    return {name: error[name] / power[name] if power[name] else 0.0 for name in names}
