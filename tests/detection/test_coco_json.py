"""COCO files as users have them: harmless things change no AP; every mistake, also a random one, is named in place."""

import copy
import json
import math
import os
import re
import tracemalloc

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from toy.experiment import SIDE, correct, detections, ours, read, reference

from common.detection.coco_json import read_coco
from common.runtime.errors import UserError

FUZZED = int(os.environ.get("ZSQDET_FUZZED", "150"))  # files
JUNK = [
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    10,
    11,
    0.5,
    1e300,
    10**40,
    math.nan,
    math.inf,
    "",
    "3",
    "x",
    [],
    [[]],
    {},
    [1] * 4,
]
JUNK += ["../x", "a/../b.png", {"id": 3}, [0, 0, 0, 0], [1, 2, 3, -4], 2**63, "\0", [None] * 4, [True] * 4]


def row(content, section, number=5):
    return content[section][number % len(content[section])]


def put(section, field, value, number=5):
    return lambda content: row(content, section, number).__setitem__(field, value)


def drop(section, field):
    return lambda content: row(content, section).pop(field)


def for_all(section, change):
    return lambda content: [change(i, found) for i, found in enumerate(content[section])]


HARMLESS = {
    "ids from 0": for_all("annotations", lambda i, r: r.update(id=i)),
    "one id for all": for_all("annotations", lambda i, r: r.update(id=7)),
    "ids of text": for_all("annotations", lambda i, r: r.update(id=f"object {i}")),
    "no ids": for_all("annotations", lambda i, r: r.pop("id")),
    "null ids": for_all("annotations", lambda i, r: r.update(id=None)),
    "iscrowd null": put("annotations", "iscrowd", None),
    "iscrowd missing": drop("annotations", "iscrowd"),
    "iscrowd 0.0": put("annotations", "iscrowd", 0.0),
    "area null": for_all("annotations", lambda i, r: r.update(area=None)),
    "area missing": for_all("annotations", lambda i, r: r.pop("area")),
    "float sizes": for_all("images", lambda i, r: r.update(width=40.0, height=40.0)),
    "float ids": for_all("annotations", lambda i, r: r.update(image_id=float(r["image_id"]))),
    "segmentation null": put("annotations", "segmentation", None),
    "segmentation empty": put("annotations", "segmentation", []),
    "polygon of two points": put("annotations", "segmentation", [[1, 2, 3, 4]]),
    "segmentation of text": put("annotations", "segmentation", "none"),
    "root category": lambda content: content["categories"].insert(
        0, {"id": 0, "name": "root", "supercategory": "none"}
    ),
    "more keys": put("annotations", "attributes", {"occluded": True, "score": math.nan}),
    "licenses": lambda content: content.update(licenses=None, info="made by hand"),
    "ignore": put("annotations", "ignore", 1),  # pycocotools puts iscrowd in its place
    "folders": for_all("images", lambda i, r: r.update(file_name=f"part{i}/same.png")),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_harmless_changes_no_ap(tmp_path, name):
    content = correct()
    found = detections(content)
    wanted = reference(content, found)
    assert 0.1 < wanted[0] < 0.95
    HARMLESS[name](content)
    assert ours(read(tmp_path, content).content, found) == wanted


MISTAKES = {
    **{
        f"{section}.{field} {value!r}": (put(section, field, value), rf"{section}\[\d\]\.{field}: found ")
        for section, field, values in (
            ("images", "id", ("7", None, True, 7.5, [], {}, math.nan, 10**30)),
            ("images", "width", ("40", None, 0, -40, True, 40.5, math.inf, 10**9)),
            ("images", "height", ("40", None, 0, -40)),
            ("images", "file_name", (7, None, "", " ", ["a"], "a\0b", "\ud800")),
            ("annotations", "image_id", ("10", None, True, 10.5, 999, [])),
            ("annotations", "category_id", ("3", None, False, 999, math.nan)),
            ("annotations", "iscrowd", ("0", True, 2, -1, [])),
            ("annotations", "area", ("9", True, -1, 1e11, math.nan, math.inf, [])),
            ("annotations", "bbox", (None, [], [1, 2, 3], [1, 2, 3, 4, 5], "1234", [1, 2, "3", 4], [1, 2, True, 4])),
            ("annotations", "bbox", ([1, 2, -3, 4], [1, 2, math.nan, 4], [math.inf, 2, 3, 4], [1, 2, 3, 1e300])),
            ("categories", "id", ("3", None, True)),
            ("categories", "name", (3, None, "", [])),
        )
        for value in values
    },
    "no width": (drop("images", "width"), r"images\[5\]\.width: found nothing"),
    "no box": (drop("annotations", "bbox"), r"annotations\[5\]\.bbox: found nothing"),
    "no image_id": (drop("annotations", "image_id"), r"annotations\[5\]\.image_id: found nothing"),
    "no name": (drop("categories", "name"), r"categories\[1\]\.name: found nothing"),
    "image listed twice": (
        lambda c: c["images"].append(dict(c["images"][1])),
        r"images\[6\]\.id: .* images\[1\] has it",
    ),
    "file under two ids": (
        lambda c: c["images"].append(c["images"][1] | {"id": 99}),
        r"images\[6\]\.file_name: .*\[1\]",
    ),
    "same file, other name": (put("images", "file_name", "./1.png"), r"images\[5\]\.file_name: .*images\[1\]"),
    "category ids twice": (put("categories", "id", 3), r"categories\[1\]\.id: found 3.*categories\[0\]"),
    "category names twice": (put("categories", "name", "a"), r"categories\[1\]\.name: found 'a'"),
    "object twice": (
        lambda c: c["annotations"].append(c["annotations"][2] | {"id": 99}),
        r"\[18\]: .*annotations\[2\]",
    ),
    **{
        f"a box {where} its image of 40 x 40": (
            put("annotations", "bbox", box),
            r"annotations\[5\]\.bbox: found \[.*40 x 40",
        )
        for where, box in (("right of", [40, 1, 5, 5]), ("below", [1, 90, 5, 5]), ("left of", [-5, 1, 5, 5]))
    },
    "rows of text": (lambda c: c["annotations"].insert(3, "row"), r"annotations\[3\]: found 'row'; allowed: an object"),
    "annotations of text": (lambda c: c.update(annotations="none"), r"annotations: found 'none'; allowed: a list"),
    "no categories": (lambda c: c.pop("categories"), "categories: found nothing; allowed: a list"),
    "nothing annotated": (lambda c: c.update(annotations=[]), r"annotations: found \[\].*nothing to measure"),
    "no images": (lambda c: c.update(images=[]), r"images: found \[\].*nothing to measure"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_with_its_place(tmp_path, name):
    change, message = MISTAKES[name]
    content = correct()
    change(content)
    with pytest.raises(UserError, match=rf"set\.json: .*{message}") as caught:
        read(tmp_path, content)
    assert "\n" not in str(caught.value)


def test_all_mistakes_are_reported_together_and_counted(tmp_path):
    content = correct()
    for i, found in enumerate(content["annotations"]):
        found |= {"bbox": [1, 2, 3], "category_id": "3"} if i % 2 else {"area": -1}
    content["images"][0]["width"] = 0
    with pytest.raises(UserError) as caught:
        read(tmp_path, content)
    lines = str(caught.value).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "... and 8 more"
    assert all(re.search(r"set\.json: \w+\[\d+\]\.\w+: found .*; allowed: ", line) for line in lines[:-1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "found list"),
        ("null", "found NoneType"),
        ("[" * 100_000, "too deep"),
        ('{"images": [], "images": []}', "the key 'images' twice"),
        ("\udcff".encode("utf-8", "surrogateescape").decode("latin-1"), "not valid JSON"),
    ],
)
def test_what_is_no_coco_file_is_one_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, text)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UserError, match=r"pipe\.json: is no ordinary file"):
        read_coco(tmp_path / "pipe.json")


