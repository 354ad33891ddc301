"""A state that has been read goes into the module that it belongs to, and into no other."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from common.runtime.errors import UserError

LONGEST_CODES, LARGEST_CODE = 1 << 16, 1 << 16
COUNTER = "num_batches_tracked"
BINS = "dfl.conv.weight"  # of Ultralytics' heads, which their exports and ours write as fixed numbers


@contextlib.contextmanager
def building(where: str) -> Iterator[None]:
    """Inside, what a constructor says about arguments that do not go together becomes one line.

    Raises:
        UserError: in the place of such an error.
    """
    try:
        yield
    except (TypeError, ValueError, LookupError, ArithmeticError, AssertionError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"{where}: cannot be built ({reason}); give the checkpoint as it was trained") from error


def load_state(module: nn.Module, state: Mapping[str, Tensor], where: str, what: str) -> None:
    """Loads `state` where names, shapes and kinds of all tensors are those of `module` and all numbers are finite.

    Only the counters of BatchNorms (`num_batches_tracked`) may be missing, all of them, as frozen ones have none.

    Args:
        module: changed in place.
        state: from a file.
        where: what the message begins with.
        what: the module, for messages.

    Raises:
        UserError: the first tensor that does not fit, by name.
    """
    own = module.state_dict()
    frozen = not any(n.endswith(COUNTER) for n in state)
    missing = [n for n in own if n not in state and not (frozen and n.endswith(COUNTER))]
    problem = next((f"{name} is missing" for name in missing), None)
    problem = problem or next((f"{name} belongs to something else" for name in state if name not in own), None)
    problem = problem or next((text for name in state if (text := _difference(name, state[name], own[name]))), None)
    if problem:
        raise UserError(f"{where}: its tensors do not fit {what} ({problem}); give the file that belongs to it")
    check_numbers(state, where)
    try:
        module.load_state_dict(state, strict=False)
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        raise UserError(f"{where}: its tensors do not fit {what} ({' '.join(str(error).split())[:160]})") from error
    taken = module.state_dict()
    for name in state:
        if name.endswith("_extra_state") and not torch.equal(taken[name], state[name]):
            raise UserError(f"{where}: its tensors do not fit {what} ({name} holds other codes than can be taken over)")


def check_numbers(state: Mapping[str, Tensor], where: str) -> None:
    """Refuses numbers that no forward pass survives.

    Raises:
        UserError: NaN or infinity, a variance below 0, or bins of a head that are not fixed, with the tensor's name.
    """
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise UserError(f"{where}: {name} holds NaN or infinity; give a checkpoint whose training did not diverge")
        if "quantizer" in name and name.endswith(".scale") and (tensor == 0).any():
            raise UserError(f"{where}: {name} holds a scale of 0; the file is damaged, make it again")
        if name.endswith("running_var") and (tensor < 0).any():
            raise UserError(f"{where}: {name} holds a variance below 0; the file is damaged, fetch it again")
        if name.endswith(BINS) and not torch.equal(tensor.flatten().float(), torch.arange(tensor.numel()).float()):
            raise UserError(f"{where}: {name} holds other bins than 0, 1, 2, ..., which no training changes")


def _difference(name: str, found: Tensor, wanted: object) -> str | None:
    if name.endswith("_extra_state"):  # codes of a quantizer
        fits = not found.is_floating_point() and found.numel() <= LONGEST_CODES and (found.abs() <= LARGEST_CODE).all()
        return None if fits else f"{name} holds no codes"
    if not isinstance(wanted, Tensor):
        return f"{name} is no tensor in it"
    if found.shape != wanted.shape:
        return f"{name} has the shape {list(found.shape)} and not {list(wanted.shape)}"
    if found.is_floating_point() != wanted.is_floating_point() or found.is_complex():
        return f"{name} holds {found.dtype} and not {wanted.dtype}".replace("torch.", "")
    return None
