"""What a pickled network says about itself, against the one that was rebuilt from its YAML."""

from collections.abc import Collection, Mapping
from inspect import isfunction
from typing import Any

import torch
from torch import Tensor, nn

from common.checkpoints.read import Checkpoint
from common.checkpoints.strict_json import class_list, short
from common.checkpoints.unpickle import Inert, Name
from common.checkpoints.yolo_architecture import DEFAULT, pickled_activation
from common.runtime.errors import UserError

# All plain attributes of modules are compared, but those below; of the blocks of Ultralytics and YOLOv5 these as well,
# which a class has until an object sets them.
OF_CLASSES = ("add", "xyxy", "reg_max", "f")
WITHOUT_EFFECT = ("training", "inplace", "momentum", "return_indices", "recompute_scale_factor")
# Written by Ultralytics' parser: the number of parameters, the layer, its class, which outputs are kept.
NOTES = ("np", "i", "type", "save")
TORCH, BLOCKS = "torch.nn.modules.", ("ultralytics.nn.", "models.common.", "models.yolo.")  # where classes are
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
FORWARD = ("forward", "_forward_once", "forward_once")  # whatever is in them
SAME_CLASS = {"AnchorHead": "Detect"}


def described(checkpoint: Checkpoint, keys: Collection[str] | None = None) -> dict[str, Any]:
    """The architecture of a pickled YOLO, not checked yet: {"yaml": those keys of its YAML, "names": [...]}.

    Its activation is that of the pickled modules, whatever the YAML says.

    Raises:
        UserError: a missing key, names that are no list of classes, a fused model, or activations that are not known.
    """
    yaml, names = (
        checkpoint.attributes.get("yaml"),
        class_list(checkpoint.attributes.get("names"), str(checkpoint.path)),
    )
    if not isinstance(yaml, dict):
        raise UserError(f"{checkpoint.path}: holds no YAML of its network; give the file that training wrote")
    if missing := sorted(set(keys or ()) - yaml.keys()):
        raise UserError(f"{checkpoint.path}: another network, whose YAML lacks {', '.join(missing)}")
    activation = _activation(checkpoint)
    found = {key: yaml[key] for key in (yaml if keys is None else keys)} | {"nc": len(names)}
    if activation and (activation != DEFAULT or "activation" in found):
        found["activation"] = activation
    return {"yaml": found, "names": names}


def check_rebuilt(
    checkpoint: Checkpoint, module: nn.Module, strides: tuple[int, ...], modules: Mapping[str, Inert]
) -> None:
    """Compares kinds, settings and parts of all layers, and the strides, with those that were pickled.

    Args:
        checkpoint: what was pickled.
        module: what was rebuilt.
        strides: of its head.
        modules: those of `checkpoint` that are used, under their names in `module`.

    Raises:
        UserError: the first difference: what was rebuilt would compute something else.
    """
    for name, pickled in modules.items():
        if hook := next((key for key in HOOKS if pickled.attributes.get(key)), None):
            raise _differs(checkpoint, name, f"has {hook}", "none")
    children = _children(modules)
    for name, part in module.named_modules(remove_duplicate=False):  # one activation serves many blocks
        pickled = modules[name]  # it is there: those around it have been compared
        if method := _replaced(part, pickled):
            raise _differs(checkpoint, name, f"has a function {method} of its own", f"that of {type(part).__name__}")
        if name and not _same_kind(part, pickled):
            raise _differs(checkpoint, name, f"is a {pickled.pickled_class}", f"a {type(part).__name__}")
        own, found = [key for key, child in part._modules.items() if child is not None], children[name]
        # those of other modules than these two are called by name, in whatever order they stand
        if found != own if isinstance(part, nn.Sequential | nn.ModuleList) else set(found) != set(own):
            raise _differs(checkpoint, name, f"has {_listed(found)} in it", _listed(own))
        for setting, wanted in _settings(part).items():
            value = pickled.attributes.get(setting, wanted)
            if name and _comparable(value) != _comparable(wanted):
                raise _differs(checkpoint, name, f"has {setting} {_shown(value)}", _shown(wanted))
    stored = checkpoint.head.attributes.get("stride") if checkpoint.head else None
    if stored is not None and _comparable(stored) != strides:
        raise _differs(checkpoint, "the head", f"has strides {_shown(stored)}", f"strides {list(strides)}")


