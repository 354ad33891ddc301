"""A state fits its module in every name, shape and kind of number, and holds numbers that a forward pass survives."""

import pytest
import torch
from torch import nn

from common.checkpoints.read import as_float32, read_published
from common.checkpoints.state import building, load_state
from common.runtime.errors import UserError


def block():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def test_what_fits_is_loaded_and_counters_of_batch_norms_may_be_missing():
    state = {n: t + 1 for n, t in block().state_dict().items() if not n.endswith("num_batches_tracked")}
    module = block()
    load_state(module, state, "here", "this block")
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in state.items())


DAMAGE = {
    "missing": (lambda s: s.pop("1.bias"), "1.bias is missing"),
    "more": (lambda s: s.update(other=torch.ones(1)), "other belongs to something else"),
    "shape": (lambda s: s.update({"0.bias": torch.ones(4, 1)}), r"0.bias has the shape \[4, 1\] and not \[4\]"),
    "broadcast": (lambda s: s.update({"0.bias": torch.ones(1)}), r"0.bias has the shape \[1\]"),
    "integers": (
        lambda s: s.update({"0.bias": torch.ones(4, dtype=torch.int32)}),
        "0.bias holds int32 and not float32",
    ),
    "fractions": (lambda s: s.update({"1.num_batches_tracked": torch.ones(())}), "holds float32 and not int64"),
    "complex": (lambda s: s.update({"0.bias": torch.ones(4, dtype=torch.complex64)}), "0.bias holds complex64"),
    "nan": (lambda s: s["0.weight"].view(-1)[7:8].fill_(float("nan")), "0.weight holds NaN or infinity"),
    "infinity": (lambda s: s["1.running_var"][2:3].fill_(float("inf")), "1.running_var holds NaN or infinity"),
    "negative variance": (lambda s: s["1.running_var"][2:3].fill_(-1), "1.running_var holds a variance below 0"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_does_not_fit_is_named(kind):
    state = {name: tensor.clone() for name, tensor in block().state_dict().items()}
    change, message = DAMAGE[kind]
    change(state)
    with pytest.raises(UserError, match=message) as caught:
        load_state(block(), state, "here", "this block")
    assert str(caught.value).startswith("here: ")


def test_counters_are_missing_together_or_not_at_all():
    module = nn.Sequential(block(), block())
    state = module.state_dict()
    del state["0.1.num_batches_tracked"]
    with pytest.raises(UserError, match=r"0\.1\.num_batches_tracked is missing"):
        load_state(module, state, "here", "these blocks")
    del state["1.1.num_batches_tracked"]
    load_state(module, state, "here", "these blocks")


def test_what_overflows_on_the_way_to_float32_is_named_too():
    state = as_float32({n: t.double() if t.is_floating_point() else t for n, t in block().state_dict().items()})
    load_state(block(), state, "here", "this block")
    state = {"0.weight": torch.full((4, 3, 3, 3), 1e300, dtype=torch.float64)}
    with pytest.raises(UserError, match="NaN or infinity"):
        load_state(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False)), as_float32(state), "here", "this block")


def test_a_constructor_that_refuses_is_one_line():
    with (
        pytest.raises(UserError, match=r"here: cannot be built \(.*\); give the checkpoint") as caught,
        building("here"),
    ):
        nn.Conv2d(3, 4, 3, groups=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_torchvisions_reference_training_is_read_with_all_that_is_beside_the_weights(zipped, tmp_path):
    import argparse

    from torch.optim import SGD
    from torch.optim.lr_scheduler import MultiStepLR

    module = block()
    optimizer = SGD(module.parameters(), 0.02, momentum=0.9)
    module(torch.rand(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    schedule = MultiStepLR(optimizer, [16, 22])
    content = {
        "model": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "args": argparse.Namespace(model="maskrcnn_resnet50_fpn", lr_steps=[16, 22], device="cuda"),
        "epoch": 25,
        "scaler": torch.amp.GradScaler(enabled=False).state_dict(),
    }
    torch.save(content, tmp_path / "model_25.pth", _use_new_zipfile_serialization=zipped)
    state, _ = read_published(tmp_path / "model_25.pth")
    assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())


def test_a_file_of_mmengine_is_read_with_its_history(tmp_path):
    from mmengine.logging import HistoryBuffer, MessageHub

    hub = MessageHub.get_instance("test of checkpoints")
    hub.update_scalar("train/loss", 0.5)
    hub.update_info("epoch", 3)
    content = {
        "meta": {"epoch": 3, "dataset_meta": {"classes": ("ant", "bee")}, "cfg": "model = dict()"},
        "state_dict": block().state_dict(),
        "message_hub": hub.state_dict(),
        "more": HistoryBuffer([1.0, 2.0], [1, 1]),
    }
    torch.save(content, tmp_path / "epoch_3.pth")
    state, meta = read_published(tmp_path / "epoch_3.pth")
    assert len(state) == 7
    assert meta["dataset_meta"]["classes"] == ("ant", "bee")


@pytest.mark.parametrize("wrap", ["DataParallel", "AveragedModel", "both", "half"])
def test_what_wraps_a_state_is_taken_off(wrap, tmp_path):
    module = block()
    wrapped = {
        "DataParallel": lambda: nn.DataParallel(module),
        "AveragedModel": lambda: torch.optim.swa_utils.AveragedModel(module),
        "both": lambda: torch.optim.swa_utils.AveragedModel(nn.DataParallel(module)),
        "half": lambda: block().half(),
    }[wrap]()
    torch.save({"state_dict": wrapped.state_dict()}, tmp_path / "a.pth")
    state, _ = read_published(tmp_path / "a.pth")
    assert state.keys() == module.state_dict().keys()
    assert all(t.dtype in (torch.float32, torch.int64) for t in state.values())
    if wrap != "half":
        assert torch.equal(state["0.weight"], module.state_dict()["0.weight"])


def test_a_whole_pickled_model_is_refused_with_what_to_do(tmp_path):
    torch.save({"model": block()}, tmp_path / "a.pth")
    with pytest.raises(
        UserError, match=r"holds a whole torch\.nn\.modules\.container\.Sequential; give a file of its st"
    ):
        read_published(tmp_path / "a.pth")
