"""Files that would take all memory, all time or the stack are refused at once, in one line."""

import json
import struct
import time

import pytest
import torch
from hostile import forge
from hostile.forge import PROTO, STOP, call, inside_checkpoint, name, text
from test_code_in_files import quantized

from common.checkpoints.archive import read_pickled
from common.detection.detector import load_detector
from common.quantization import load_quantized, saved_plan
from common.runtime.errors import UserError


@pytest.fixture(autouse=True)
def _quick():
    start = time.perf_counter()
    yield
    assert time.perf_counter() - start < 30


def refused(path, family="yolo11", match=r"\w"):
    with pytest.raises(UserError, match=match) as caught:
        load_detector(family, path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def module(kind, children=b""):
    """The instructions for a module with that content of `_modules`."""
    return name("torch.nn.modules.container", kind) + b")\x81}" + text("_modules") + b"}" + children + b"sb"


PICKLES = {
    "index of the memo": b"Nr\xff\xff\xff\xff",
    "length of bytes": b"\x8e" + struct.pack("<Q", 1 << 62) + b"x",
    "length of a text": b"\x8d" + struct.pack("<Q", 1 << 40) + b"x",
    "length of an integer": b"\x8b" + struct.pack("<i", 1 << 30) + b"x",
    "long integer": b"\x8b" + struct.pack("<i", 100_000) + b"\x7f" * 100_000,
    "decimal integer": b"L" + b"9" * 100_000 + b"L\n",
    "deep tuple as a key": b"}" + b")" + b"\x85" * 60_000 + b"Ns",
    "deep tuple in a set": b"\x8f(" + b")" + b"\x85" * 60_000 + b"\x90",
    "deep tuple": b")" + b"\x85" * 60_000,
    "many marks": b"(" * 60_000,
    "list in itself": b"]q\x00h\x00a",
    "dictionary in itself": b"}q\x00" + text("_modules") + b"h\x00s",
    "module in itself": name("torch.nn.modules.container", "Sequential")
    + b")\x81q\x00}"
    + text("_modules")
    + b"}"
    + text("0")
    + b"h\x00ssb",
    "nothing": b"",
    "no end": b"N" * 10,
    "stack empty": b"0" * 10,
    "unknown memo": b"h\x07",
    "frame": b"\x95" + struct.pack("<Q", 1 << 60) + b"N",
}


@pytest.mark.parametrize("old", [False, True], ids=["archive", "old file"])
@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_that_claims_too_much_is_refused_at_once(kind, old, tmp_path):
    content = inside_checkpoint(PICKLES[kind])
    path = (forge.old_file if old else forge.archive)(tmp_path / "bad.pt", content)
    refused(path)
    refused(path, "resnet")


def test_modules_that_share_parts_do_not_make_a_walk_of_billions(tmp_path):
    """Each level holds the level below twice."""
    content = module("Identity") + b"q\x00"
    for level in range(1, 60):
        got = b"j" + struct.pack("<I", level - 1)
        content += b"0" + module("Sequential", text("a") + got + b"s" + text("b") + got + b"s")
        content += b"r" + struct.pack("<I", level)
    refused(forge.archive(tmp_path / "bad.pt", inside_checkpoint(content)), match="contains itself, or .* far too many")


def test_a_pickle_of_endless_instructions_stops_at_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("common.checkpoints.unpickle.INSTRUCTIONS", 1000)
    refused(forge.archive(tmp_path / "bad.pt", inside_checkpoint(b"N0" * 1000)), match="more than 1000 instructions")


def storage(kind, key, count):
    return b"(" + text("storage") + name("torch", kind) + text(key) + text("cpu") + count + b"tQ"


def tensor(count, size, stride, offset=b"K\x00", kind="FloatStorage"):
    made = storage(kind, "0", count) + offset + b"(" + size + b"t(" + stride + b"t" + b"\x89" + b"}"
    return call("torch._utils", "_rebuild_tensor_v2", made)


BIG = b"\x8a\x08" + struct.pack("<q", 1 << 50)
TENSORS = {
    "stride 0": tensor(b"K\x04", BIG + BIG, b"K\x00K\x00"),
    "larger than its storage": tensor(b"K\x04", b"K\x05", b"K\x01"),
    "behind its storage": tensor(b"K\x04", b"K\x02", b"K\x01", b"K\x03"),
    "negative stride": tensor(b"K\x04", b"K\x02", b"J\xff\xff\xff\xff", b"K\x03"),
    "negative size": tensor(b"K\x04", b"J\xff\xff\xff\xff", b"K\x01"),
    "negative offset": tensor(b"K\x04", b"K\x02", b"K\x01", b"J\xff\xff\xff\xff"),
    "more than is stored": tensor(BIG, BIG, b"K\x01"),
    "other kind of number": tensor(b"K\x04", b"K\x04", b"K\x01", kind="DoubleStorage"),
    "truth as a size": tensor(b"K\x04", b"\x88", b"K\x01"),
    "fractions as a size": tensor(b"K\x04", b"G?\xf0\x00\x00\x00\x00\x00\x00", b"K\x01"),
    "no storage": call("torch._utils", "_rebuild_tensor_v2", b"NK\x00(t(t\x89}"),
    "storage out of the folder": call(
        "torch._utils", "_rebuild_tensor_v2", storage("FloatStorage", "../version", b"K\x01") + b"K\x00(t(t\x89}"
    ),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_a_tensor_is_a_part_of_its_storage_or_refused(kind, tmp_path):
    good = PROTO + tensor(b"K\x04", b"K\x02K\x02", b"K\x02K\x01") + STOP
    numbers = {"archive/data/0": struct.pack("<4f", 1, 2, 3, 4)}
    assert read_pickled(forge.archive(tmp_path / "good.pt", good, numbers)).tolist() == [[1, 2], [3, 4]]
    path = forge.archive(tmp_path / "bad.pt", PROTO + TENSORS[kind] + STOP, numbers)
    with pytest.raises(UserError, match="damaged checkpoint") as caught:
        read_pickled(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda t: torch._neg_view(t), []),
        (lambda t: torch.complex(t, t).conj().imag, []),
        (lambda t: t[:1, :1].expand(3, 2), []),
        (lambda t: t[:1, :1].expand(2**9, 2**9), ["larger than its storage"]),
        (lambda t: torch.complex(t, t).conj(), ["refused|damaged"]),
    ],
    ids=["negative", "imaginary part", "expanded", "expanded too far", "complex"],
)
def test_a_view_is_read_as_torch_reads_it_or_refused(tmp_path, change, names):
    view = change(torch.arange(6.0).view(3, 2) + 1)
    torch.save({"w": view}, tmp_path / "a.pth")
    if names:
        with pytest.raises(UserError, match=names[0]):
            read_pickled(tmp_path / "a.pth")
    else:
        assert torch.equal(read_pickled(tmp_path / "a.pth")["w"], view.resolve_neg())