def _children(modules: Mapping[str, Inert]) -> dict[str, list[str]]:
    """The names of the modules directly in each one, in their order."""
    found: dict[str, list[str]] = {name: [] for name in modules}
    for name in modules:
        parent, _, own = name.rpartition(".")
        if name:
            found[parent].append(own)
    return found


def _same_kind(part: nn.Module, pickled: Inert) -> bool:
    """Whether the pickled class is the one of that name of torch, or of Ultralytics or YOLOv5."""
    own, (where, _, kind) = type(part), pickled.pickled_class.rpartition(".")
    known = TORCH if own.__module__.startswith(TORCH) else BLOCKS
    return f"{where}.".startswith(known) and SAME_CLASS.get(own.__name__, own.__name__) == kind


def _replaced(part: nn.Module, pickled: Inert) -> str | None:
    """The name of a function that the pickled object has in the place of that of its class."""
    for key, value in pickled.attributes.items():
        taken = isinstance(value, Inert | Name) and isfunction(getattr(type(part), key, None))
        if taken or key in FORWARD:
            return key
    return None


def _activation(checkpoint: Checkpoint) -> str | None:
    """The activation of the blocks of convolution and BatchNorm; None where none has one."""
    found: dict[str, str] = {}
    for name, part in checkpoint.modules.items():
        children = part.attributes.get("_modules")
        if not isinstance(children, dict) or not isinstance(children.get("conv"), Inert):
            continue
        plain = children["conv"].pickled_class.endswith(".Conv2d")
        if plain and "act" in children and not isinstance(children.get("bn"), Inert):
            raise UserError(
                f"{checkpoint.path}: a fused model ({name} has no BatchNorm any more), and images are made from its "
                "statistics; give the file that training wrote, before fuse() or export"
            )
        act = children.get("act")
        if not isinstance(act, Inert) or act.pickled_class.endswith(".Identity"):
            continue
        try:
            found.setdefault(pickled_activation(act), name)
        except ValueError as error:
            raise UserError(
                f"{checkpoint.path}: {name} has the activation {act.pickled_class}, which is {error}"
            ) from error
    if len(found) > 1:
        places = ", ".join(f"{kind} in {name}" for kind, name in list(found.items())[:2])
        raise UserError(f"{checkpoint.path}: has several activations ({places}); needed is one for all convolutions")
    return next(iter(found), None)


def _settings(part: nn.Module) -> Mapping[str, Any]:
    """What the object computes with beside its weights and the modules in it."""
    found = {k: v for k, v in vars(part).items() if not k.startswith("_")}
    if not type(part).__module__.startswith("torch.nn."):
        found |= {k: getattr(part, k) for k in OF_CLASSES if hasattr(part, k)}
    return {k: v for k, v in found.items() if k not in (*WITHOUT_EFFECT, *NOTES) and _is_plain(v)}


def _is_plain(value: Any) -> bool:
    parts = value if isinstance(value, tuple | list) else (value,)
    return all(part is None or isinstance(part, str | int | float) for part in parts)


def _comparable(value: Any) -> Any:
    value = value.tolist() if isinstance(value, Tensor) else value
    return tuple(value) if isinstance(value, list | tuple | torch.Size) else value


def _listed(names: list[str]) -> str:
    text = ", ".join(names) or "nothing"
    return text if len(text) <= 62 else f"{text[:59]}..."


def _shown(value: Any) -> str:
    """A setting for a message: a size or padding as it is, if it is short."""
    value = value.tolist() if isinstance(value, Tensor) else value
    flat = isinstance(value, list | tuple) and len(value) <= 8 and _is_plain(value)
    return "[" + ", ".join(map(short, value)) + "]" if flat else short(value)


def _differs(checkpoint: Checkpoint, name: str, found: str, rebuilt: str) -> UserError:
    return UserError(
        f"{checkpoint.path}: {name or 'the network'} {found}, and its YAML says {rebuilt}; a network that was changed "
        "after it was built cannot be rebuilt"
    )
