"""Values that would fail hours later, and files that would hang or end in a traceback: one line each, at once."""

import pytest

from common.config.load import load_config
from common.config.schema import ExperimentConfig
from common.runtime.errors import UserError


@pytest.fixture
def write(tmp_path):
    def to_file(content, name="experiment.yaml"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return to_file


def line_of(path, *overrides):
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "seed=true",
        "seed=4294967296",
        "seed=18446744073709551616",
        f"seed={'9' * 5000}",
        "synthesis.num_images=true",
        "synthesis.num_images=100000000",
        "synthesis.jitter=1e9",
        "synthesis.learning_rate=1e5",
        "synthesis.weights.task=1e300",
        "synthesis.flip=1",
        "synthesis.flip=[]",
        "synthesis.label_sampling={start: 0.9, stop: 0.1}",
        "synthesis.label_sampling={min_area: 0.9, max_area: 0.1}",
        "synthesis={iterations: 0, low_resolution_iterations: 0}",
        "synthesis={iterations: 0, image: pixels}",
        "synthesis={iterations: 0, low_resolution_iterations: 0, source: batch_norm}",
        "quantization.range_headroom=1e30",
        "quantization.weight_bits=true",
        "quantization.average_bits=true",
        "quantization.mixed_precision_bits=[true]",
        "quantization.layers={a: {weight_bits: true, activation_bits: 8}}",
        "training.learning_rate=2",
        "training.weight_decay=1e300",
        "training.weight_decay=true",
        "training.zoom=[1e5, 1e5]",
        "training.zoom=[1.35, 0.7]",
        "training.zoom=[true, true]",
        "training.epochs=1e12",
        "evaluation.image_size=1000000",
        "evaluation.max_detections=1000000000",
        f"run_dir={'a' * 256}",
        f"run_dir={'ä' * 128}",
        f"run_dir={'a/' * 2500}",
        'data={images: "a\\0b", annotations: b}',
        "data={images: '', annotations: b}",
        "training.zoom=" + "[" * 100_000,
        "training.zoom={[1]: 2}",
        "training.zoom=2001-99-99",
        "training.zoom=!!timestamp x",
        "training.zoom=!!python/object/apply:os.system [id]",
        "a" + ".a" * 100_000 + "=1",
        "data={images: a, images: b}",
        "x\ny=1",
    ],
    ids=lambda text: text[:40],
)
def test_a_value_that_cannot_work_is_one_line_before_any_work(write, override):
    assert len(line_of(write("weights: a.pt\n"), override)) < 1000


@pytest.mark.parametrize(
    "override",
    [
        "synthesis.label_sampling.start=1",
        "synthesis={iterations: 0, low_resolution_iterations: 0, source: noise}",
        "synthesis={iterations: 0}",
        "seed=4294967295",
        "training.learning_rate=1e-4",
        f"run_dir={'a' * 255}",
        "quantization.mixed_precision_bits=[5, 6]",
    ],
)
def test_odd_values_that_work_are_taken(write, override):
    load_config(write("weights: a.pt\n"), [override])


LAUGHS = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{y}: &{y} [{', '.join(['*' + x] * 9)}]\n" for x, y in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (LAUGHS, "line 2: found the alias *a; write its value out"),
        ("a: &a [*a]\n", "line 1: found the alias *a"),
        (
            "quantization: {layers: {*.cv2: {weight_bits: 8, activation_bits: 8}}}\n",
            "line 1: expected alphabetic or numeric character, but found '.'; quote a text that begins with *",
        ),
        ("training: " + "[" * 50_000, "line 1: nested more than 20 levels deep"),
        ("training: " + "{a: " * 20_000, "line 1: nested more than 20 levels deep"),
        ("- " * 50_000 + "a", "line 1: nested more than 20 levels deep"),
        ("a: " + "b" * 300_000, "more than 200000 bytes"),
        ("[1, 2]: 3\n", "line 1: found a list or mapping as a key; keys are text"),
        ("{a: 1}: 3\n", "line 1: found a list or mapping as a key; keys are text"),
        ("weights: a.pt\n1: 3\n", "line 2: found '1' as a key; keys are text"),
        ("on: 3\n", "line 1: found 'on' as a key; keys are text"),
        ("<<: {seed: 1}\n", "line 1: found '<<' as a key; keys are text"),
        (b"weights: a\0.pt\n", "not valid YAML"),
        (b"\0" * 100, "not valid YAML"),
        (b"\x80\x81", "not valid YAML"),
        ("seed: " + "9" * 5000, "not valid YAML"),
        ("seed: 2001-02-30\n", "not valid YAML"),
        ("seed: !!int ''\n", "found the tag"),
        ("seed: !!python/name:os.system\n", "found the tag"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ('weights: a.pt\n"a\\nb": 1\n', "a\\nb: found 1"),
        ("5\n", "found 5; allowed are lines of `key: value`"),
        ("[]\n", "found []; allowed are lines of `key: value`"),
    ],
    ids=range(23),
)
def test_a_file_that_is_no_settings_is_one_line(write, content, said):
    path = write(content)
    line = line_of(path)
    assert line.startswith(f"{path}: ")
    assert said in line
    assert len(line) < 1000


def test_a_file_that_cannot_be_opened_is_one_line(tmp_path):
    assert "Is a directory" in line_of(tmp_path)
    assert "File name too long" in line_of(tmp_path / ("a" * 300))
    assert "null byte" in line_of(tmp_path / "a\0b.yaml")
    assert "cannot be read" in line_of(tmp_path / "none.yaml")


def test_an_empty_file_and_a_byte_order_mark_are_no_mistake(write):
    assert load_config(write(""), ["weights=a.pt"]) == load_config(write(b"\xef\xbb\xbfweights: a.pt\n"))


def test_numbers_and_switches_are_not_taken_for_each_other_from_python_either():
    for values in ({"seed": True}, {"synthesis": {"flip": 0}}, {"training": {"zoom": (True, 2)}}):
        with pytest.raises(ValueError, match="true or false, and only there"):
            ExperimentConfig(weights="a.pt", **values)