def test_an_old_file_that_claims_a_petabyte_allocates_nothing(tmp_path):
    path = forge.old_file(tmp_path / "bad.pt", PROTO + TENSORS["more than is stored"] + STOP, ("0",))
    with pytest.raises(UserError, match="larger than the file"):
        read_pickled(path)


def test_every_flipped_byte_of_the_contents_of_an_archive_is_noticed(tmp_path):
    torch.save({"state_dict": {"w": torch.arange(64.0)}}, tmp_path / "a.pth")
    content = (tmp_path / "a.pth").read_bytes()
    start = content.index(struct.pack("<4f", 0, 1, 2, 3))
    for at in (start, start + 7, start + 255, content.index(b"state_dict")):
        changed = bytearray(content)
        changed[at] ^= 0x10
        (tmp_path / "b.pth").write_bytes(changed)
        with pytest.raises(UserError, match="Bad CRC-32"):
            read_pickled(tmp_path / "b.pth")


def layers(*rows):
    def change(about):
        about["architecture"]["yaml"]["backbone"][: len(rows)] = [list(row) for row in rows]

    return change


def setting(**values):
    return lambda about: about["architecture"]["yaml"].update(values)


def naming(names):
    return lambda about: about["architecture"].update(names=names)


def removing(key):
    return lambda about: about["architecture"]["yaml"].pop(key) and None


