"""Quantizers of the tensors between layers: the placement of an engine that keeps whole graphs in 8 bits.

The rules stand here alone. ONNX Runtime computes an operator in integers only where its inputs come out of a
DequantizeLinear and its output goes into one QuantizeLinear (its "QDQ" format; onnxruntime.ai, "Quantize ONNX Models").
So in this placement every output of a quantized layer, SiLU (as sigmoid and product), ReLU, sum and concatenation has a
quantizer, and what only moves values (pooling, nearest upsampling, slices, views) keeps the one of its input.
"""

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from common.detection.detector import Detector
from common.runtime.environment import temporarily

Visit = Callable[[str, Tensor], Tensor]  # the name of a tensor and its values, to what takes their place

MOVES = {
    *("max_pool2d", "interpolate", "chunk", "split", "__getitem__", "view", "reshape", "flatten", "unflatten"),
    *("permute", "transpose", "contiguous", "clone", "squeeze", "unsqueeze", "tensor_split", "unbind", "dropout"),
    *("_max_pool2d", "max_pool2d_with_indices", "boolean_dispatch", "unsafe_split", "select", "narrow"),
}
SUMS = {"add", "add_", "__add__", "__iadd__", "__radd__"}
JOINS = {"cat", "concat", "concatenate"}
RELUS = {"relu", "relu_", "relu6", "hardtanh"}
KEEPS = {"batch_norm", "type", "to", "float"}  # a layer's output stays one
SIGMOID = "sigmoid"  # last part of the name of a tensor with the fixed range of a sigmoid