def test_a_key_twice_is_found_wherever_it_is(tmp_path):
    text = json.dumps(correct()).replace('"image_id": 11,', '"image_id": 11, "image_id": 10,', 1)
    with pytest.raises(UserError, match=r"annotations\[3\]: found the key 'image_id' twice; allowed: each key once"):
        read(tmp_path, text)


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    assert len(read(tmp_path, "\ufeff" + json.dumps(correct())).images) == 6


def test_boxes_of_no_size_are_kept_as_pycocotools_keeps_them(tmp_path):
    content = correct()
    content["annotations"][4]["bbox"][3] = 0  # train2017 has one
    found = detections(content)
    assert ours(read(tmp_path, content).content, found) == reference(content, found)


def test_repeated_objects_count_once_where_nothing_is_scored(tmp_path, caplog):
    content = correct()
    content["annotations"] += copy.deepcopy(content["annotations"][:2])
    assert len(read(tmp_path, content, to_score=False).annotations) == 18
    assert "2 objects are in it twice" in caplog.text


def test_segmentations_are_left_out_where_boxes_alone_are_measured(tmp_path):
    content = correct(masks=True)
    assert not any("segmentation" in r for r in read(tmp_path, content).annotations)
    assert all("segmentation" in r for r in read(tmp_path, content, masks=True).annotations)


def test_masks_are_scored_as_pycocotools_scores_them(tmp_path):
    content = correct(masks=True)
    found = detections(content, masks=True)
    for annotation in content["annotations"][::3]:  # the third way to write one: run lengths that are not compressed
        plane = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([box_outline(annotation)], SIDE, SIDE)))
        flat = plane.flatten(order="F")
        edges = np.flatnonzero(np.diff(np.r_[0, flat, 2]))
        annotation["segmentation"] = {"size": [SIDE, SIDE], "counts": np.diff(np.r_[0, edges]).tolist()}
    for kind in ("bbox", "segm"):
        wanted = reference(content, found, kind)
        assert 0.1 < wanted[0] < 0.95
        assert ours(read(tmp_path, content, masks=True).content, found, kind) == wanted


NUMBERS = 5000  # of a polygon