DESCRIPTIONS = {
    "wide": layers([-1, 1, "Conv", [10**9, 3, 2]]),
    "wide within the bounds": layers(*[[-1, 60, "Conv", [8192, 15, 1]]] * 5),
    "large maps": layers(*[[-1, 1, "Conv", [8192, 1, 1]]] * 5),
    "repeated": layers([-1, 10**9, "Conv", [64, 3, 2]]),
    "kernel": layers([-1, 1, "Conv", [64, 1 << 20, 2]]),
    "negative": layers([-1, 1, "Conv", [-64, 3, 2]]),
    "no step": layers([-1, 1, "Conv", [64, 3, 0]]),
    "not a number": layers([-1, 1, "Conv", [float("nan"), 3, 2]]),
    "from later": layers([5, 1, "Conv", [64, 3, 2]]),
    "from nowhere": layers([-9, 1, "Conv", [64, 3, 2]]),
    "from text": layers(["-1", 1, "Conv", [64, 3, 2]]),
    "from everywhere": layers([[-1] * 1000, 1, "Concat", [1]]),
    "three parts": layers([-1, 1, "Conv"]),
    "arguments as an object": layers([-1, 1, "Conv", {"c": 64}]),
    "many layers": lambda about: about["architecture"]["yaml"].update(
        backbone=about["architecture"]["yaml"]["backbone"] * 50
    ),
    "upsampled": layers([-1, 1, "nn.Upsample", [None, 16, "nearest"]], [-1, 1, "nn.Upsample", [None, 16, "nearest"]]),
    "upsampled to a size": layers([-1, 1, "nn.Upsample", [16, None, "nearest"]]),
    "width": setting(width_multiple=1e4),
    "width nan": setting(width_multiple=float("nan")),
    "width text": setting(width_multiple="1"),
    "width true": setting(width_multiple=True),
    "depth": setting(depth_multiple=1e9),
    "depth none": setting(depth_multiple=0),
    "channels": setting(max_channels=1e9),
    "classes": setting(nc=10**9),
    "classes true": setting(nc=True),
    "classes other": setting(nc=11),
    "no classes": naming([]),
    "classes as an object": naming({"0": "a"}),
    "classes of numbers": naming(list(range(10))),
    "classes of long names": naming(["x" * 10**6] * 10),
    "bins": setting(reg_max=10**6),
    "scales": setting(scales={"n": [1, 1e9, 1024]}, scale="n"),
    "scale of another name": setting(scales={"n": [1, 1, 1024]}, scale="z"),
    "scale as a list": setting(scales=[1, 2], scale="n"),
    "end to end": setting(end2end=2),
    "colours": setting(ch=10**6),
    "backbone as an object": setting(backbone={}),
    "no backbone": removing("backbone"),
    "empty backbone": setting(backbone=[]),
    "no head": setting(head=[]),
    "heads": setting(head=[[[-1], 1, "Detect", ["nc"]]] * 3),
    "yaml as a list": lambda about: about["architecture"].update(yaml=[1]),
    "yaml as a path": lambda about: about["architecture"].update(yaml="yolo11n.yaml"),
    "more": lambda about: about["architecture"].update(weights="/etc/passwd"),
    "architecture as a list": lambda about: about.update(architecture=[1]),
    "architecture null": lambda about: about.update(architecture=None),
    "no architecture": lambda about: about.pop("architecture") and None,
    "family as a list": lambda about: about.update(family=["yolo11"]),
    "a list": lambda about: "[1]",
    "a number": lambda about: "3",
    "empty": lambda about: "",
    "no json": lambda about: "{",
    "twice": lambda about: '{"family": "yolo11", ' + json.dumps(about)[1:],
    "deep": lambda about: "[" * 100_000 + "]" * 100_000,
    "deep objects": lambda about: '{"a":' * 100_000 + "1" + "}" * 100_000,
    "deep architecture": lambda about: json.dumps(about)[:-1] + ', "x": ' + "[" * 40 + "]" * 40 + "}",
    "infinity": lambda about: json.dumps(about)[:-1] + ', "x": Infinity}',
    "digits": lambda about: json.dumps(about)[:-1] + ', "x": ' + "9" * 10_000 + "}",
}


