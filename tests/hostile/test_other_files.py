"""YAML, images and saved states: nothing in them runs, and what is wrong is one line."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from common.checkpoints.read import load_tensors, save_tensors
from common.cli import main
from common.runtime.errors import UserError
from hostile import forge
from hostile.forge import call, text


def test_a_yaml_cannot_make_objects_or_explode(tmp_path, marker, capsys):
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    texts = [
        f"family: !!python/object/apply:os.system ['touch {marker}']\n",
        f"family: !!python/object/new:os.system ['touch {marker}']\n",
        "!!python/name:os.system : 1\n",
        "weights: !!python/module:antigravity\n",
        laughs + "family: *a29\nweights: x\n",
        "&x [*x]\n",
        "family: &x {a: *x}\nweights: x\n",
        "[" * 3000,
        "family: " + "[" * 3000 + "]" * 3000 + "\n",
        "? [a, b]\n: 1\n",
        "? {a: b}\n: 1\n",
        "family: \0\n",
    ]
    for content in texts:
        path = tmp_path / "bad.yaml"
        path.write_text(content)
        capsys.readouterr()
        assert main(["run", str(path)]) == 2, content[:40]
        lines = capsys.readouterr().err.strip().splitlines()
        assert all(line.startswith("error: ") and len(line) < 1000 for line in lines), content[:40]
        assert not marker.exists()


def test_an_image_is_decoded_by_a_decoder_of_images_only(tmp_path, marker):
    from common.runtime.images import read_image

    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "good.png")
    (tmp_path / "a.png").write_bytes(pickle.dumps(print))
    forge.archive(tmp_path / "b.png", forge.inside_checkpoint(call("os", "system", text(f"touch {marker}"))))
    for name_ in ("a.png", "b.png"):
        with pytest.raises(UserError, match="not a readable image"):
            read_image(tmp_path / name_)
    assert read_image(tmp_path / "good.png").shape == (3, 8, 8)
    assert not marker.exists()


def test_a_saved_training_state_is_tensors_and_json_only(tmp_path):
    """What `pickle` would need is not even in the format."""
    save_tensors(tmp_path / "state.safetensors", {"a": torch.ones(1)}, {"epoch": 1})
    assert load_tensors(tmp_path / "state.safetensors")[1] == {"epoch": 1}
    torch.save({"a": torch.ones(1)}, tmp_path / "state.safetensors")
    with pytest.raises(UserError, match="damaged safetensors file"):
        load_tensors(tmp_path / "state.safetensors")
