"""Weights that are no numbers are refused by name by every command, before any work."""

import pytest
from safetensors.torch import save_file
from toy.experiment import write_experiment

from common.checkpoints.read import load_tensors, save_tensors
from common.cli import main
from common.quantization import load_quantized
from common.runtime.errors import UserError
from hostile import forge
from hostile.test_code_in_files import CONFIG, quantized

WORDS = ("evaluate", "run", "synthesize", "train", "sensitivity")


@pytest.mark.parametrize("family", forge.MICRO)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")], ids=str)
def test_a_checkpoint_with_nan_or_infinity_is_refused_by_every_command_with_the_tensors_name(
    family, value, tmp_path, capsys
):
    tensors, about = load_tensors(forge.MICRO[family])
    name = sorted(n for n, t in tensors.items() if t.is_floating_point() and t.numel() > 4)[-1]
    tensors[name].view(-1)[3] = value
    weights = tmp_path / "bad.safetensors"
    save_tensors(weights, tensors, about)
    write_experiment(tmp_path)
    (tmp_path / "c.yaml").write_text(CONFIG.format(family=family, weights=weights, folder=tmp_path))
    picture = str(tmp_path / "images/1.png")
    commands = [[word, str(tmp_path / "c.yaml")] for word in WORDS]
    commands.append(["predict", str(weights), picture, "--family", family, "--out", str(tmp_path / "out")])
    for command in commands:
        capsys.readouterr()
        assert main(command) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"{name} holds NaN or infinity" in line
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "sets").exists()


def test_a_pickled_checkpoint_with_nan_is_refused_by_name(tmp_path):
    from common.detection.detector import load_detector

    def change(module):
        module.model[3].bn.running_mean[1] = float("nan")

    with pytest.raises(UserError, match=r"model\.3\.bn\.running_mean holds NaN or infinity"):
        load_detector("yolo11", forge.pickled_yolo11(tmp_path / "bad.pt", change))


@pytest.mark.parametrize("part", ["weight", "step", "zero step"])
def test_a_quantized_detector_with_numbers_that_are_none_is_refused_by_every_command(part, tmp_path, capsys):
    folder = quantized(tmp_path, "yolov5")
    tensors, about = load_tensors(folder / "model.safetensors")
    scales = [n for n in tensors if "quantizer" in n and n.endswith((".step", ".scale"))]
    name = "model.3.conv.weight" if part == "weight" else scales[0]
    tensors[name].view(-1)[0] = 0.0 if part == "zero step" else float("nan")
    save_tensors(folder / "model.safetensors", tensors, about)
    with pytest.raises(UserError, match=rf"{name} holds (NaN or infinity|a scale of 0)"):
        load_quantized(folder)
    write_experiment(tmp_path)
    (tmp_path / "c.yaml").write_text(CONFIG.format(family="yolov5", weights=folder, folder=tmp_path))
    for command in (["evaluate", str(tmp_path / "c.yaml")], ["predict", str(folder), str(tmp_path / "images/1.png")]):
        capsys.readouterr()
        assert main(command) == 2
        assert name in capsys.readouterr().err


def test_a_flipped_byte_in_a_file_of_ours_is_noticed_although_safetensors_has_no_checksum(tmp_path):
    tensors, about = load_tensors(forge.MICRO["yolov5"])
    path = tmp_path / "a.safetensors"
    save_tensors(path, tensors, about)
    assert load_tensors(path)[1] == about
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="its checksum is another one"):
        load_tensors(path)
    save_file(tensors, path)  # a file that others wrote has none
    assert load_tensors(path)[1] == {}