@pytest.mark.parametrize("kind", DESCRIPTIONS)
@pytest.mark.parametrize("family", ["yolo11", "yolov5"])
def test_a_description_is_within_the_bounds_of_a_detector_or_refused(family, kind, tmp_path):
    if kind in ("bins", "end to end", "scales") and family == "yolov5":
        pytest.skip("a setting that YOLOv5 does not have")
    refused(forge.own_file(tmp_path / "bad.safetensors", family, DESCRIPTIONS[kind]), family)


RESNET = {
    "model": "fcn_resnet50", "outputs": 10**9, "frozen_batch_norm": 1, "names": ["a"] * 3,
    "weights_backbone": "DEFAULT",
}  # fmt: skip


@pytest.mark.parametrize("key", RESNET)
def test_an_architecture_of_torchvision_has_its_three_settings_only(key, tmp_path):
    path = forge.own_file(
        tmp_path / "bad.safetensors", "resnet", lambda about: about["architecture"].update({key: RESNET[key]})
    )
    refused(path, "resnet", "the architecture of this resnet")


SKIPPED: dict = {"yolov5": ("bins", "end to end", "scales"), "yolo11": ()}
ARCHITECTURES = {
    **{family: {k: c for k, c in DESCRIPTIONS.items() if k not in SKIPPED[family]} for family in SKIPPED},
    "resnet": {key: (lambda about, k=key: about["architecture"].update({k: RESNET[k]})) for key in RESNET},
    "vit": {
        "path": lambda about: about["architecture"].update(config="/tmp/evil.py"),
        "way up": lambda about: about["architecture"].update(config="swin/../../evil.py"),
        "wide": lambda about: about["architecture"]["overrides"].update({"backbone.embed_dims": 10**9}),
        "program": lambda about: about["architecture"]["overrides"].update({"backbone.type": "torch.load"}),
    },
}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_architecture_in_a_quantization_json_has_the_bounds_of_that_in_a_checkpoint(family, tmp_path):
    folder = quantized(tmp_path, family)
    whole = (folder / "quantization.json").read_text()
    for change in ARCHITECTURES[family].values():
        about = {key: value for key, value in json.loads(whole).items() if key != "sha256"}  # as an older version
        changed = change(about)
        (folder / "quantization.json").write_text(changed if isinstance(changed, str) else json.dumps(about))
        with pytest.raises(UserError, match=r"damaged quantized checkpoint|not valid JSON") as caught:
            load_quantized(folder)
        assert "\n" not in str(caught.value)


TIMM = {
    "backbone": [
        "hf-hub:a/b",
        "local-dir:/tmp/x",
        "../x",
        "https://x.org/a",
        "os.system",
        "a" * 81,
        7,
        ["resnet18"],
        None,
    ],
    "levels": [[-1, 0], [10**9], [], [1, 1], "1", [[1]]],
    "channels": [0, 10**9, 1.5, True],
    "anchor_sizes": [[[32.0]], [[0.0]] * 5, [[1e9]] * 5, [[float("inf")]] * 5, [[]] * 5, [[8.0] * 100] * 5, "32"],
    "aspect_ratios": [[0], [], [-1.0], ["nc"], [1.0] * 100],
    "pretrained": [True],
    "checkpoint_path": ["/tmp/x.pth"],
}