class Tensors(TorchFunctionMode):
    """Inside, functions are followed, and `visit` sees every tensor that has a quantizer in this placement.

    A tensor is known by an attribute: `_origin` is the layer it came out of while it may still get a quantizer, and
    `_quantizer` the name of the one it has.
    """

    def __init__(self, visit: Visit, *, repeat: bool = False) -> None:
        """`repeat`: what only moves values is visited again, as a graph of QuantizeLinear nodes needs it."""
        super().__init__()
        self.visit, self.repeat = visit, repeat
        self.gated: set[str] = set()  # names of the tensors that a SiLU reads
        self.joined: list[list[str]] = []  # names of the parts of each concatenation, and of what it makes
        self.path: list[tuple[str, Counter[str]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if name == "silu" and self._known(args[0]):
            return self._silu(args[0])
        if name in SUMS and all(isinstance(x, Tensor) and self._known(x) for x in args[:2]):
            # Never in place: what is read here may be read again.
            return self._new("add", torch.add(*(self._rounded(x) for x in args[:2]), **kwargs))
        if name in JOINS and all(self._known(x) for x in args[0]):
            parts = [self._rounded(x) for x in args[0]]
            out = self._new("concat", func(parts, *args[1:], **kwargs))
            self.joined.append([x._quantizer for x in (*parts, out)])  # type: ignore[attr-defined]
            return out
        if name in RELUS and self._known(args[0]):
            return self._new("relu", func(*args, **kwargs))
        if name in MOVES and args and isinstance(args[0], Tensor) and self._known(args[0]) and not _blends(kwargs):
            x = self._rounded(args[0])
            return self._moved(x, func(x, *args[1:], **kwargs))
        out = func(*args, **kwargs)
        if name in KEEPS and args and isinstance(args[0], Tensor) and isinstance(out, Tensor):
            _mark(out, "_origin", getattr(args[0], "_origin", None))
            _mark(out, "_quantizer", None)
        return out

    def _known(self, x: Tensor) -> bool:
        return getattr(x, "_quantizer", None) is not None or getattr(x, "_origin", None) is not None

    def _rounded(self, x: Tensor) -> Tensor:
        """The tensor on its grid; a layer's output gets its quantizer when the first one reads it."""
        if getattr(x, "_quantizer", None) is not None:
            return x
        rounded = getattr(x, "_rounded", None)
        if rounded is None:
            name = f"{x._origin}/output"  # type: ignore[attr-defined]
            rounded = _mark(self.visit(name, x), "_quantizer", name)
            x._rounded = rounded  # type: ignore[attr-defined]
        return rounded

    def _silu(self, x: Tensor) -> Tensor:
        x = self._rounded(x)
        self.gated.add(x._quantizer)  # type: ignore[attr-defined]
        name = self._name("silu")
        gate = self.visit(f"{name}/{SIGMOID}", torch.sigmoid(x))
        return _mark(self.visit(name, x * gate), "_quantizer", name)

    def _new(self, kind: str, out: Tensor) -> Tensor:
        name = self._name(kind)
        return _mark(self.visit(name, out), "_quantizer", name)

    def _moved(self, x: Tensor, out: Any) -> Any:
        name = x._quantizer  # type: ignore[attr-defined]
        if isinstance(out, tuple | list):
            return type(out)(self._moved(x, part) for part in out)
        return _mark(self.visit(name, out) if self.repeat else out, "_quantizer", name)

    def _name(self, kind: str) -> str:
        """The operator by the module it stands in, as in `model.4.m.0/add`; the second one of a kind has a number."""
        module, counts = self.path[-1]
        counts[kind] += 1
        return f"{module}/{kind}" + (f"_{counts[kind] - 1}" if counts[kind] > 1 else "")


def _mark(x: Tensor, name: str, value: str | None) -> Tensor:
    setattr(x, name, value)
    return x


def _blends(kwargs: dict[str, Any]) -> bool:
    """Whether an interpolation makes new values."""
    return kwargs.get("mode", "nearest") not in ("nearest", "nearest-exact")


@contextlib.contextmanager
def followed(module: nn.Module, layers: set[str], mode: Tensors) -> Iterator[None]:
    """Inside, whatever part of `module` runs is followed by `mode`; `layers` are the names of the quantized ones."""
    handles = []
    places = Counter(id(part) for _, part in module.named_modules(remove_duplicate=False))
    for name, part in module.named_modules():
        # One activation that stands in many places, as Ultralytics' default one, is known by whoever calls it.
        own = name.rpartition(".")[2] if places[id(part)] > 1 else None

        def enter(_: nn.Module, __: Any, name: str = name, own: str | None = own) -> None:
            if not mode.path:
                mode.__enter__()
            elif own is not None:
                name = f"{mode.path[-1][0]}.{own}"
            mode.path.append((name, Counter()))

        def leave(_: nn.Module, __: Any, out: Any, name: str = name) -> None:
            mode.path.pop()
            if not mode.path:
                mode.__exit__(None, None, None)
            if name in layers:
                _mark(out, "_origin", name)
                _mark(out, "_quantizer", None)

        handles += [part.register_forward_pre_hook(enter), part.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class TensorQuantizers(nn.ModuleDict):
    """The quantizers of the tensors between layers, an attribute `tensor_quantizers` of the quantized module."""

    def __init__(self, quantizers: Mapping[str, nn.Module], layers: Iterable[str]) -> None:
        """`quantizers` by the name of their tensor; `layers` are the quantized ones, whose outputs are followed."""
        super().__init__({tensor_key(name): quantizer for name, quantizer in quantizers.items()})
        self.layers = tuple(layers)
        self.observe: Visit | None = None  # sees the tensors in the place of the quantizers
        self.active = False
        for name, quantizer in quantizers.items():
            if name.endswith(f"/{SIGMOID}"):
                quantizer.requires_grad_(False)  # its range is known

    def visit(self, name: str, x: Tensor) -> Tensor:
        """The tensor of this name through its quantizer."""
        return self[tensor_key(name)](x) if self.observe is None else self.observe(name, x)

    def of(self, name: str) -> Any:
        """The quantizer of a tensor."""
        return self[tensor_key(name)]


@contextlib.contextmanager
def placed(module: nn.Module, *, repeat: bool = False) -> Iterator[None]:
    """Inside, the tensors of `module` pass their quantizers, where it has any; `repeat` as in `Tensors`."""
    tensors: Any = getattr(module, "tensor_quantizers", None)
    if tensors is None or tensors.active:
        yield
        return
    with (
        temporarily(tensors, active=True),
        followed(module, set(tensors.layers), Tensors(tensors.visit, repeat=repeat)),
    ):
        yield


def with_tensors(detector: Detector) -> Detector:
    """The detector with its module's tensors quantized where the module has quantizers for them."""
    wrapped: Any = copy.copy(detector)
    for name in ("head_output", "detect"):
        setattr(wrapped, name, partial(_inside_placed, getattr(detector, name)))  # a detector can be pickled
    return wrapped


def _inside_placed(method: Callable[..., Any], module: nn.Module, *arguments: Any, **options: Any) -> Any:
    with placed(module):
        return method(module, *arguments, **options)


def tensor_key(name: str) -> str:
    """The name of a tensor's quantizer among `tensor_quantizers`, as a module may have it: without dots."""
    return name.replace(".", ":")
