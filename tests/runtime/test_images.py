import os
import signal

import numpy as np
import pytest
from PIL import Image

from common.evaluation.yolo_labels import read_yolo
from common.runtime.errors import UserError
from common.runtime.images import find_images, read_image


@pytest.fixture
def impatient():
    """Ends a test that waits for something that never comes."""
    signal.alarm(20)
    yield
    signal.alarm(0)


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8))


def test_a_damaged_tiff_is_refused_in_one_line_and_not_filled_with_made_up_pixels(tmp_path, capfd):
    path = tmp_path / "a.tif"
    noise().save(path, compression="tiff_lzw")
    content = bytearray(path.read_bytes())
    content[len(content) * 6 // 10 : len(content) * 8 // 10] = bytes(len(content) * 8 // 10 - len(content) * 6 // 10)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a.tif: not a readable image \(TIFF_Error .*\); replace or remove it"):
        read_image(path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_deflate", "jpeg"])
def test_a_whole_tiff_is_read_as_it_is(tmp_path, compression):
    path = tmp_path / "a.tif"
    Image.new("RGB", (32, 16), (200, 100, 50)).save(path, compression=compression)
    assert read_image(path)[:, 8, 16].tolist() == pytest.approx([200, 100, 50], abs=3)


def test_a_pipe_with_the_name_of_an_image_is_not_waited_for(tmp_path, impatient):
    os.mkfifo(tmp_path / "pipe.jpg")
    noise().save(tmp_path / "a.jpg")
    assert [path.name for path in find_images(tmp_path)] == ["a.jpg"]
    with pytest.raises(UserError, match=r"pipe.jpg: not a readable image"):
        read_image(tmp_path / "pipe.jpg")


def test_a_pipe_with_the_name_of_a_label_file_is_not_waited_for(tmp_path, impatient):
    (tmp_path / "data.yaml").write_text("val: .\nnames: [a]\n")
    noise().save(tmp_path / "a.jpg")
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"a.txt: found a file that cannot be read \(.*is no ordinary file\)"):
        read_yolo(tmp_path / "data.yaml", "val")