@pytest.mark.parametrize("key", TIMM)
def test_a_backbone_of_timm_has_a_name_of_its_registry_and_numbers_within_bounds(key, tmp_path, monkeypatch):
    """Nothing is fetched and nothing is read: the schema refuses, or the registry does not know the name."""
    monkeypatch.setattr("timm.create_model", lambda *_, **__: pytest.fail("timm was asked for a model"))
    good = {"model": "maskrcnn", "outputs": 5, "frozen_batch_norm": False, "backbone": "resnet18", "channels": 64}
    good |= {"levels": [1, 2, 3, 4], "anchor_sizes": [[32.0]] * 5}
    for value in TIMM[key]:
        about = good | {key: value}
        path = forge.own_file(
            tmp_path / "bad.safetensors", "resnet", lambda found, about=about: found.update(architecture=about)
        )
        refused(path, "resnet", r"the architecture of this resnet|its description: not valid JSON")
    for model in ("maskrcnn_resnet50_fpn", "maskrcnn_micro", "timm.create_model"):
        path = forge.own_file(
            tmp_path / "bad.safetensors",
            "resnet",
            lambda found, m=model: found.update(architecture=good | {"model": m}),
        )
        refused(path, "resnet", "the architecture of this resnet")
    unknown = good | {"backbone": "no_such_model"}
    path = forge.own_file(tmp_path / "bad.safetensors", "resnet", lambda found: found.update(architecture=unknown))
    refused(path, "resnet", "no name of timm.list_models")


QUANTIZED = {
    "empty": lambda about: "",
    "null": lambda about: "null",
    "list": lambda about: "[]",
    "deep": lambda about: "[" * 100_000,
    "nan": lambda about: json.dumps(about)[:-1] + ', "x": NaN}',
    "twice": lambda about: '{"layers": [], ' + json.dumps(about)[1:],
    "family": lambda about: about.update(family="os"),
    "family path": lambda about: about.update(family="../toy"),
    "family list": lambda about: about.update(family=["toy"]),
    "layers as an object": lambda about: about.update(layers={}),
    "layers many": lambda about: about.update(layers=about["layers"] * 10_000),
    "layer twice": lambda about: about.update(layers=[about["layers"][0]] * 4),
    "layers in another order": lambda about: about["layers"].reverse(),
    "layer of another role": lambda about: about["layers"][1].update(role="output"),
    "layer of no role": lambda about: about["layers"][1].update(role="x"),
    "bits as a text": lambda about: about["layers"][1].update(weight_bits="4"),
    "bits 4.0": lambda about: about["layers"][1].update(weight_bits=4.0),
    "bits true": lambda about: about["layers"][1].update(weight_bits=True),
    "bits many": lambda about: about["layers"][1].update(weight_bits=10**9),
    "bits none": lambda about: about["layers"][1].update(activation_bits=0),
    "bits of another layer": lambda about: about["layers"][0].update(weight_bits=4, activation_bits=4),
    "name long": lambda about: about["layers"][1].update(name="x" * 10**6),
    "name dotted": lambda about: about["layers"][1].update(name="__class__.__init__"),
    "reason list": lambda about: about["layers"][1].update(reason=[]),
    "settings as a list": lambda about: about.update(quantization=[]),
    "settings nan": lambda about: about["quantization"].update(average_bits="nan"),
    "quantizer of a path": lambda about: about["quantization"].update(quantizer="../../evil"),
    "quantizer of another module": lambda about: about["quantization"].update(quantizer="os"),
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantization_json_is_what_saving_wrote_or_refused(kind, tmp_path):
    from common.config.schema import QuantizationConfig
    from common.detection.detector import build_detector
    from common.quantization import calibrate, plan_layers, quantize, save_quantized

    detector = build_detector("toy", {"class_names": ["a", "b"], "width": 8})
    module_, config = detector.build(), QuantizationConfig()
    plan = plan_layers(detector, module_, config)
    student = quantize(module_, plan, config)
    calibrate(detector, module_, student, plan, [torch.rand(2, 3, 32, 32)], config)
    save_quantized(tmp_path, student, plan, "toy", detector.architecture, config)
    assert load_quantized(tmp_path)[0].class_names == ("a", "b")
    path = tmp_path / "quantization.json"
    about = json.loads(path.read_text())
    changed = QUANTIZED[kind](about)
    changed = about if changed is None else changed
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(UserError) as caught:
        load_quantized(tmp_path)
    assert "\n" not in str(caught.value)
    if kind in ("empty", "null", "list", "deep", "nan", "twice"):
        with pytest.raises(UserError):
            saved_plan(tmp_path)