def test_polygons_take_eight_bytes_a_number(tmp_path):
    content = correct(masks=True)
    for annotation in content["annotations"]:
        annotation["segmentation"] = [(np.arange(NUMBERS) % SIDE + 0.25).tolist()]
    path = tmp_path / "set.json"
    path.write_text(json.dumps(content))
    tracemalloc.start()
    coco = read_coco(path, masks=True)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    numbers = NUMBERS * len(content["annotations"])
    assert kept < 8.5 * numbers
    assert peak < 8.5 * numbers + 2.2 * path.stat().st_size + 32 * NUMBERS  # the file as bytes and text, lists of one
    assert coco.annotations[3]["segmentation"][0].tolist() == content["annotations"][3]["segmentation"][0]


def box_outline(annotation):
    x, y, w, h = annotation["bbox"]
    return [x, y, x + w, y, x + w, y + h, x, y + h]


RUNS = {"size": [SIDE, SIDE], "counts": [0, SIDE * SIDE]}


@pytest.mark.parametrize(
    "value",
    [
        [[1, 2, 3, 4]],
        [[]],
        [1, 2, 3, 4, 5, 6],
        [[1, 2, 3, 4, 5]],
        [[1, 2, 3, 4, 5, "6"]],
        [[1, 2, 3, 4, 5, math.nan]],
        [[1, 2, 3, 4, 5, 1e12]],
        [[1, 2, 3, 4, 5, True]],
        "text",
        7,
        {"size": [1]},
        {"counts": [1600]},
        RUNS | {"size": [SIDE, SIDE + 1]},
        RUNS | {"counts": [0, SIDE * SIDE - 1]},
        RUNS | {"counts": [-1, SIDE * SIDE + 1]},
        RUNS | {"counts": []},
        RUNS | {"counts": [1600.0]},
        RUNS | {"counts": ""},
        RUNS | {"counts": "P"},
        RUNS | {"counts": "not run lengths"},
        RUNS | {"counts": "ooooooooooooooooo"},
        RUNS | {"counts": "\xff"},
        RUNS | {"counts": None},
    ],
    ids=str,
)
def test_a_mask_that_is_none_is_named_where_masks_are_measured(tmp_path, value):
    content = correct(masks=True)
    content["annotations"][5]["segmentation"] = value
    with pytest.raises(UserError, match=r"annotations\[5\]\.segmentation: found .*; allowed: ") as caught:
        read(tmp_path, content, masks=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [None, [], {}])
def test_an_empty_segmentation_is_none(tmp_path, value):
    content = correct(masks=True)
    content["annotations"][5]["segmentation"] = value
    annotations = read(tmp_path, content, masks=True).annotations
    assert [i for i, row in enumerate(annotations) if "segmentation" not in row] == [5]


def damaged(seed):
    """A correct file with one or two random values put, removed, repeated or moved."""
    rng = np.random.default_rng(seed)
    content = correct(seed)
    for _ in range(rng.integers(1, 3)):
        rows = content[("images", "annotations", "categories")[rng.integers(3)]]
        number = int(rng.integers(len(rows)))
        fields = sorted(rows[number]) if isinstance(rows[number], dict) else []
        field = fields[rng.integers(len(fields))] if fields else None
        match rng.integers(6):
            case 0 | 1 if field:
                rows[number][field] = copy.deepcopy(JUNK[rng.integers(len(JUNK))])
            case 2 if field:
                del rows[number][field]
            case 3:
                rows.append(copy.deepcopy(rows[number]))
            case 4:
                rows[number] = copy.deepcopy(JUNK[rng.integers(len(JUNK))])
            case _ if field and isinstance(rows[number - 1], dict) and field in rows[number - 1]:
                rows[number][field] = copy.deepcopy(rows[number - 1][field])
    return content


def cleaned(content):
    """What a person who repairs the file would leave."""
    content = copy.deepcopy(content)
    for number, found in enumerate(content["annotations"], 1):
        found |= {"id": number, "iscrowd": found.get("iscrowd") or 0}
        if found.get("area") is None:
            found["area"] = found["bbox"][2] * found["bbox"][3]
    return content


def outcome(folder, seed):
    """`refused` or `read`, after checking that it is the right one of the two in form and in AP."""
    content = damaged(seed)
    try:
        coco = read(folder, content)
    except UserError as error:
        for line in str(error).splitlines():
            assert re.search(r"set\.json: \w+(\[\d+\](\.\w+)?)?: found .*; allowed: |^\.\.\. and \d+ more$", line), line
        return "refused"
    objects = cleaned(content)
    found = detections(objects)
    assert ours(coco.content, found) == reference(objects, found)
    ids = [image["id"] for image in content["images"]]
    assert len(set(ids)) == len(ids)
    assert {r["image_id"] for r in content["annotations"]} <= set(ids)
    assert not any(type(r[k]) in (bool, str) for r in content["annotations"] for k in ("image_id", "category_id"))
    return "read"


def test_random_damage_is_refused_or_changes_no_ap(tmp_path):
    outcomes = [outcome(tmp_path, seed) for seed in range(FUZZED)]
    assert outcomes.count("refused") > FUZZED / 3
    assert outcomes.count("read") > FUZZED / 40
